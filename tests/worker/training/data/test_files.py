"""A file of any type and compression is read whole, or it is said why not."""

import contextlib
import gzip
import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.worker.training.conftest import ROWS, chat
from tests.worker.training.data.kept import read
from tests.worker.training.data.measured import Measured
from worker.training.config import Data, DataFile
from worker.training.data.conversations import Conversation
from worker.training.data.parsing import parse
from worker.training.data.rows import read_rows
from worker.training.data.sources import recognise_file
from worker.training.errors import DatasetInvalid, JobError

Write = Callable[..., DataFile]

FIVE = ROWS[:5]
GOOD = json.dumps(chat("Hello", "Hi")).encode()
TURN = [{"role": "user", "content": "x"}]

# Rows that hardly compress, so that frames end where a test cuts them.
ZSTD = zstandard.compress(
    b"".join(json.dumps(chat(f"{n * n * n}", f"{n**5}")).encode() + b"\n" for n in range(9000))
)


def problem(file: DataFile) -> str:
    with pytest.raises(DatasetInvalid) as caught:
        read(file, Data())
    return caught.value.message


def damaged_parquet() -> bytes:
    content = bytearray(parquet([{"prompt": "a" * 50, "completion": "b"}] * 50))
    content[10:60] = b"\xff" * 50
    return bytes(content)


def parquet(rows: list[Any]) -> bytes:
    return parquet_of(pa.Table.from_pylist(rows))


def parquet_of(table: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "rows.jsonl": lambda: b"\n".join(json.dumps(row).encode() for row in FIVE),
    "rows.json": lambda: json.dumps(FIVE).encode(),
    "rows.parquet": lambda: parquet(FIVE),
}
COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
}

