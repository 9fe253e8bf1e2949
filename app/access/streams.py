"""Answers and uploads that take long: whoever began them may have lost the right meanwhile."""

import time

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.access.authenticator import Authenticator
from app.access.principal import Principal
from app.errors import Unauthenticated

CHECK_SECONDS = 1


async def still_allowed(request: Request) -> bool:
    """Whether the key that began this request is one still; cheap enough for every turn of a loop.

    An answer that asks at least every two seconds ends within five of a revocation.
    """
    return await _is_still(request.scope, request.state.principal)


class UploadsEndWithTheirKey:
    """Refuses the rest of a body whose key is revoked, or expires, while it is sent."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        checked = time.monotonic()

        async def checking() -> Message:
            nonlocal checked
            message = await receive()
            principal = scope["state"].get("principal")  # not before the first word on access
            is_due = (
                message["type"] == "http.request" and time.monotonic() - checked > CHECK_SECONDS
            )
            if principal and is_due:
                await _check(scope, principal)
                checked = time.monotonic()
            return message

        await self._app(scope, checking if scope["type"] == "http" else receive, send)


async def _check(scope: Scope, principal: Principal) -> None:
    if not await _is_still(scope, principal):
        raise Unauthenticated(
            "The key was revoked, or has expired, while this request was under way.",
            "Send it again with a key that is valid.",
        )


async def _is_still(scope: Scope, principal: Principal) -> bool:
    authenticator: Authenticator = scope["state"]["authenticator"]
    return await authenticator.is_still(principal)
