"""Which stored files are garbage: nothing in the database, and no publication, refers to them."""

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import groupby
from typing import Any

from sqlalchemy import ColumnElement, Engine, RowMapping, Select, not_, select
from sqlalchemy.orm import Session

from app.jobs.states import TERMINAL
from app.storage import ArtifactStore
from app.tables import DatasetRow, JobRow

PAGE = 500


def references(
    engine: Engine, store: ArtifactStore, *, without: ColumnElement[bool] | None = None
) -> Iterator[list[str]]:
    """The hashes of all files that are needed, in pages; ``without`` are jobs that will be gone."""
    for rows in _pages(engine, select(DatasetRow.id, DatasetRow.sha256)):
        yield [row["sha256"] for row in rows]
    jobs = select(JobRow.id, JobRow.status, JobRow.fence, JobRow.adapter, JobRow.inputs)
    if without is not None:
        jobs = jobs.where(not_(without))
    for rows in _pages(engine, jobs):
        yield [sha256 for row in rows for sha256 in _needed_by(row, store)]


def _needed_by(row: RowMapping, store: ArtifactStore) -> Iterator[str]:
    yield from _files(row["adapter"])
    if row["status"] in TERMINAL:
        return
    inputs = row["inputs"] or {}
    yield from (inputs[name]["sha256"] for name in ("dataset", "validation") if inputs.get(name))
    # An attempt that has published and died before the row was written: the next one takes over
    # what the manifest names, whenever that is.
    if row["fence"] and (manifest := store.manifest(row["id"])):
        yield from _files(manifest["adapter"])


def _files(adapter: Mapping[str, Any] | None) -> Iterator[str]:
    return (file["sha256"] for file in adapter["files"]) if adapter else iter(())


def _pages(engine: Engine, statement: Select[*tuple[Any, ...]]) -> Iterator[Sequence[RowMapping]]:
    """In order of ids, each page in a transaction of its own: none is held for long."""
    key = statement.selected_columns[0]
    statement = statement.order_by(key).limit(PAGE)
    last = ""
    while True:
        with Session(engine) as session:
            rows = session.execute(statement.where(key > last)).mappings().all()
        if not rows:
            return
        yield rows
        last = rows[-1]["id"]


class Candidates:
    """Hashes of files, in a table on disk: there may be millions."""

    def __init__(self) -> None:
        self._table = sqlite3.connect("")  # of its own, in a file that is gone with it
        self._table.execute("CREATE TABLE blob (sha256 TEXT PRIMARY KEY, size INT) WITHOUT ROWID")

    def __enter__(self) -> "Candidates":
        return self

    def __exit__(self, *_: object) -> None:
        self._table.close()

    def add(self, blobs: Iterable[tuple[str, int]]) -> None:
        self._table.executemany("INSERT OR REPLACE INTO blob VALUES (?, ?)", blobs)

    def discard(self, hashes: Iterable[str]) -> None:
        self._table.executemany("DELETE FROM blob WHERE sha256 = ?", ((sha,) for sha in hashes))

    def shards(self) -> Iterator[tuple[str, dict[str, int]]]:
        """What is left, by the first two digits of the hash: hashes with their sizes."""
        with closing(self._table.execute("SELECT sha256, size FROM blob ORDER BY sha256")) as rows:
            for shard, group in groupby(rows, key=lambda row: row[0][:2]):
                yield shard, dict(group)
