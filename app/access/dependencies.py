"""What every route asks first: who is there, and whether they may."""

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.access.principal import Principal, Role
from app.errors import Forbidden
from app.middleware import READING

PROJECT_HEADER = "Flatlora-Project"
"""Chooses among the projects that a token opens."""

bearer = HTTPBearer(auto_error=False, description="A key of this service: `flk_…`.")


async def require_access(
    request: Request,
    given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
) -> None:
    """Every route of the API: a viewer to read, a submitter to write; and not too often."""
    key = given.credentials if given else None
    address = request.client.host if request.client else ""
    state = request.state
    state.principal = await state.authenticator.principal(
        key, address=address, project=request.headers.get(PROJECT_HEADER)
    )
    state.limits = await state.known_limits.of(state.principal.project)
    state.headers = state.rates.take(state.principal, state.limits)
    require_role(request, Role.VIEWER if request.method in READING else Role.SUBMITTER)


async def admins_only(request: Request) -> None:
    require_role(request, Role.ADMIN)


def require_role(request: Request, role: Role) -> None:
    """Raises ``Forbidden``."""
    principal: Principal = request.state.principal
    if not principal.role.includes(role):
        raise Forbidden(
            f"This key is a {principal.role}'s, and {request.method} {request.url.path} needs "
            f"{_article(role)} {role}.",
            "Ask an admin of the project for a key with that role.",
        )


def _article(role: Role) -> str:
    return "an" if role is Role.ADMIN else "a"


async def _principal(request: Request) -> Principal:
    principal: Principal = request.state.principal
    return principal


Asking = Annotated[Principal, Depends(_principal)]
"""Who sent the request."""
