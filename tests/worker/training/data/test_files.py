"""A file of any type and compression is read whole, or it is said why not."""

import contextlib
import gzip
import io
import json
import re
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.worker.training.conftest import ROWS, chat
from worker.training.config import Data, DataFile
from worker.training.data.conversations import Conversation
from worker.training.data.dataset import read
from worker.training.errors import DatasetInvalid, JobError

Write = Callable[..., DataFile]

FIVE = ROWS[:5]
GOOD = json.dumps(chat("Hello", "Hi")).encode()

# Rows that hardly compress, so that frames end where a test cuts them.
ZSTD = zstandard.compress(
    b"".join(json.dumps(chat(f"{n * n * n}", f"{n**5}")).encode() + b"\n" for n in range(9000))
)


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

    def test_a_date_of_parquet_out_of_range_spoils_its_row_alone(self, data_file: Write) -> None:
        days = pa.array([0, 2**53], pa.timestamp("ms"))
        texts = pa.array(["a", "b"])
        content = parquet_of(pa.table({"prompt": texts, "completion": texts, "day": days}))
        with pytest.raises(DatasetInvalid, match="row 2: cannot be read: "):
            read(data_file(content, "rows.parquet"), Data())

    def test_damage_anywhere_in_parquet_is_told(self, data_file: Write) -> None:
        whole = parquet([{"prompt": "a" * 50, "completion": "b"}] * 50)
        for place in range(4, len(whole) - 4, 31):
            content = bytearray(whole)
            content[place] ^= 0xA5
            with contextlib.suppress(JobError):
                read(data_file(bytes(content), "rows.parquet"), Data(max_bad_rows=99))
