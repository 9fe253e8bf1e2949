"""A file that is made to harm its reader ends as a bad dataset: soon, and in little memory."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.worker.training.canary import pickled
from tests.worker.training.data.kept import read
from tests.worker.training.data.measured import Measured
from worker.training.config import Data, DataFile
from worker.training.data.limits import explain_end
from worker.training.data.parsing import parse
from worker.training.errors import DatasetInvalid

MAX_SECONDS = 10
MAX_BYTES = 200e6

MIB = 1 << 20
ROW = b'{"prompt": "a", "completion": "b"}\n'
DEEP = 500_000
IN_GZIP = "more than 100 times as much"


def gzipped(block: bytes, times: int, start: bytes = b"") -> bytes:
    """The same block many times over, a member of the gzip file each."""
    return gzip.compress(start) + gzip.compress(block) * times


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **options)
    return buffer.getvalue()


@dataclass(frozen=True)
class Gigabyte:
    """A file of that length that takes no room on the disk: zeros after its first bytes."""

    start: bytes


def call(arguments: str) -> bytes:
    calls = [{"function": {"name": "f", "arguments": arguments}}]
    answer = {"role": "assistant", "content": "", "tool_calls": calls}
    return json.dumps({"messages": [{"role": "user", "content": "x"}, answer]}).encode()


def rows_of_nothing() -> bytes:
    """Ten million rows in some thousands of bytes: one word, and how often it comes."""
    words = pa.DictionaryArray.from_arrays(pa.nulls(10**7, pa.int32()).fill_null(0), ["a"])
    return parquet({"prompt": words, "completion": words}, row_group_size=10**7)


def rows_of_one_word(rows: int, size: int) -> bytes:
    words = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), ["x" * size])
    return parquet({"prompt": words, "completion": words}, compression="zstd")


def list_of_nothing() -> bytes:
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    nulls = pa.nulls(3 * 10**7, message)
    lists = pa.ListArray.from_arrays(pa.array([0, len(nulls)], pa.int32()), nulls)
    return parquet({"messages": lists})


def nested_type(depth: int) -> bytes:
    type_ = pa.string()
    for _ in range(depth):
        type_ = pa.struct([("a", type_)])
    return parquet({"messages": pa.array([None], type_)})


def page_of_two_gigabytes() -> bytes:
    """A page's header begins with its kind, then its two sizes as variable-length integers."""
    content = parquet({"prompt": ["a"], "completion": ["b"]}, compression="none")
    sizes = []
    at = 6
    for _ in range(2):
        assert content[at] == 0x15
        end = next(i for i in range(at + 1, len(content)) if content[i] < 0x80) + 1
        sizes.append((at + 1, end))
        at = end
    (_, first), (_, second) = sizes
    claim = b"\x15\xfe\xff\xff\xff\x0f"
    assert first < second
    return content[:6] + claim + claim + content[second:]


def page_of_one_letter(columns: int, size: int) -> bytes:
    """A page of so many megabytes in each of some columns."""
    words = ["x" * 10_000] * (100 * size)
    options = {"use_dictionary": False, "data_page_size": 1 << 30, "compression": "zstd"}
    return parquet(dict.fromkeys(["prompt", "completion"][:columns], words), **options)


def large_by_its_own_account() -> bytes:
    """The footer says of each chunk, as a number of four bytes, that it has 100 MiB."""
    word = "x" * 9_999_990
    content = parquet({"prompt": [word], "completion": [word]}, compression="none")
    size = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(0).column(0)
    claimed = _varint(2 * size.total_uncompressed_size)
    small = content.replace(word.encode(), b"")
    assert small.count(claimed) > 1
    return small.replace(claimed, _varint(2 * 100 * MIB))


def _varint(number: int) -> bytes:
    """As Thrift writes it."""
    found = b""
    while number > 0x7F:
        found += bytes([number & 0x7F | 0x80])
        number >>= 7
    return found + bytes([number])


