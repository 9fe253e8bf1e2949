"""An identity provider's keys: fetched, kept, and asked for again with restraint."""

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2
import structlog
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt import PyJWK
from jwt.exceptions import PyJWTError

from app.errors import IssuerUnavailable
from app.settings import check_issuer_url

log = structlog.get_logger()

ALGORITHMS = {"RSA": "RS256", "EC": "ES256", "OKP": "EdDSA"}  # the one that each kind of key has
SMALLEST_RSA_BITS = 2048
FRESH_SECONDS = 600  # after which keys are fetched again, to forget those that were withdrawn
FLOOR_SECONDS = 10  # between two fetches, whoever asks for what
PATIENCE_SECONDS = 5
MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Key:
    key: Any
    algorithm: str


class NotAnIssuer(Exception):
    """What was found at the issuer's address is not what an issuer has there."""


TROUBLE = (httpx2.HTTPError, httpx2.InvalidURL, TimeoutError, NotAnIssuer)


class IssuerKeys:
    def __init__(self, issuer: str) -> None:
        self._issuer = issuer
        self._keys: dict[str, Key] = {}
        self._fetched_at = self._tried_at = float("-inf")
        self._turn = asyncio.Lock()
        self._refreshing: asyncio.Task[None] | None = None

    async def key(self, key_id: str) -> Key | None:
        """None if the issuer has no such key.

        Raises:
            IssuerUnavailable: If it is not known here, and the issuer does not answer.
        """
        if key_id in self._keys:
            self._refresh_when_old()
            return self._keys[key_id]
        async with self._turn:
            if key_id not in self._keys:
                await self._fetch()
        if key_id not in self._keys and self._fetched_at < self._tried_at:
            raise IssuerUnavailable
        return self._keys.get(key_id)

    async def close(self) -> None:
        if self._refreshing:
            await asyncio.gather(self._refreshing, return_exceptions=True)

    def _refresh_when_old(self) -> None:
        is_idle = self._refreshing is None or self._refreshing.done()
        if is_idle and time.monotonic() - self._fetched_at > FRESH_SECONDS:
            self._refreshing = asyncio.create_task(self._refresh())

    async def _refresh(self) -> None:
        async with self._turn:
            await self._fetch()

    async def _fetch(self) -> None:
        """Unless that was tried a moment ago. Keys that are known are kept if it is in vain."""
        now = time.monotonic()
        if now - self._tried_at < FLOOR_SECONDS:
            return
        self._tried_at = now
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                self._keys = await _published(self._issuer)
        except TROUBLE as error:
            log.warning("the identity provider does not answer", error=str(error) or repr(error))
        else:
            self._fetched_at = now


async def _published(issuer: str) -> dict[str, Key]:
    client = await asyncio.to_thread(httpx2.AsyncClient)  # it reads the certificates of all CAs
    async with client:
        found = await _json(client, f"{issuer.rstrip('/')}/.well-known/openid-configuration")
        if found.get("issuer") != issuer:
            raise NotAnIssuer(f"{issuer} calls itself {found.get('issuer')!r}")
        where = str(found.get("jwks_uri"))
        try:
            check_issuer_url(where)
        except ValueError as error:
            raise NotAnIssuer(f"its jwks_uri: {error}") from error
        listed = (await _json(client, where)).get("keys")
    if not isinstance(listed, list):
        raise NotAnIssuer(f"{urlsplit(where).path} lists no keys")
    return dict(key for jwk in listed if (key := _usable(jwk)))


async def _json(client: httpx2.AsyncClient, url: str) -> dict[str, Any]:
    body = b""
    async with client.stream("GET", url, headers={"Accept": "application/json"}) as response:
        if response.status_code != 200:
            raise NotAnIssuer(f"{url} answers {response.status_code}")
        async for part in response.aiter_bytes():
            body += part
            if len(body) > MOST_BYTES:
                raise NotAnIssuer(f"{url} has more than {MOST_BYTES} bytes")
    try:
        found = json.loads(body)
    except ValueError as error:
        raise NotAnIssuer(f"{url} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise NotAnIssuer(f"{url} is not a JSON object")
    return found


def _usable(jwk: Any) -> tuple[str, Key] | None:
    """A key that signs, of a kind that is taken here. Issuers publish others beside them."""
    if not isinstance(jwk, dict) or jwk.get("use", "sig") != "sig":
        return None
    key_id, algorithm = jwk.get("kid"), ALGORITHMS.get(str(jwk.get("kty")))
    if not isinstance(key_id, str) or algorithm is None or jwk.get("alg", algorithm) != algorithm:
        return None
    try:
        key = PyJWK(jwk, algorithm).key
    except (PyJWTError, ValueError, TypeError, KeyError):
        return None
    if isinstance(key, RSAPublicKey) and key.key_size < SMALLEST_RSA_BITS:
        return None
    return key_id, Key(key, algorithm)
