"""A dataset's file read by a process of its own (``spool``), with limits.

Whatever the file makes its reader do, this process sees only lines of JSON that our own code has
written, after the file was read to its end.
"""

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from worker.training.config import Data, DataFile
from worker.training.data.conversations import Conversation, RowFormat
from worker.training.data.limits import DISK_FULL, explain_end
from worker.training.data.rows import BadRow
from worker.training.data.sources import Source
from worker.training.data.tally import Tally
from worker.training.errors import DatasetInvalid, DiskFull

MODULE = "worker.training.data.spool"
PASSED_ON = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "TZ")
LISTEN_SECONDS = 0.2
FIXED = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",  # others reserve more than they use
    "ARROW_IO_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Good:
    """A row that is a conversation, and where it stands."""

    place: str
    conversation: Conversation


@dataclass(frozen=True)
class Parsed:
    """What a file turned out to hold.

    Attributes:
        source: Its type and compression.
        format: How its rows were read; None if there is none.
        bad: How many rows are bad.
        complete: Whether it was read to its end, and not given up because of them.
        columns: Names of columns that its rows have, a hundred or so at most.
        rows_found: How many ``rows`` there are.
    """

    source: Source
    format: RowFormat | None
    bad: int
    complete: bool
    columns: set[str]
    rows_found: int
    _spool: IO[bytes]

    def rows(self) -> Iterator[Good | BadRow]:
        """The rows in order: all good ones, and the first thousand bad ones."""
        for line in self._spool:
            row = json.loads(line)
            if "problem" in row:
                yield BadRow(row["place"], row["problem"])
            else:
                yield Good(row["place"], _conversation(row["conversation"]))


@contextmanager
def parse(
    file: DataFile, options: Data, folder: Path | None = None, tally: Tally | None = None
) -> Iterator[Parsed]:
    """Read a file in a process of its own.

    Args:
        file: The local file.
        options: How to read its rows, and how many may be bad.
        folder: Where the rows are kept meanwhile: about as many bytes as the file decompressed. By
            default the system's folder for temporary files. Nothing stays there.
        tally: Counts rows as they are read.

    Raises:
        DatasetInvalid: If the file cannot be read, or not within the limits.
        DiskFull: If the rows find no room.
        Stopped: If somebody wishes so.
    """
    with tempfile.TemporaryFile(dir=folder) as spool:
        with file.path.open("rb"):
            pass  # what is wrong with our own copy is not the dataset's fault
        answer = _run(_request(file, options), spool, folder, tally or Tally())
        if error := json.loads(answer or "{}").get("error"):
            raise DatasetInvalid(error["message"], error["hint"])
        found = json.loads(answer)
        spool.seek(0)
        yield Parsed(
            source=Source(**found["source"]),
            format=found["format"],
            bad=found["bad"],
            complete=found["complete"],
            columns=set(found["columns"]),
            rows_found=found["rows"],
            _spool=spool,
        )


def _request(file: DataFile, options: Data) -> dict[str, Any]:
    return {
        "file": {"uri": file.uri, "path": str(file.path.absolute()), "filename": file.filename},
        "format": None if options.format == "auto" else options.format,
        "mapping": dict(options.mapping or {}),
        "max_bad_rows": options.max_bad_rows,
    }


def _run(request: dict[str, Any], spool: IO[bytes], folder: Path | None, tally: Tally) -> bytes:
    """The answer of the process, which has written the rows."""
    tally.begin()
    command = [sys.executable, "-P", "-m", MODULE, str(spool.fileno())]
    with (
        tempfile.TemporaryFile(dir=folder) as errors,
        subprocess.Popen(  # noqa: S603 - our own module
            command,
            bufsize=0,
            stdin=subprocess.PIPE,  # its end tells the process to leave
            stdout=subprocess.PIPE,
            stderr=errors,
            pass_fds=[spool.fileno()],
            env=_environment(folder),
        ) as process,
    ):
        assert process.stdin
        assert process.stdout
        try:
            with suppress(BrokenPipeError):  # its exit code tells more
                process.stdin.write(json.dumps(request).encode() + b"\n")
            answer = _listen(process.stdout, tally)
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        if code:
            errors.seek(0)
            raise _ended(
                request["file"]["uri"], code, errors.read(1 << 16).decode(errors="replace")
            )
    return answer


def _listen(words: IO[bytes], tally: Tally) -> bytes:
    """The last line that the process says; those before it tell how many rows it has read."""
    answer = b""
    while True:
        tally.proceed()
        if not select.select([words], [], [], LISTEN_SECONDS)[0]:
            continue
        said = words.read(1 << 16)
        if not said:
            return answer
        *lines, answer = (answer + said).split(b"\n")
        for line in lines:
            tally.done = int(line)


def _ended(uri: str, code: int, said: str) -> Exception:
    if code == DISK_FULL:
        return DiskFull()
    if code == 1:  # an exception that nobody foresaw
        return RuntimeError(f"the reader of {uri} failed:\n{said}")
    problem, hint = explain_end(code)
    return DatasetInvalid(f"{uri} cannot be read: {problem}.", hint)


def _environment(folder: Path | None) -> dict[str, str]:
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return passed | FIXED | {"TMPDIR": str(folder or tempfile.gettempdir())}


def _conversation(fields: dict[str, Any]) -> Conversation:
    return Conversation(
        fields["messages"],
        fields.get("tools"),
        frozenset(fields.get("context", ())),
        fields.get("text"),
    )
