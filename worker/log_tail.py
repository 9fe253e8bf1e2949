"""The trainer's log on its way into the database, line by line.

How far each machine's file has been shipped stands in the job's row and is written with the lines,
so that no line comes twice and none is left out, whoever dies when and wherever the job goes on.
"""

import codecs
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import delete
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.sql.dml import UpdateBase

from app.db import now
from app.logs import blot
from app.tables import LogRow
from worker.training.files import replace_text

AT_ONCE_BYTES = 1 << 16
AT_ONCE_LINES = 500
LINE_CHARACTERS = 2000  # a longer one goes on in the next
BEHIND_BYTES = 1 << 20  # what is further back is left out: the newest lines matter most
KEPT_LINES = 20_000  # of a job

BOUND_REACHED = (
    f"[flatlora] More than {KEPT_LINES} lines: from here on the oldest are removed. All of them "
    "are in the job's trainer.log on the worker."
)


@dataclass(frozen=True)
class Batch:
    """Lines that are written together, again and again until they are."""

    job_id: str
    first: int
    lines: list[str]
    logged: dict[str, Any]
    """How far the log is shipped with them: the row's new value."""

    def statements(self, dialect: str) -> Iterator[UpdateBase]:
        insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
        rows = [
            {"job_id": self.job_id, "seq": self.first + number, "at": now(), "text": line}
            for number, line in enumerate(self.lines)
        ]
        # An answer may be lost: these very lines are there then.
        yield insert(LogRow).values(rows).on_conflict_do_nothing()
        if (last := self.logged["lines"]) > KEPT_LINES:
            yield delete(LogRow).where(
                LogRow.job_id == self.job_id, LogRow.seq <= last - KEPT_LINES
            )


class LogTail:
    """Reads on in one job's log.

    Args:
        path: The file on this machine; it need not be there yet.
        job_id: Whose it is.
        logged: What the job's row says: ``{"lines": 12, "files": {"<id of a file>": 3456}}``.
    """

    def __init__(self, path: Path, job_id: str, logged: Mapping[str, Any] | None) -> None:
        self._path = path
        self._job_id = job_id
        self._lines: int = logged["lines"] if logged else 0
        self._files: dict[str, int] = dict(logged["files"]) if logged else {}
        self._id: str | None = None
        self._batch: Batch | None = None
        self._looked = 0
        """Size of the file when there was nothing whole to ship."""

    @property
    def has_more(self) -> bool:
        """There may be lines that are not written yet."""
        with suppress(OSError):
            return self._batch is not None or self._path.stat().st_size not in {
                self._looked,
                self._offset(),
            }
        return False

    def batch(self, *, is_over: bool) -> Batch | None:
        """The next lines, the same ones until ``written`` is called.

        ``is_over``: nothing will follow, so that the last line is whole without its end.
        """
        if self._batch is None:
            with suppress(OSError):  # of this disk; the job has other things to say of that
                self._batch = self._read(is_over=is_over)
        return self._batch

    def written(self) -> None:
        if self._batch:
            self._lines, self._files = self._batch.logged["lines"], self._batch.logged["files"]
            self._batch = None

    def _read(self, *, is_over: bool) -> Batch | None:
        if not self._path.exists():
            return None
        offset, size = self._offset(), self._path.stat().st_size
        lines = []
        with self._path.open("rb") as file:
            if size - offset > BEHIND_BYTES:
                file.seek(size - BEHIND_BYTES)
                file.readline()
                lines.append(f"[flatlora] {file.tell() - offset} bytes of the log are left out.")
                offset = file.tell()
            file.seek(offset)
            found = file.read(AT_ONCE_BYTES)
        data = _whole(found, is_over=is_over and len(found) < AT_ONCE_BYTES)
        if len(found) < AT_ONCE_BYTES and b"\n" not in found[len(data) :]:
            self._looked = size
        if not data:
            return None
        lines += _lines(data)
        if self._lines <= KEPT_LINES < self._lines + len(lines):
            lines.append(BOUND_REACHED)
        files = {**self._files, self._name(): offset + len(data)}
        logged = {"lines": self._lines + len(lines), "files": files}
        return Batch(self._job_id, self._lines + 1, lines, logged)

    def _offset(self) -> int:
        """Up to where this file is shipped. One that is shorter than that has begun anew."""
        offset = self._files.get(self._name(), 0)
        return offset if offset <= self._path.stat().st_size else 0

    def _name(self) -> str:
        """Of this very file: another machine has another one under the same path."""
        if self._id is None:
            named = self._path.with_name(f"{self._path.name}.id")
            if not named.exists():
                replace_text(named, secrets.token_hex(8))
            self._id = named.read_text()
        return self._id


def _whole(data: bytes, *, is_over: bool) -> bytes:
    """Up to the end of a line, if there is one."""
    parts = data.split(b"\n", AT_ONCE_LINES)
    rest = parts[-1]
    if len(parts) <= AT_ONCE_LINES and (is_over or len(rest) == AT_ONCE_BYTES):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(data)
        torn = b"" if is_over else decoder.getstate()[0]  # half a character, for the next time
        return data[: len(data) - len(torn)]
    return data[: len(data) - len(rest)]


def _lines(data: bytes) -> Iterator[str]:
    """As a terminal shows them: of what a progress bar has written over itself, the last."""
    text = blot(data.decode(errors="replace")).replace("\0", "\\0")
    for line in text.removesuffix("\n").split("\n"):
        shown = line.rstrip("\r").rpartition("\r")[2]
        for start in range(0, max(1, len(shown)), LINE_CHARACTERS):
            yield shown[start : start + LINE_CHARACTERS]
