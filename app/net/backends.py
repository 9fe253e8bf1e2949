"""Connections to public addresses: what httpcore2 opens sockets with.

A name is looked up once per connection. Every address that it stands for must be allowed, as it is
chance which one is taken; the connection then goes to the address that was checked, as a number,
so that there is no second look which could answer otherwise. TLS still asks for the name. Sockets
of this machine's file system are not opened: httpcore2's base classes refuse them.
"""

import asyncio
import socket
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from functools import partial
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import httpcore2

from app.net.errors import AddressNotAllowed, HostNotFound, PortNotAllowed
from app.net.rules import Rules

if TYPE_CHECKING:
    import ssl

    from httpcore2 import SOCKET_OPTION


class Deadline:
    """The end of an exchange, whatever it is that takes so long."""

    def __init__(self, seconds: float) -> None:
        self._ends = time.monotonic() + seconds

    def cut(self, timeout: float | None) -> float:
        """A timeout that ends no later. Raises ``httpcore2.ReadTimeout`` when it is past."""
        left = self._ends - time.monotonic()
        if left <= 0:
            raise httpcore2.ReadTimeout("the time for the whole exchange is over")
        return left if timeout is None else min(timeout, left)


def checked(host: str, port: int, found: Iterable[Any], rules: Rules) -> Sequence[str]:
    """The addresses among the answers of ``getaddrinfo``, if all of them are allowed."""
    if port not in rules.ports:
        raise PortNotAllowed(host, port, rules.ports_told)
    addresses = list(dict.fromkeys(str(answer[4][0]) for answer in found))
    if not addresses:
        raise HostNotFound(host, is_transient=False)
    if not all(rules.admit(ip_address(address)) for address in addresses):
        raise AddressNotAllowed(host)
    return addresses


def _not_found(host: str, error: OSError | UnicodeError) -> HostNotFound:
    again = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
    return HostNotFound(host, is_transient=again)


class PublicBackend(httpcore2.NetworkBackend):
    """For threads. A look-up cannot be interrupted: it takes as long as the system's resolver."""

    def __init__(self, rules: Rules, deadline: Deadline) -> None:
        self._rules = rules
        self._deadline = deadline
        self._sockets = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: "Iterable[SOCKET_OPTION] | None" = None,
    ) -> httpcore2.NetworkStream:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise _not_found(host, error) from error
        *others, last = checked(host, port, found, self._rules)

        def connect(address: str) -> httpcore2.NetworkStream:
            cut = self._deadline.cut(timeout)
            stream = self._sockets.connect_tcp(address, port, cut, local_address, socket_options)
            return _Stream(stream, self._deadline)

        for address in others:
            try:
                return connect(address)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                continue
        return connect(last)


class _Stream(httpcore2.NetworkStream):
    """A stream on which nothing waits for longer than the deadline."""

    def __init__(self, stream: httpcore2.NetworkStream, deadline: Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.cut(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.cut(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: "ssl.SSLContext",
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore2.NetworkStream:
        cut = self._deadline.cut(timeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, cut), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class AsyncPublicBackend(httpcore2.AsyncNetworkBackend):
    """For asyncio, where whoever waits sets the limit of the whole."""

    def __init__(self, rules: Rules, look_ups: Executor | None = None) -> None:
        """``look_ups``: where names are looked up; None: in the loop's own threads."""
        self._rules = rules
        self._look_ups = look_ups
        self._sockets = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the signature of httpcore2
        local_address: str | None = None,
        socket_options: "Iterable[SOCKET_OPTION] | None" = None,
    ) -> httpcore2.AsyncNetworkStream:
        look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._look_ups, look_up)
        except (OSError, UnicodeError) as error:
            raise _not_found(host, error) from error
        *others, last = checked(host, port, found, self._rules)

        async def connect(address: str) -> httpcore2.AsyncNetworkStream:
            return _AsyncStream(
                await self._sockets.connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            )

        for address in others:
            try:
                return await connect(address)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                continue
        return await connect(last)

    async def sleep(self, seconds: float) -> None:
        await self._sockets.sleep(seconds)


class _AsyncStream(httpcore2.AsyncNetworkStream):
    """A stream that is closed also where its handshake is cancelled."""

    def __init__(self, stream: httpcore2.AsyncNetworkStream) -> None:
        self._stream = stream

    async def read(
        self,
        max_bytes: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the signature of httpcore2
    ) -> bytes:
        return await self._stream.read(max_bytes, timeout)

    async def write(
        self,
        buffer: bytes,
        timeout: float | None = None,  # noqa: ASYNC109 - the signature of httpcore2
    ) -> None:
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: "ssl.SSLContext",
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - the signature of httpcore2
    ) -> httpcore2.AsyncNetworkStream:
        try:
            return await self._stream.start_tls(ssl_context, server_hostname, timeout)
        except BaseException:
            await self.aclose()
            raise

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
