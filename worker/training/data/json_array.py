"""A JSON array read row by row: of a file of any size, a few rows are in memory."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO

from worker.training.config import DataFile
from worker.training.data.rows import (
    MAX_ROW_BYTES,
    TOO_LONG,
    BadRow,
    Row,
    as_row,
    json_problem,
    refuse_constant,
)
from worker.training.errors import DatasetInvalid

READ_BYTES = 4 * MAX_ROW_BYTES
BLANKS = re.compile(r"[ \t\n\r]*")
CUT_SHORT = 16  # characters within which an error at the end of what is in sight may lie


def read_json_array(stream: IO[bytes], file: DataFile) -> Iterator[Row | BadRow]:
    """The rows of an array.

    Raises:
        DatasetInvalid: Where it is no array of JSON any more. What follows cannot be read: nobody
            knows where the next row would begin.
    """
    text = _Text(stream, file)
    if text.next() != "[":
        raise text.broken("it does not begin with [")
    text.at += 1
    number = 0
    closed = text.next() == "]"
    while not closed:
        number += 1
        yield text.row(f"row {number}")
        if (after := text.next()) not in (",", "]"):
            found = repr(after) if after else "its end"
            raise text.broken(f"expected , or ] after row {number}, found {found}")
        text.at += after == ","
        closed = after == "]"
    text.at += 1
    if text.next():
        raise text.broken("more follows its end")


class _Text:
    """The text from one place on; a whole row of it is always in sight."""

    def __init__(self, stream: IO[bytes], file: DataFile) -> None:
        self._stream = stream
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._rows = json.JSONDecoder(parse_constant=refuse_constant)
        self._text = ""
        self._bytes = 0
        self._lines_before = 0
        self._has_ended = False
        self.at = 0

    def next(self) -> str:
        """The next character that is not blank, ``at`` which it goes on; empty at the end."""
        while True:
            self._look_ahead()
            self.at = BLANKS.match(self._text, self.at).end()  # type: ignore[union-attr] # fits any
            if self.at < len(self._text) or self._has_ended:
                return self._text[self.at : self.at + 1]

    def row(self, place: str) -> Row | BadRow:
        """The value here, which is left behind."""
        self.next()
        self._look_ahead()
        begin = self.at
        try:
            value, self.at = self._rows.raw_decode(self._text, begin)
        except (ValueError, RecursionError) as error:
            raise self._broken_row(place, error) from error
        if self._is_too_long(begin, self.at):
            return BadRow(place, TOO_LONG)
        return as_row(value, place)

    def broken(self, problem: str) -> DatasetInvalid:
        """What is said of an array that ends here."""
        line = self._lines_before + self._text.count("\n", 0, self.at) + 1
        return DatasetInvalid(
            f"{self._file.uri} is not a JSON array: {problem} (line {line}).",
            "One broken row spoils a JSON array; JSONL keeps rows apart.",
        )

    def _broken_row(self, place: str, error: ValueError | RecursionError) -> DatasetInvalid:
        if not isinstance(error, json.JSONDecodeError):
            return self.broken(f"{place}: {json_problem(error)}")
        is_cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - CUT_SHORT
        if is_cut and not self._has_ended:
            return self.broken(f"{place} is {TOO_LONG}")
        self.at = error.pos
        return self.broken(f"{place}: {json_problem(error)}")

    def _is_too_long(self, begin: int, end: int) -> bool:
        if end - begin <= MAX_ROW_BYTES // 4:  # a character is four bytes at most
            return False
        return len(self._text[begin:end].encode(errors="surrogatepass")) > MAX_ROW_BYTES

    def _look_ahead(self) -> None:
        while len(self._text) - self.at <= MAX_ROW_BYTES and not self._has_ended:
            self._lines_before += self._text.count("\n", 0, self.at)
            self._text = self._text[self.at :] + self._read()
            self.at = 0

    def _read(self) -> str:
        chunk = self._stream.read(READ_BYTES)
        pending, _ = self._decoder.getstate()
        try:
            text = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            place = self._bytes - len(pending) + error.start
            raise DatasetInvalid(
                f"{self._file.uri} is not UTF-8: byte {place:,}.", "Save it as UTF-8."
            ) from error
        if not self._bytes:
            text = text.removeprefix("\ufeff")
        self._bytes += len(chunk)
        self._has_ended = not chunk
        return text
