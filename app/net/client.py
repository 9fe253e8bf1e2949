"""Requests on connections to public addresses, for threads and for asyncio.

Nothing of the environment but the authorities that TLS trusts (``SSL_CERT_FILE``): a proxy would
connect on our behalf to what was never checked. Nothing is decompressed.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

import httpcore2
import httpx2

from app.net.backends import AsyncPublicBackend, Deadline, PublicBackend
from app.net.errors import NetError, RedirectNotAllowed, named
from app.net.rules import Rules
from app.net.urls import check_url

logging.getLogger("httpx2").setLevel(logging.WARNING)  # else it tells every URL, signed or not

MAX_REDIRECTS = 3
CONNECT_SECONDS, SILENCE_SECONDS = 10.0, 30.0
KEEP_SECONDS = 5.0  # of a connection that is not used: names move
HEADERS = {"User-Agent": "flatlora", "Accept": "*/*", "Accept-Encoding": "identity"}
TIMEOUT = httpx2.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)


class _Transport(httpx2.HTTPTransport):
    """Its parent's requests on a pool that the parent cannot be asked for.

    Should the parent no longer keep it under this name, there is none and nothing is sent.
    """

    def __init__(self, backend: httpcore2.NetworkBackend) -> None:
        self._pool = httpcore2.ConnectionPool(
            ssl_context=httpx2.create_ssl_context(), network_backend=backend
        )


class _AsyncTransport(httpx2.AsyncHTTPTransport):
    def __init__(self, backend: httpcore2.AsyncNetworkBackend) -> None:
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=httpx2.create_ssl_context(),
            network_backend=backend,
            max_connections=None,  # who sends limits that, so that no host waits for another
            keepalive_expiry=KEEP_SECONDS,
        )


class PublicClient:
    """For one download: ``seconds`` are those of all its requests together."""

    def __init__(self, rules: Rules, *, seconds: float) -> None:
        self._rules = rules
        backend = PublicBackend(rules, Deadline(seconds))
        self._client = httpx2.Client(
            transport=_Transport(backend), trust_env=False, timeout=TIMEOUT, headers=HEADERS
        )

    def __enter__(self) -> "PublicClient":
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._client.close()

    @contextmanager
    def get(self, text: str, headers: Mapping[str, str] | None = None) -> Iterator[httpx2.Response]:
        """The answer at the end of three redirects at most, of any status. Raises a ``NetError``.

        Its body is read with ``chunks_of``.
        """
        url = check_url(text, self._rules)
        for _ in range(1 + MAX_REDIRECTS):
            response = self._send(url, headers)
            try:
                if not response.has_redirect_location:
                    yield response
                    return
                url = next_hop(url, response.headers["location"], self._rules)
            finally:
                response.close()
        raise RedirectNotAllowed(
            f"{httpx2.URL(text).host} redirects more than {MAX_REDIRECTS} times.",
            "Name the address where the redirects end.",
        )

    def _send(self, url: httpx2.URL, headers: Mapping[str, str] | None) -> httpx2.Response:
        with explained(url.host):
            request = self._client.build_request("GET", url, headers=headers)
            return self._client.send(request, stream=True, follow_redirects=False)


def chunks_of(response: httpx2.Response) -> Iterator[bytes]:
    """The bytes as they come, never decompressed. Raises a ``NetError`` where they break off."""
    with explained(response.url.host):
        yield from response.iter_raw()


@contextmanager
def explained(host: str) -> Iterator[None]:
    try:
        yield
    except (httpx2.HTTPError, httpx2.StreamError, TimeoutError) as error:
        raise named(error, host) from error


def next_hop(url: httpx2.URL, location: str, rules: Rules) -> httpx2.URL:
    """Where a redirect leads, if that is allowed: the rules are those of the first URL."""
    try:
        target = url.join(location)
    except (httpx2.InvalidURL, UnicodeError) as error:
        raise RedirectNotAllowed(
            f"{url.host} redirects to what is no URL.", "Name the address where the redirects end."
        ) from error
    if target.scheme != url.scheme:
        raise RedirectNotAllowed(
            f"{url.host} redirects from {url.scheme}: to {target.scheme}:.",
            "Name the address where the redirects end.",
        )
    try:
        return check_url(str(target), rules)
    except NetError as error:
        error.detail = f"{url.host} redirects. {error.detail}"
        raise


@dataclass(frozen=True)
class Answer:
    """``body`` is the beginning of it where there was more."""

    status: int
    headers: httpx2.Headers
    body: bytes


class AsyncPublicClient:
    """For many small requests, such as those of webhooks: no redirects, and answers cut short."""

    def __init__(
        self,
        rules: Rules,
        *,
        seconds: float,
        max_bytes: int = 1 << 16,
        look_ups: Executor | None = None,
    ) -> None:
        """``seconds`` are those of each request, from the look-up to the answer's last byte.

        ``look_ups``: threads in which names are looked up, if not in those of the loop.
        """
        self._rules = rules
        self._seconds = seconds
        self._max_bytes = max_bytes
        self._client = httpx2.AsyncClient(
            transport=_AsyncTransport(AsyncPublicBackend(rules, look_ups)),
            trust_env=False,
            timeout=httpx2.Timeout(seconds),
            headers=HEADERS,
        )

    async def __aenter__(self) -> "AsyncPublicClient":
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._client.aclose()

    async def post(
        self, text: str, content: bytes, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Send once, and follow nothing. Raises a ``NetError``."""
        url = check_url(text, self._rules)
        with explained(url.host):
            async with asyncio.timeout(self._seconds):
                request = self._client.build_request("POST", url, content=content, headers=headers)
                response = await self._client.send(request, stream=True, follow_redirects=False)
                try:
                    body = await _beginning(response.aiter_raw(), self._max_bytes)
                finally:
                    await response.aclose()
        return Answer(response.status_code, response.headers, body)


async def _beginning(chunks: AsyncIterator[bytes], size: int) -> bytes:
    found = bytearray()
    async for chunk in chunks:
        found += chunk
        if len(found) >= size:
            break
    return bytes(found[:size])
