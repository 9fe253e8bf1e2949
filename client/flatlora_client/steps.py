"""What an operation wants done, said without doing it.

An operation is a generator: it yields steps, is sent what each of them gave, and returns its
answer. So it is written once; ``sync.py`` and ``asynchronous.py`` only perform the steps.
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import httpx2

T = TypeVar("T")

CHUNK = 1 << 20


@dataclass(frozen=True)
class Request:
    """One request, below the URL of the service."""

    method: str
    path: str
    params: Mapping[str, Any] = field(default_factory=dict)
    json: Any = None
    content: bytes | Path | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    answer_seconds: float | None = None
    """How long the answer may take, if that is not as long as usual."""
    is_repeatable: bool = True
    """Whether it does no harm to send it again when nobody knows if it has arrived."""
    follows_redirects: bool = False


@dataclass
class Stream:
    """An answer whose body is still to come: chunks of bytes, or server-sent events."""

    response: httpx2.Response
    items: Any
    """An iterator, or an asynchronous one."""


@dataclass(frozen=True)
class Send:
    """Gives the whole response."""

    request: Request


@dataclass(frozen=True)
class Open:
    """Gives a stream; that of a refusal has been read."""

    request: Request
    kind: Literal["bytes", "events"]


@dataclass(frozen=True)
class Next:
    """Gives the next item of a stream, and None after the last."""

    stream: Stream


@dataclass(frozen=True)
class Close:
    """Ends a stream before its end; those that are left open end with the operation."""

    stream: Stream


@dataclass(frozen=True)
class Sleep:
    """Lets time pass."""

    seconds: float


@dataclass(frozen=True)
class Do:
    """Gives what a function returns that may take a while: it works on files."""

    function: Callable[[], Any]


@dataclass(frozen=True)
class Emit:
    """Hands an item to whoever iterates."""

    item: Any


Step: TypeAlias = Send | Open | Next | Close | Sleep | Do | Emit
Flow: TypeAlias = Generator[Step, Any, T]


@dataclass(frozen=True)
class Items(Generic[T]):
    """An operation that emits items of this type, and returns nothing."""

    flow: Flow[None]


class Turns:
    """An operation on its way, for whoever performs its steps."""

    def __init__(self, flow: Flow[Any]) -> None:
        self._flow = flow
        self._value: Any = None
        self._error: Exception | None = None
        self.streams: list[Stream] = []
        """Those that are open."""
        self.answer: Any = None
        """What the operation has returned."""

    def next(self) -> Step | None:
        """The next step; None when the operation is over."""
        value, error = self._value, self._error
        self._value = self._error = None
        try:
            return self._flow.throw(error) if error else self._flow.send(value)
        except StopIteration as stop:
            self.answer = stop.value
            return None

    def give(self, value: Any) -> None:
        """Tell the operation what its step gave."""
        self._value = value
        if isinstance(value, Stream):
            self.streams.append(value)

    def fail(self, error: Exception) -> None:
        """Tell the operation that its step failed; most do not mind all errors."""
        self._error = error

    def close(self) -> None:
        """End the operation where it is, with the files that it has open."""
        self._flow.close()


def do(function: Callable[[], T]) -> Flow[T]:
    """As ``yield Do(function)``, with its type."""
    result: T = yield Do(function)
    return result
