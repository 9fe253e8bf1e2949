"""The process that reads a dataset's file: what is in the file may be made to harm its reader.

    python -P -m worker.training.data.spool 5 <request

It runs with limits, knows neither torch nor a tokenizer, and writes to descriptor 5 one line of
JSON for each row: ``{"place", "conversation"}`` or ``{"place", "problem"}``. Its standard output is
a line now and then, of how many rows it has read; and at last one object: what the file is and how
many rows are bad, or the error that ends the job.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

from worker.training.config import DataFile
from worker.training.data.conversations import (
    Conversation,
    RowFormat,
    known_columns,
    recognise_format,
    to_conversation,
)
from worker.training.data.limits import (
    DISK_FULL,
    OUT_OF_MEMORY,
    die_with_parent,
    leave_no_core,
    limit_memory,
    proceed,
)
from worker.training.data.messages import RowProblem
from worker.training.data.rows import (
    BAD_ROWS_BEYOND,
    BAD_ROWS_KEPT,
    BadRow,
    Overflow,
    Row,
    read_rows,
)
from worker.training.data.sources import (
    GROWTH,
    Source,
    check_compressed,
    most_bytes,
    recognise_file,
)
from worker.training.errors import DatasetInvalid, is_disk_full

NAMES_KEPT = 100
NAME_LETTERS = 100
TELL_SECONDS = 0.3


class Spool:
    """Rows on their way to the parent, and what is counted of them.

    Args:
        out: Where the lines go.
        row_format: How rows are read; None: as the first one shows.
        mapping: Columns to rename.
        allowed: How many rows may be bad.
        most: Bytes that may be written at all.
    """

    def __init__(
        self,
        out: IO[bytes],
        row_format: RowFormat | None,
        mapping: dict[str, str],
        allowed: int,
        most: int | None,
    ) -> None:
        self._out = out
        self.format = row_format
        self._mapping = mapping
        self._allowed = allowed
        self._most = most
        self._written = 0
        self.lines = 0
        self.bad = 0
        self.columns: set[str] = set()

    @property
    def is_hopeless(self) -> bool:
        """Whether so many rows are bad that the others do not matter."""
        return self.bad > self._allowed + BAD_ROWS_BEYOND

    def put(self, row: Row | BadRow) -> None:
        """Write one row, good or bad."""
        if isinstance(row, BadRow):
            self._put_problem(row.place, row.problem)
            return
        if len(self.columns) < NAMES_KEPT:
            self.columns |= {name[:NAME_LETTERS] for name in row.values}
        elif self._mapping:
            self.columns |= row.values.keys() & self._mapping.values()
        try:
            self.format = self.format or recognise_format(row.values, self._mapping)
            conversation = to_conversation(row.values, self.format, self._mapping)
        except RowProblem as problem:
            self._put_problem(row.place, str(problem))
        else:
            self._write({"place": row.place, "conversation": as_json(conversation)})

    def _put_problem(self, place: str, problem: str) -> None:
        self.bad += 1
        if self.bad <= BAD_ROWS_KEPT:
            self._write({"place": place, "problem": problem})

    def _write(self, line: dict[str, Any]) -> None:
        content = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        self._out.write(content)
        self._written += len(content)
        self.lines += 1
        if self._most is not None and self._written > self._most:
            raise Overflow


def as_json(conversation: Conversation) -> dict[str, Any]:
    """A conversation's fields, without those that say nothing."""
    if conversation.text is not None:
        return {"messages": [], "text": conversation.text}
    fields: dict[str, Any] = {"messages": conversation.messages}
    if conversation.tools is not None:
        fields["tools"] = conversation.tools
    if conversation.context:
        fields["context"] = sorted(conversation.context)
    return fields


def spool(request: dict[str, Any], out: IO[bytes]) -> dict[str, Any]:
    """Read a file to its end.

    Args:
        request: ``file`` (the fields of a ``DataFile``), ``format``, ``mapping``, ``max_bad_rows``.
        out: Where the rows go.

    Returns:
        What the file is: source, format, bad, complete, columns, rows (lines written).

    Raises:
        DatasetInvalid: If the file cannot be read.
    """
    named = request["file"]
    file = DataFile(named["uri"], Path(named["path"]), named["filename"], "")
    source = recognise_file(file)
    if source.compression:
        check_compressed(file, source.compression, proceed)
    if source.type == "parquet":
        import pyarrow.parquet  # noqa: F401 - its own memory is not the file's

        limit_memory()
    mapping = request["mapping"]
    most = most_bytes(file) if source.type == "parquet" else None
    rows = Spool(out, request["format"], mapping, request["max_bad_rows"], most)
    try:
        _read_all(file, source, rows, known_columns(rows.format) | set(mapping.values()))
    except Overflow:
        raise DatasetInvalid(
            f"{file.uri} decodes to more than {most_bytes(file) >> 20:,} MiB of rows: more than "
            f"{GROWTH} times its size.",
            "If these are your rows, write them as JSONL.",
        ) from None
    return {
        "source": {"type": source.type, "compression": source.compression},
        "format": rows.format,
        "bad": rows.bad,
        "complete": not rows.is_hopeless,
        "columns": sorted(rows.columns),
        "rows": rows.lines,
    }


def _read_all(file: DataFile, source: Source, rows: Spool, wanted: set[str]) -> None:
    tell_at = time.monotonic()
    for done, row in enumerate(read_rows(file, source, wanted, proceed), 1):
        rows.put(row)
        if rows.is_hopeless:
            return
        proceed()
        if time.monotonic() >= tell_at:
            tell_at = time.monotonic() + TELL_SECONDS
            sys.stdout.write(f"{done}\n")
            sys.stdout.flush()


def main() -> None:
    """Serve one request."""
    leave_no_core()
    request = json.loads(sys.stdin.buffer.readline())
    die_with_parent()
    limit_memory()
    proceed()
    try:
        with open(int(sys.argv[1]), "wb", buffering=1 << 18) as out:  # noqa: PTH123 - a descriptor
            result = spool(request, out)
    except DatasetInvalid as error:
        result = {"error": {"message": error.message, "hint": error.hint}}
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except OSError as error:
        if not is_disk_full(error):
            raise
        os._exit(DISK_FULL)
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
