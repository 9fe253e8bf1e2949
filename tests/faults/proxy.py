"""A TCP proxy that does to connections what networks do: cut, stall, forget and slow them."""

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field
from enum import Enum, auto
from types import TracebackType
from typing import Any, TypeVar

from tests.faults.procs import reserve_port
from tests.faults.summary import count

CHUNK = 1 << 16
ANSWER_SECONDS = 5  # after which a message that ``cut_after`` waits for is taken as processed

Value = TypeVar("Value")


class Mode(Enum):
    PASS = auto()
    CUT = auto()
    STALL = auto()
    HALF_OPEN = auto()


@dataclass(eq=False)
class Link:
    """A client's connection, and ours to the upstream for it."""

    client: socket.socket
    upstream: socket.socket | None = None
    tasks: list["asyncio.Task[None]"] = field(default_factory=list)
    words: tuple[bytes, ...] = ()
    """For which its client is listened to, and how many of them have come."""
    heard: int = 0
    unheard: bytes = b""
    is_last: bool = False
    """Its answer is the last thing that comes, and it does not pass."""

    def has_sent(self, words: tuple[bytes, ...], data: bytes) -> bool:
        """Whether all the words have come, one after the other; each may come in parts."""
        if words is not self.words:
            self.words, self.heard, self.unheard = words, 0, b""
        self.unheard += data
        while self.heard < len(words):
            word = words[self.heard]
            before, _, after = self.unheard.partition(word)
            if before == self.unheard:
                self.unheard = self.unheard[max(0, len(self.unheard) - len(word) + 1) :]
                return False
            self.heard, self.unheard = self.heard + 1, after
        self.unheard = b""
        return bool(words)


