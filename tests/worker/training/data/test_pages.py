"""Parquet as common writers write it by default is read, whatever the size of their pages.

pyarrow's settings stand in for theirs; files of DuckDB 2.0 (SNAPPY, ZSTD, V2), Polars 2.1 and
pandas 3.1 themselves were tried by hand.
"""

import base64
import gzip
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.worker.training.conftest import chat
from tests.worker.training.data.measured import Measured
from worker.training.config import Data, DataFile
from worker.training.data.parquet import LARGEST_PAGE
from worker.training.data.parsing import Good, parse

MIB = 1 << 20
BASE_BYTES = 200e6  # that a hostile file may take

ONE_PAGE = {"data_page_size": 100 * MIB, "use_dictionary": False, "row_group_size": 122_880}
DUCKDB: dict[str, dict[str, Any]] = {
    "DuckDB": {**ONE_PAGE, "compression": "snappy"},
    "DuckDB with ZSTD": {**ONE_PAGE, "compression": "zstd"},
    "DuckDB V2": {
        **ONE_PAGE,
        "compression": "snappy",
        "data_page_version": "2.0",
        "column_encoding": "DELTA_LENGTH_BYTE_ARRAY",
    },
}
OTHERS: dict[str, dict[str, Any]] = {
    "pandas": {},
    "Polars": {"compression": "zstd", "row_group_size": 512**2},
    "Spark": {"max_rows_per_page": 20_000, "data_page_size": MIB, "version": "1.0"},
    "datasets": {"row_group_size": 1000, "use_content_defined_chunking": True},
}


def texts(rows: int, size: int) -> Iterator[str]:
    """Base64, that shrinks no more than text does."""
    chance = random.Random(1)
    for _ in range(rows):
        yield base64.b64encode(chance.randbytes(size * 3 // 4)).decode()


def pairs(rows: int, size: int) -> list[dict[str, str]]:
    drawn = texts(2 * rows, size)
    return [{"prompt": prompt, "completion": next(drawn)} for prompt in drawn]


def file_of(folder: Path, rows: list[Any], **options: Any) -> DataFile:
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return DataFile("file:rows.parquet", path, path.name, "")


def contents(file: DataFile) -> Iterator[list[str]]:
    with parse(file, Data(), file.path.parent) as found:
        assert found.bad == 0
        for row in found.rows():
            assert isinstance(row, Good)
            yield [message["content"] for message in row.conversation.messages]


@pytest.mark.parametrize("name", DUCKDB)
def test_columns_of_large_pages_are_read_in_the_order_of_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    rows = pairs(9000, 5000)
    file = file_of(tmp_path, rows, **DUCKDB[name])
    metadata = pq.ParquetFile(file.path).metadata
    assert metadata.num_row_groups == 1
    sizes = [metadata.row_group(0).column(n).total_uncompressed_size for n in range(2)]
    assert min(sizes) > 40 * MIB
    measured = Measured(tmp_path)
    monkeypatch.setattr("sys.executable", str(measured.python))
    for row, found in zip(rows, contents(file), strict=True):
        assert found == [row["prompt"], row["completion"]]
    # two pages more than what any file may take, and the compressed one, which is the file itself
    assert measured.usage().peak_bytes < BASE_BYTES + 3 * max(sizes)


@pytest.mark.torture
def test_a_page_of_messages_may_be_large(tmp_path: Path) -> None:
    rows = [chat("Q", text) for text in texts(7_000, 10_000)]
    file = file_of(tmp_path, rows, **DUCKDB["DuckDB"])
    assert pq.ParquetFile(file.path).metadata.row_group(0).total_byte_size > 66 * MIB
    assert LARGEST_PAGE > 100 * MIB
    assert sum(len(answer) for _, answer in contents(file)) == 7_000 * 10_000


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_small_pages_are_read_within_the_usual_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    rows = pairs(4000, 2500)
    file = file_of(tmp_path, rows, **OTHERS[name])
    measured = Measured(tmp_path)
    monkeypatch.setattr("sys.executable", str(measured.python))
    for row, found in zip(rows, contents(file), strict=True):
        assert found == [row["prompt"], row["completion"]]
    assert measured.usage().peak_bytes < BASE_BYTES


@pytest.mark.torture
def test_a_compressed_file_of_large_pages_is_read_too(tmp_path: Path) -> None:
    rows = pairs(3500, 10_000)
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, **DUCKDB["DuckDB"])
    path = tmp_path / "rows.parquet.gz"
    path.write_bytes(gzip.compress(buffer.getvalue(), 0))
    for row, found in zip(rows, contents(DataFile("file:x", path, path.name, "")), strict=True):
        assert found == [row["prompt"], row["completion"]]
