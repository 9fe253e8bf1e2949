"""Tokens of an identity provider (OpenID Connect), as Keycloak, Entra ID and Okta make them."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jwt
from jwt.exceptions import (
    ExpiredSignatureError,
    ImmatureSignatureError,
    InvalidAudienceError,
    InvalidIssuerError,
    PyJWTError,
)

from app.access.issuer import IssuerKeys
from app.access.principal import Principal, Role
from app.errors import Forbidden, Unauthenticated
from app.settings import GRANT, PROJECT_NAME, Settings

LEEWAY_SECONDS = 30
MOST_BYTES = 16 << 10
MOST_LETTERS = 200  # of a name in the audit log
REASONS: dict[type[PyJWTError], str] = {
    ExpiredSignatureError: "it has expired",
    ImmatureSignatureError: "it is not valid yet",
    InvalidAudienceError: "it was made for another service",
    InvalidIssuerError: "another issuer made it",
}

Claims = Mapping[str, Any]


class Tokens:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._keys = IssuerKeys(settings.oidc_issuer)
        self._grants = [
            match for grant in settings.oidc_groups if (match := GRANT.fullmatch(grant))
        ]

    async def principal(self, token: str, wanted: str | None) -> Principal:
        """Whose token this is.

        Args:
            token: As it came.
            wanted: The project that the request names, if its sender may choose among several.

        Raises:
            Unauthenticated: If it is not a valid token of the issuer, for this service.
            IssuerUnavailable: If that cannot be told now.
            Forbidden: If it opens no project, or not the one that is wanted.
        """
        claims = await self._claims(token)
        grants = self._granted(claims)
        project = wanted or next(iter(grants), None)
        if project not in grants:
            raise _closed(wanted, grants)
        assert project
        return Principal(
            project, grants[project], _actor(claims), expires_at=int(claims["exp"]) + LEEWAY_SECONDS
        )

    async def close(self) -> None:
        await self._keys.close()

    async def _claims(self, token: str) -> Claims:
        if len(token) > MOST_BYTES:
            raise refused("it is too long")
        try:
            key_id = jwt.get_unverified_header(token).get("kid")
            key = await self._keys.key(str(key_id))
            if key is None:
                raise refused("its issuer has no such key")
            found: Claims = jwt.decode(
                token,
                key.key,
                algorithms=[key.algorithm],  # by the key, whatever the token says
                audience=self._settings.oidc_audience,
                issuer=self._settings.oidc_issuer,
                leeway=LEEWAY_SECONDS,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except PyJWTError as error:
            raise refused(REASONS.get(type(error), "it is not valid")) from error
        return found

    def _granted(self, claims: Claims) -> dict[str, Role]:
        """Roles by project: of the claims that name them, then of the groups."""
        granted: dict[str, Role] = {}
        for project, role in self._each_grant(claims):
            if project not in granted or role.includes(granted[project]):
                granted[project] = role
        return granted

    def _each_grant(self, claims: Claims) -> Iterator[tuple[str, Role]]:
        known = {str(role) for role in Role}
        for project in _texts(claims, self._settings.oidc_project_claim):
            for role in _texts(claims, self._settings.oidc_role_claim):
                if re.fullmatch(PROJECT_NAME, project) and role in known:
                    yield project, Role(role)
        groups = {"*", *_texts(claims, self._settings.oidc_groups_claim)}
        for grant in self._grants:
            if grant[1] in groups:
                yield grant[2], Role(grant[3])


def refused(why: str) -> Unauthenticated:
    refusal = Unauthenticated(
        f"This token is not taken: {why}.",
        "Get a new one from the identity provider, for this service as its audience.",
    )
    refusal.headers["WWW-Authenticate"] = 'Bearer error="invalid_token"'
    return refusal


def _closed(wanted: str | None, grants: Mapping[str, Role]) -> Forbidden:
    if wanted:
        return Forbidden(
            f"This token does not open the project {wanted!r}.",
            f"It opens {', '.join(grants) or 'none'}.",
        )
    return Forbidden(
        "This token opens no project.",
        "Whoever runs the service says which claims or groups open one: FLATLORA_OIDC_GROUPS, "
        "FLATLORA_OIDC_PROJECT_CLAIM and FLATLORA_OIDC_ROLE_CLAIM.",
    )


def _texts(claims: Claims, name: str) -> list[str]:
    """What a claim says, one text or several. ``a.b`` is b within a, where none is called that."""
    found: Any = claims.get(name)
    if found is None and "." in name:
        found = claims
        for part in name.split("."):
            found = found.get(part) if isinstance(found, dict) else None
    values = found if isinstance(found, list) else [found]
    return [value for value in values if isinstance(value, str)]


def _actor(claims: Claims) -> str:
    """The subject, and a name that people know."""
    names = (claims.get(name) for name in ("email", "preferred_username", "name"))
    known = next((name for name in names if isinstance(name, str) and name), None)
    subject = f"oidc:{claims['sub']}"
    actor = f"{subject} ({known})" if known else subject
    return "".join(letter for letter in actor if letter.isprintable())[:MOST_LETTERS]
