"""What a trainer says to its supervisor: one JSON object a line, on a pipe of their own."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import IO, Any

Message = dict[str, Any]


class PipeReporter:
    """The trainer's end: a ``Reporter`` whose every call is a line."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._pipe: IO[str] = os.fdopen(descriptor, "w", buffering=1, encoding="utf-8")

    def phase(self, name: str) -> None:
        self._send("phase", name=name)

    def rows(self, done: int, total: int | None) -> None:
        self._send("rows", done=done, total=total)

    def preflight(self, report: Mapping[str, Any]) -> None:
        self._send("preflight", report=dict(report))

    def step(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        self._send("step", step=step, total=total, metrics=dict(metrics))

    def held_out(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._send("held_out", step=step, metrics=dict(metrics))

    def event(self, type_: str, message: str, **data: Any) -> None:
        self._send("event", type=type_, message=message, data=data)

    def result(self, result: Mapping[str, Any]) -> None:
        self._send("result", result=dict(result))

    def failed(self, reason: str, message: str, hint: str | None) -> None:
        self._send("failed", reason=reason, message=message, hint=hint)

    def _send(self, kind: str, **values: Any) -> None:
        self._pipe.write(json.dumps({"kind": kind, **values}) + "\n")


def read_messages(descriptor: int) -> Iterator[Message]:
    """The supervisor's end: messages until the trainer closes the pipe or dies."""
    with os.fdopen(descriptor, encoding="utf-8") as pipe:
        for line in pipe:
            if line.endswith("\n"):  # a trainer that is killed may leave half a line
                yield _storable(json.loads(line))


def _storable(value: Any) -> Any:
    """What every database keeps and every client reads: no lone surrogate, no NUL, no NaN.

    A message may quote a row, and a row may hold anything.
    """
    match value:
        case str():
            return value.encode(errors="backslashreplace").decode().replace("\0", "\\0")
        case float() if not math.isfinite(value):
            return None
        case list():
            return [_storable(part) for part in value]
        case dict():
            return {_storable(name): _storable(part) for name, part in value.items()}
    return value