GZIP = gzip.compress(GOOD * 9000)
UNREADABLE: dict[str, tuple[bytes, str, str]] = {
    "no bytes": (b"", "rows.jsonl", "is empty"),
    "blanks": (b" \n \n", "rows.jsonl", "is empty"),
    "no type": (b"hello", "rows", "none of JSONL, a JSON array, CSV, TSV and Parquet"),
    "half an array": (b"[1,", "rows.json", "not a JSON array"),
    "an empty array": (b"[]", "rows.json", "file:rows.json has no rows"),
    "another type": (b"PAR1", "rows.jsonl", "named as jsonl and begins like parquet"),
    "an open quote": (b'prompt,completion\n"open', "rows.csv", "cannot be read at line 2"),
    "no Parquet": (b"PAR1 and no more", "rows.parquet", "cannot be read as Parquet after row 0"),
    "damaged Parquet": (damaged_parquet(), "rows.parquet", "cannot be read as Parquet after row 0"),
    "no gzip": (b"no gzip", "rows.jsonl.gz", "is not gzip"),
    "half of a gzip": (GZIP[:-40], "rows.jsonl.gz", "gzip data end too early"),
    "a gzip without its end": (GZIP[:-1], "rows.jsonl.gz", "gzip data end too early"),
    "a damaged gzip": (GZIP[:20] + b"\xff" * 40 + GZIP[60:], "rows.jsonl.gz", "is not gzip"),
    "no zstd": (b"no zstd", "rows.jsonl.zst", "is not zstd"),
    "half of a zstd": (ZSTD[: len(ZSTD) // 2], "rows.jsonl.zst", "zstd data end too early"),
    "a zstd without its end": (ZSTD[:-1], "rows.jsonl.zst", "zstd data end too early"),
    "half of a zstd header": (ZSTD[:3], "rows.jsonl.zst", "zstd data end too early"),
    "half of a second frame": (ZSTD + ZSTD[:-1], "rows.jsonl.zst", "zstd data end too early"),
}


class TestFiles:
    @pytest.mark.parametrize("suffix", COMPRESSED)
    @pytest.mark.parametrize("filename", FILES)
    def test_each_type_and_compression_gives_the_same_conversations(
        self, data_file: Write, filename: str, suffix: str
    ) -> None:
        content = COMPRESSED[suffix](FILES[filename]())
        found = read(data_file(content, filename + suffix), Data())
        assert found.conversations == [Conversation(row["messages"]) for row in FIVE]
        assert found.source.type == filename.removeprefix("rows.")

    @pytest.mark.parametrize("suffix", COMPRESSED)
    def test_csv_holds_prompts_and_completions(self, data_file: Write, suffix: str) -> None:
        content = b'\xef\xbb\xbfprompt,completion\n"two\nlines","says ""hi"""\nplain,answer\n'
        found = read(data_file(COMPRESSED[suffix](content), "rows.csv" + suffix), Data())
        assert found.format == "prompt_completion"
        assert found.conversations[0].messages[0]["content"] == "two\nlines"
        assert found.conversations[0].messages[1]["content"] == 'says "hi"'

    @pytest.mark.parametrize("suffix", COMPRESSED)
    def test_tsv_is_csv_with_tabs(self, data_file: Write, suffix: str) -> None:
        content = b'prompt\tcompletion\n"two\nlines"\t"a, b"\nplain\tanswer\n'
        found = read(data_file(COMPRESSED[suffix](content), "rows.tsv" + suffix), Data())
        assert found.source.type == "tsv"
        assert found.conversations == [
            Conversation(chat("two\nlines", "a, b")["messages"]),
            Conversation(chat("plain", "answer")["messages"]),
        ]

    def test_frames_of_zstd_follow_one_another(self, data_file: Write) -> None:
        skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"note"
        frames = [zstandard.compress(json.dumps(row).encode() + b"\n") for row in FIVE]
        content = skippable + frames[0] + skippable + b"".join(frames[1:]) + skippable
        found = read(data_file(content, "rows.jsonl.zst"), Data())
        assert len(found.conversations) == 5

    def test_a_long_zstd_file_is_read_whole(self, data_file: Write) -> None:
        assert len(read(data_file(ZSTD, "rows.jsonl.zst"), Data()).conversations) == 9000

    def test_lines_that_are_named_as_an_array_are_recognised(self, data_file: Write) -> None:
        assert read(data_file(FILES["rows.jsonl"](), "rows.json"), Data()).source.type == "jsonl"

    def test_a_name_without_a_type_is_recognised_by_its_content(self, data_file: Write) -> None:
        assert read(data_file(FILES["rows.parquet"](), "upload"), Data()).source.type == "parquet"

    @pytest.mark.parametrize("name", UNREADABLE)
    def test_a_file_that_cannot_be_read_says_why(self, data_file: Write, name: str) -> None:
        content, filename, words = UNREADABLE[name]
        with pytest.raises(DatasetInvalid, match=re.escape(words)):
            read(data_file(content, filename), Data())


class TestParquet:
    def test_a_string_of_parquet_that_is_not_utf8_spoils_its_row_alone(
        self, data_file: Write
    ) -> None:
        texts = pa.array([b"fine", b"\xff\xfe", b"also"], pa.binary())
        column = pa.StringArray.from_buffers(3, texts.buffers()[1], texts.buffers()[2])
        content = parquet_of(pa.table({"prompt": column, "completion": pa.array(["a", "b", "c"])}))
        found = read(data_file(content, "rows.parquet"), Data(max_bad_rows=1))
        assert len(found.conversations) == 2
        assert found.bad_rows[0].place == "row 2"
        assert "can't decode byte 0xff" in found.bad_rows[0].problem

    DAYS = pa.array([0, 2**53], pa.timestamp("ms"))

    def test_a_date_of_parquet_out_of_range_spoils_its_row_alone(self, data_file: Write) -> None:
        texts = pa.array(["a", "b"])
        content = parquet_of(pa.table({"prompt": self.DAYS, "completion": texts}))
        message = problem(data_file(content, "rows.parquet"))
        assert "row 1: prompt: expected a non-empty string, found datetime" in message
        assert "row 2: cannot be read: " in message

    def test_a_column_of_parquet_that_nobody_wants_is_not_read(self, data_file: Write) -> None:
        texts = pa.array(["a", "b"])
        content = parquet_of(pa.table({"prompt": texts, "day": self.DAYS, "answer": texts}))
        file = data_file(content, "rows.parquet")
        assert read(file, Data(mapping={"completion": "answer"})).rows == 2
        assert problem(file).endswith("found prompt, day, answer.")

    def test_fields_that_only_other_rows_have_are_left_out(self, data_file: Write) -> None:
        calls = [{"function": {"name": "f", "arguments": {name: 1}}} for name in "xy"]
        rows = [
            {"messages": [*chat("Q", "A")["messages"], {"role": "user", "content": "x"}]},
            *({"messages": [*TURN, {"role": "assistant", "tool_calls": [call]}]} for call in calls),
        ]
        found = read(data_file(parquet(rows), "rows.parquet"), Data()).conversations
        assert found[0] == Conversation(rows[0]["messages"])
        assert [row.messages[1]["tool_calls"] for row in found[1:]] == [[call] for call in calls]

    def test_damage_anywhere_in_parquet_is_told(self, data_file: Write) -> None:
        whole = parquet([{"prompt": "a" * 50, "completion": "b"}] * 50)
        for place in range(4, len(whole) - 4, 31):
            content = bytearray(whole)
            content[place] ^= 0xA5
            file = data_file(bytes(content), "rows.parquet")
            with contextlib.suppress(JobError, MemoryError):
                list(read_rows(file, recognise_file(file), {"prompt", "completion"}))

    def test_a_large_row_group_is_read_page_by_page(
        self, data_file: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        letters = random.Random(0).randbytes(1 << 16).hex()
        texts = pa.array([letters[n : n + 1000] for n in range(30_000)])
        table = pa.table({"prompt": texts, "completion": texts[::-1]})
        file = data_file(parquet_of(table), "rows.parquet")
        group = pq.ParquetFile(file.path).metadata.row_group(0)
        assert group.total_byte_size > 56 << 20
        measured = Measured(tmp_path)
        monkeypatch.setattr("sys.executable", str(measured.python))
        with parse(file, Data()) as found:
            assert (found.format, found.bad, found.complete) == ("prompt_completion", 0, True)
        assert measured.usage().peak_bytes < 100e6


class TestArrays:
    """A JSON array is read row by row."""

    def test_rows_are_found_wherever_a_chunk_ends(self, data_file: Write) -> None:
        rows = [chat(f"{n}\u00e9\U0001f600" * 400, f"{n}") for n in range(2400)]
        text = json.dumps(rows, ensure_ascii=False, indent=1)
        content = "\ufeff" + text.replace("{", "\n \t{")
        assert len(content.encode()) > 8 << 20
        found = read(data_file(content.encode(), "rows.json"), Data())
        assert found.conversations == [Conversation(row["messages"]) for row in rows]

    def test_a_long_row_is_named_and_the_next_ones_are_read(self, data_file: Write) -> None:
        rows = [*FIVE, chat("x" * (1 << 20), "y"), *FIVE]
        message = problem(data_file(json.dumps(rows).encode(), "rows.json"))
        assert message.startswith("1 of 11 rows")
        assert "row 6: longer than 1,048,576 bytes" in message

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b'"abc"', "it does not begin with ["),
            (b"[{},\n{}\n", "expected , or ] after row 2, found its end (line 3)"),
            (b"[{}\n{}]", "expected , or ] after row 1, found '{' (line 2)"),
            (b"[{},\n]", "row 2: not JSON: Expecting value at column 1 (line 2)"),
            (b"[{}]\n\n[{}]", "more follows its end (line 3)"),
            (b'[{},\n{"a" 1}]', "row 2: not JSON: Expecting ':' delimiter at column 6 (line 2)"),
            (b'[{"a": NaN}]', "row 1: NaN is not JSON (line 1)"),
            (b'[{"a": "' + b"x" * (6 << 20), "row 1 is longer than 1,048,576 bytes"),
            (b'[{"a": "x', "row 1: not JSON: Unterminated string starting at at column 8"),
            (b'[{"a": ' + b"[" * 9999, "row 1: not JSON: nested too deeply"),
        ],
    )
    def test_what_is_no_array_is_named_by_its_line(
        self, data_file: Write, content: bytes, words: str
    ) -> None:
        assert words in problem(data_file(content, "rows.json"))

    def test_a_byte_that_is_not_utf_8_is_counted(self, data_file: Write) -> None:
        row = b'{"prompt": "\xc3\xa9", "completion": "' + b"a" * 5000 + b'"},\n'
        content = b"\xef\xbb\xbf[" + row * 2000 + b'"\xff"]'
        message = problem(data_file(content, "rows.json"))
        assert f"is not UTF-8: byte {content.index(0xFF):,}." in message


def test_a_byte_order_mark_before_a_quoted_header_is_no_part_of_it(data_file: Write) -> None:
    content = '\ufeff"instruction","output"\n"Hello","Hi"\n'.encode()
    found = read(data_file(content, "rows.csv"), Data())
    assert (found.format, len(found.conversations)) == ("alpaca", 1)