class Proxy:
    """Stands on a port of its own in front of one upstream; that port stays over every fault.

    A fault is in force when its method returns, and until another takes its place:

        pass_through()    everything passes; what a stall has held back goes on where it stood
        cut()             all connections are reset, new ones refused
        stall()           connections stay open and new ones are taken, but no byte passes
        half_open()       the upstream sees its ends closed, clients see nothing, for ever: also
                          not after ``pass_through``, which concerns new connections alone
        slow(n)           n bytes per second, connection and direction
        cut_after(*words) passes; once, a client that has sent the words, one after the other, is
                          reset when the upstream has answered, and the answer is lost

    >>> with Proxy("127.0.0.1", 5432, name="postgres") as proxy:
    ...     proxy.cut_after(b"COMMIT")
    """

    def __init__(self, host: str, port: int, *, name: str = "proxy") -> None:
        self.name = name
        self.faults = 0
        """Injected by this proxy."""
        self._upstream = (host, port)
        self._reserved = reserve_port()
        self.port: int = self._reserved.getsockname()[1]
        self._mode = Mode.PASS
        self._rate = 0.0
        self._words: tuple[bytes, ...] = ()
        self._links: set[Link] = set()
        self._listener: socket.socket | None = None
        self._passing = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy {name}")
        self._thread.daemon = True

    def __enter__(self) -> "Proxy":
        self.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        self._thread.start()
        self.pass_through()

    def close(self) -> None:
        """Reset what is open, and give the port back. May be called twice."""
        if not self._thread.is_alive():
            return
        self._run(self._set(Mode.CUT))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._reserved.close()

    def pass_through(self) -> None:
        self._run(self._set(Mode.PASS))

    def cut(self) -> None:
        self._run(self._set(Mode.CUT))
        self._count("cut")

    def stall(self) -> None:
        self._run(self._set(Mode.STALL))
        self._count("stalled")

    def half_open(self) -> None:
        self._run(self._set(Mode.HALF_OPEN))
        self._count("half open")

    def slow(self, bytes_per_second: float) -> None:
        self._run(self._set(Mode.PASS, rate=bytes_per_second))
        self._count("slowed")

    def cut_after(self, *words: bytes) -> None:
        self._run(self._set(Mode.PASS, words=words))

    @property
    def is_armed(self) -> bool:
        """``cut_after`` still waits for its word."""
        return bool(self._words)

    @property
    def connections(self) -> int:
        """Clients that are connected, as far as they know."""
        return len(self._links)

    def _count(self, what: str) -> None:
        self.faults += 1
        count(f"{self.name} {what}")

    def _run(self, what: Coroutine[Any, Any, Value]) -> Value:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(30)

    # What follows runs in the proxy's own thread.

    async def _set(self, mode: Mode, *, rate: float = 0, words: tuple[bytes, ...] = ()) -> None:
        self._mode, self._rate, self._words = mode, rate, words
        if mode is Mode.PASS:
            self._passing.set()
        else:
            self._passing.clear()
        if mode is Mode.CUT:
            self._refuse()
            for link in list(self._links):
                await self._reset(link)
        elif self._listener is None:
            self._listen()
        if mode is Mode.HALF_OPEN:
            for link in list(self._links):
                await self._forget(link)

    def _listen(self) -> None:
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", self.port))
        self._listener.listen(1024)
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._accept, self._listener)

    def _refuse(self) -> None:
        if self._listener:
            self._loop.remove_reader(self._listener)
            self._listener.close()
        self._listener = None

    def _accept(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except OSError:  # it has gone again
            return
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = Link(client)
        self._links.add(link)
        if self._mode is not Mode.HALF_OPEN:
            link.tasks.append(self._loop.create_task(self._connect(link)))

    async def _connect(self, link: Link) -> None:
        await self._passing.wait()
        upstream = link.upstream = socket.socket()
        upstream.setblocking(False)
        upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await self._loop.sock_connect(upstream, self._upstream)
        except OSError:
            await self._reset(link)
            return
        for pump in (self._ask(link, upstream), self._answer(link, upstream)):
            link.tasks.append(self._loop.create_task(self._until_broken(link, pump)))

    async def _until_broken(self, link: Link, pump: Coroutine[Any, Any, None]) -> None:
        try:
            await pump
        except OSError:
            await self._reset(link)

    async def _ask(self, link: Link, upstream: socket.socket) -> None:
        """From the client to the upstream."""
        while data := await self._loop.sock_recv(link.client, CHUNK):
            await self._passing.wait()
            if link.has_sent(self._words, data):
                self._words, link.is_last = (), True
                link.tasks.append(self._loop.create_task(self._cut_later(link)))
            await self._send(upstream, data)
        await self._passing.wait()
        upstream.shutdown(socket.SHUT_WR)

    async def _answer(self, link: Link, upstream: socket.socket) -> None:
        """From the upstream to the client."""
        while data := await self._loop.sock_recv(upstream, CHUNK):
            await self._passing.wait()
            if link.is_last:
                await self._cut_answered(link)
            await self._send(link.client, data)
        await self._passing.wait()
        await self._reset(link, gently=True)

    async def _send(self, target: socket.socket, data: bytes) -> None:
        while data:
            await self._passing.wait()
            rate = self._rate
            size = max(1, int(rate / 20)) if rate else len(data)
            part, data = data[:size], data[size:]
            await asyncio.sleep(len(part) / rate if rate else 0)
            await self._loop.sock_sendall(target, part)

    async def _cut_later(self, link: Link) -> None:
        await asyncio.sleep(ANSWER_SECONDS)
        await self._cut_answered(link)

    async def _cut_answered(self, link: Link) -> None:
        self._count("cut before the answer")
        await self._reset(link)

    async def _forget(self, link: Link) -> None:
        """The upstream's end closes; the client's stays as it is, and is not read."""
        await _cancel(link.tasks)
        if link.upstream:
            link.upstream.close()

    async def _reset(self, link: Link, *, gently: bool = False) -> None:
        """Close both ends: the client sees a reset, or where the upstream has ended, an end."""
        if link not in self._links:
            return
        self._links.discard(link)
        await _cancel(link.tasks)
        if not gently:  # RST in place of FIN
            link.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        link.client.close()
        if link.upstream:
            link.upstream.close()


async def _cancel(tasks: list["asyncio.Task[None]"]) -> None:
    """Their sockets can be closed when this returns: nobody waits for these any more."""
    others = [task for task in tasks if task is not asyncio.current_task() and not task.done()]
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others)