def damaged_footer() -> bytes:
    content = parquet({"prompt": ["a"] * 50, "completion": ["b"] * 50})
    return content[:-200] + b"\xff" * 192 + content[-8:]


HOSTILE: dict[str, tuple[str, Callable[[], bytes | Gigabyte], str]] = {
    "zeros in gzip": ("a.jsonl.gz", lambda: gzipped(bytes(32 * MIB), 80), IN_GZIP),
    "line breaks in gzip": (
        "a.jsonl.gz",
        lambda: gzipped(b"\n" * (32 * MIB), 80, b"{}\n"),
        IN_GZIP,
    ),
    "tiny rows in gzip": ("a.jsonl.gz", lambda: gzipped(ROW * MIB, 80), IN_GZIP),
    "tiny rows of a table in gzip": (
        "a.csv.gz",
        lambda: gzipped(b"a,b\n" * (8 * MIB), 80, b"prompt,completion\n"),
        IN_GZIP,
    ),
    "an array in gzip": ("a.json.gz", lambda: gzipped(b" " * (32 * MIB), 80, b"["), IN_GZIP),
    "Parquet in gzip": ("a.parquet.gz", lambda: gzipped(bytes(32 * MIB), 80, b"PAR1"), IN_GZIP),
    "a line in gzip": (
        "a.jsonl.gz",
        lambda: gzipped(b"x" * (32 * MIB), 80, b'{"prompt": "'),
        IN_GZIP,
    ),
    "zeros in zstd": ("a.jsonl.zst", lambda: zstandard.compress(bytes(256 * MIB)) * 20, IN_GZIP),
    "gzip in gzip by its name": (
        "a.jsonl.gz.gz",
        lambda: gzip.compress(gzipped(bytes(MIB), 1)),
        "is compressed twice",
    ),
    "gzip in gzip": (
        "a.jsonl.gz",
        lambda: gzip.compress(gzipped(bytes(MIB), 1)),
        "line 1: not UTF-8: byte 0x8b at column 2",
    ),
    "a line of a gigabyte": (
        "a.jsonl",
        lambda: Gigabyte(b'{"prompt": "'),
        "line 1: longer than 1,048,576",
    ),
    "a field of a gigabyte": (
        "a.csv",
        lambda: Gigabyte(b'prompt,completion\n"'),
        "at line 2: a row longer than 1,048,576 bytes",
    ),
    "an open quote": (
        "a.csv",
        lambda: b'prompt,completion\n"' + b"x\n" * (8 * MIB),
        "at line 2: a row longer than 1,048,576 bytes",
    ),
    "fields without end": (
        "a.csv",
        lambda: b'prompt,completion\n"' + b'x\n","' * (4 * MIB),
        "at line 2: a row longer than 1,048,576 bytes",
    ),
    "a string without end": (
        "a.json",
        lambda: b'[{"prompt": "' + b"x" * (64 * MIB),
        "row 1 is longer than 1,048,576 bytes",
    ),
    "a deep line": (
        "a.jsonl",
        lambda: b'{"messages": ' + b"[" * DEEP + b"]" * DEEP + b"}\n",
        "line 1: not JSON: nested too deeply",
    ),
    "a deep array": ("a.json", lambda: b"[" * 10**6, "row 1: not JSON: nested too deeply"),
    "deep arguments": (
        "a.jsonl",
        lambda: call("[" * DEEP + "]" * DEEP),
        "tool_calls[0].function.arguments: expected the JSON of an object, found values nested too",
    ),
    "deep tools": (
        "a.csv",
        lambda: b'conversations,tools\n[],"' + b"[" * DEEP + b'"\n',
        "line 2: conversations: expected a list of messages",
    ),
    "ten million bad rows": ("a.jsonl", lambda: b"{}\n" * 10**7, "At least 1,001 rows"),
    "ten million bad items": ("a.json", lambda: b"[" + b"1," * 10**7, "At least 1,001 rows"),
    "half of Parquet": ("a.parquet", lambda: parquet({"a": ["b"] * 50})[:200], "as Parquet"),
    "a damaged footer": ("a.parquet", damaged_footer, "cannot be read as Parquet after row 0"),
    "rows of nothing": ("a.parquet", rows_of_nothing, "claims 10,000,000 rows in "),
    "rows of one long word": (
        "a.parquet",
        lambda: rows_of_one_word(99_000, 1 << 19),
        "row 1: longer than 1,048,576 bytes",
    ),
    "rows of one word": (
        "a.parquet",
        lambda: rows_of_one_word(99_000, 1 << 11),
        "decodes to more than 64 MiB of rows: more than 100 times its size",
    ),
    "a list of nothing": ("a.parquet", list_of_nothing, "needs more than 180 MiB of memory"),
    "a page that shrinks to nothing": (
        "a.parquet",
        lambda: page_of_one_letter(1, 110),
        "needs more than 180 MiB of memory",
    ),
    "large columns of nothing": (
        "a.parquet",
        lambda: page_of_one_letter(2, 45),
        "decodes to more than 64 MiB of rows: more than 100 times its size",
    ),
    "columns that claim to be large": (
        "a.parquet",
        large_by_its_own_account,
        "cannot be read",
    ),
    "a page of two gigabytes": (
        "a.parquet",
        page_of_two_gigabytes,
        "cannot be read",
    ),
    "twenty thousand columns": (
        "a.parquet",
        lambda: parquet({f"c{n}": [1] for n in range(20_000)}),
        "has 20,000 columns, expected 10,000 at most",
    ),
    "a deep type": ("a.parquet", lambda: nested_type(500), "Parquet schema too deeply nested"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_a_bad_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    filename, make, words = HOSTILE[name]
    path = tmp_path / filename
    content = make()
    if isinstance(content, Gigabyte):
        path.write_bytes(content.start)
        os.truncate(path, 10**9)
    else:
        path.write_bytes(content)
    measured = Measured(tmp_path)
    monkeypatch.setattr("sys.executable", str(measured.python))
    with pytest.raises(DatasetInvalid) as caught:
        read(DataFile(f"file:{filename}", path, filename, ""), Data())
    assert words in caught.value.message
    assert caught.value.hint
    assert len(caught.value.message) < 3000
    assert measured.usage().cpu_seconds < MAX_SECONDS  # others may have the processor meanwhile
    assert measured.usage().peak_bytes < MAX_BYTES


@pytest.mark.parametrize(
    "name", ["rows.pkl", "rows.bin", "rows.pt", "rows.npy", "rows.jsonl", "rows.json", "rows.csv",
             "rows.parquet", "rows", "rows.jsonl.gz"]
)  # fmt: skip
def test_a_pickle_is_a_bad_dataset_and_is_not_opened(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    body = pickled(canary)
    path = tmp_path / name
    path.write_bytes(gzip.compress(body) if name.endswith(".gz") else body)
    with pytest.raises(DatasetInvalid):
        read(DataFile(f"file:{name}", path, name, ""), Data())
    assert not canary.exists()


def test_a_pickle_that_a_parquet_file_names_as_a_type_is_not_opened(tmp_path: Path) -> None:
    """pyarrow did so before 14."""
    canary, path = tmp_path / "canary", tmp_path / "rows.parquet"
    extension = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickled(canary),
    }
    fields = [pa.field(n, pa.string(), metadata=extension) for n in ("prompt", "completion")]
    pq.write_table(pa.table([["a"], ["b"]], schema=pa.schema(fields)), path)
    with parse(DataFile("file:rows.parquet", path, path.name, ""), Data()) as found:
        assert sum(1 for _ in found.rows()) == 1
    assert not canary.exists()


def test_text_that_shrinks_a_lot_is_no_bomb(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    row = {"prompt": "the same " * 9000, "completion": "answer"}
    path.write_bytes(gzip.compress(json.dumps(row).encode() + b"\n") * 600)
    with gzip.open(path) as stream:
        size = sum(map(len, stream))
    assert size > 40 * path.stat().st_size
    with parse(DataFile("file:a", path, path.name, ""), Data()) as found:
        assert found.bad == 0
        assert sum(1 for _ in found.rows()) == 600


class TestTheProcess:
    def file(self, folder: Path) -> DataFile:
        path = folder / "rows.jsonl"
        path.write_bytes(ROW * 9)
        return DataFile("file:rows.jsonl", path, path.name, "")

    def test_it_knows_neither_torch_nor_a_tokenizer(self) -> None:
        program = (
            "import sys, worker.training.data.spool;"
            "print(*({'torch', 'transformers', 'pyarrow', 'numpy'} & sys.modules.keys()))"
        )
        done = subprocess.run(
            [sys.executable, "-P", "-c", program], check=False, capture_output=True, text=True
        )
        assert done.stdout == "\n"

    def test_nothing_stays_in_its_folder(self, tmp_path: Path) -> None:
        folder = tmp_path / "folder"
        folder.mkdir()
        with parse(self.file(tmp_path), Data(), folder) as found:
            assert not list(folder.iterdir())
            assert sum(1 for _ in found.rows()) == 9
        assert not list(folder.iterdir())

    @pytest.mark.parametrize(
        ("ends", "words"),
        [
            ("kill -SEGV $$", "its reader crashed (SIGSEGV)"),
            ("kill -KILL $$", "its reader crashed (SIGKILL)"),
            ("kill -XCPU $$", "for 8 seconds of computing no row came out of it"),
            ("kill -ALRM $$", "for 60 seconds no row came out of it"),
            ("exit 3", "one of its parts needs more than 180 MiB of memory"),
            ("exit 9", "its reader ended with 9"),
        ],
    )
    def test_its_end_is_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str, words: str
    ) -> None:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{ends}\n")
        program.chmod(0o700)
        monkeypatch.setattr("sys.executable", str(program))
        with pytest.raises(DatasetInvalid) as caught:
            read(self.file(tmp_path), Data())
        assert caught.value.message == f"file:rows.jsonl cannot be read: {words}."
        assert "as JSONL" in str(caught.value.hint)

    def test_what_nobody_foresaw_is_not_blamed_on_the_rows(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("worker.training.data.parsing.MODULE", "worker.nothing")
        with pytest.raises(RuntimeError, match=r"No module named worker\.nothing"):
            read(self.file(tmp_path), Data())

    @pytest.mark.parametrize(
        ("limit", "work", "ended"),
        [
            ("CPU_SECONDS", "while True: pass", signal.SIGXCPU),
            ("WALL_SECONDS", "import time; time.sleep(60)", signal.SIGALRM),
        ],
    )
    def test_it_ends_where_nothing_comes(
        self, limit: str, work: str, ended: signal.Signals
    ) -> None:
        program = (
            f"from worker.training.data import limits; limits.leave_no_core(); limits.{limit} = 1;"
            f"limits.proceed()\n{work}"
        )
        done = subprocess.run([sys.executable, "-P", "-c", program], check=False, timeout=30)
        assert done.returncode == -ended
        assert "no row came out of it" in explain_end(done.returncode)[0]

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts memory in time")
    def test_it_cannot_take_more_memory(self) -> None:
        program = (
            "from worker.training.data import limits; limits.limit_memory()\n"
            "held = bytearray(100 << 20)\n"
            "try: more = bytearray(100 << 20)\n"
            "except MemoryError: print('no more')"
        )
        done = subprocess.run(
            [sys.executable, "-P", "-c", program], check=False, capture_output=True, text=True
        )
        assert done.stdout == "no more\n"

    def test_it_ends_with_its_parent(self) -> None:
        program = (
            "import time; from worker.training.data import limits; limits.die_with_parent();"
            "print('ready', flush=True); time.sleep(60)"
        )
        with subprocess.Popen(
            [sys.executable, "-P", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout
            assert process.stdin
            assert process.stdout.readline() == b"ready\n"
            process.stdin.close()
            assert process.wait(timeout=20) == -signal.SIGKILL
