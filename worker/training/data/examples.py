"""Rendered rows: of however many there are, memory holds where each begins, and disk its tokens."""

import tempfile
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, overload

import numpy as np
from jaxtyping import Bool, Int32, Int64, Shaped

BUFFER_BYTES = 1 << 18


@dataclass(frozen=True)
class Example:
    """One row as the model sees it."""

    ids: Int32[np.ndarray, " length"]
    in_loss: Bool[np.ndarray, " length"]

    @property
    def targets(self) -> int:
        """Tokens that the loss is taken on. The first token of a row is never predicted."""
        return int(self.in_loss[1:].sum())

    def cut(self, max_length: int) -> "Example":
        """The first ``max_length`` tokens."""
        return Example(self.ids[:max_length], self.in_loss[:max_length])


class Examples(Sequence[Example]):
    """Rows that lie end to end in two arrays; each is an ``Example`` while it is looked at.

    Args:
        ids: Tokens of all rows.
        in_loss: Whether the loss is taken on each.
        ends: Where each row ends.
        targets: How many of its tokens are predicted.
        chosen: Which of the rows these are, in order. None: all.
    """

    def __init__(
        self,
        ids: Int32[np.ndarray, " tokens"],
        in_loss: Bool[np.ndarray, " tokens"],
        ends: Int64[np.ndarray, " rows"],
        targets: Int32[np.ndarray, " rows"],
        chosen: Int64[np.ndarray, " chosen"] | None = None,
    ) -> None:
        self._ids, self._in_loss, self._ends, self._targets = ids, in_loss, ends, targets
        self._chosen = np.arange(len(ends)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Examples": ...
    def __getitem__(self, index: int | slice) -> "Example | Examples":
        if isinstance(index, slice):
            return self.chosen(np.arange(len(self))[index])
        row = self._chosen[index]
        start, end = (self._ends[row - 1] if row else 0), self._ends[row]
        return Example(self._ids[start:end], self._in_loss[start:end])

    def chosen(self, rows: Int64[np.ndarray, " some"]) -> "Examples":
        """Some of these rows, by their indices."""
        return Examples(self._ids, self._in_loss, self._ends, self._targets, self._chosen[rows])

    @property
    def lengths(self) -> Int64[np.ndarray, " rows"]:
        """Tokens of each row."""
        starts = np.append(0, self._ends[:-1])
        found: Int64[np.ndarray, " rows"] = (self._ends - starts)[self._chosen]
        return found

    @property
    def targets(self) -> Int64[np.ndarray, " rows"]:
        """Tokens of each row that the loss is taken on."""
        return self._targets[self._chosen].astype(np.int64)


def lengths_of(rows: Sequence[Example]) -> Int64[np.ndarray, " rows"]:
    """Tokens of each row."""
    if isinstance(rows, Examples):
        return rows.lengths
    return np.array([len(row.ids) for row in rows], dtype=np.int64)


def targets_of(rows: Sequence[Example]) -> Int64[np.ndarray, " rows"]:
    """Tokens of each row that the loss is taken on."""
    if isinstance(rows, Examples):
        return rows.targets
    return np.array([row.targets for row in rows], dtype=np.int64)


class ExampleWriter:
    """Takes rows one by one, and gives them back together before the block is left.

    Args:
        folder: Where tokens are kept, five bytes each, until nobody refers to the rows any more. By
            default the system's folder for temporary files. No name in it is seen.
    """

    def __init__(self, folder: Path | None = None) -> None:
        with ExitStack() as files:
            self._ids, self._in_loss = (
                files.enter_context(tempfile.TemporaryFile(dir=folder, buffering=BUFFER_BYTES))
                for _ in range(2)
            )
            self._files = files.pop_all()
        self._ends = array("q")
        self._targets = array("i")
        self._tokens = 0

    def __enter__(self) -> "ExampleWriter":
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._files.close()

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, example: Example) -> None:
        """Add one row.

        Raises:
            OSError: If the disk is full.
        """
        self._ids.write(example.ids.astype(np.int32, copy=False).tobytes())
        self._in_loss.write(example.in_loss.tobytes())
        self._tokens += len(example.ids)
        self._ends.append(self._tokens)
        self._targets.append(example.targets)

    def rows(self) -> Examples:
        """All rows, in the order in which they came."""
        return Examples(
            _mapped(self._ids, np.int32),
            _mapped(self._in_loss, np.bool_),
            np.frombuffer(self._ends, np.int64),
            np.frombuffer(self._targets, np.int32),
        )


def _mapped(file: IO[bytes], dtype: Any) -> Shaped[np.ndarray, " tokens"]:
    """A file's bytes as an array that the system reads, and forgets, as memory allows."""
    file.flush()
    if not file.tell():
        return np.empty(0, dtype)
    return np.asarray(np.memmap(file, dtype, mode="r+"))  # which outlives the file
