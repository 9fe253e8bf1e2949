"""What the settings no longer keep: old jobs, old idempotency keys, files that nothing needs."""

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any

import structlog
from sqlalchemy import (
    ColumnElement,
    CursorResult,
    Engine,
    and_,
    delete,
    exists,
    false,
    func,
    not_,
    select,
    text,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from app.datasets.parts import Parts, upload_of
from app.db import now
from app.garbage import Candidates, references
from app.ids import is_id
from app.jobs.states import TERMINAL
from app.objects import Entry
from app.quotas.usage import USED, is_past, keep_usage
from app.settings import Settings
from app.storage import ArtifactStore, Freed, freed, hash_of, make_private
from app.tables import DatasetRow, IdempotencyRow, JobRow, UploadRow, UsageRow

log = structlog.get_logger()

BATCH = 100
DAY = 24 * 3600
ADVISORY_LOCK = 0x666C6763  # "flgc": one of all processes on a Postgres database cleans


@dataclass
class Cleaned:
    """What was removed, or would be."""

    dry_run: bool = False
    busy: bool = False
    """Another process is cleaning, so this one has not."""
    jobs: int = 0
    idempotency_keys: int = 0
    job_files: Freed = field(default_factory=Freed)
    """Of jobs that are gone, and checkpoints of those that are over."""
    blobs: Freed = field(default_factory=Freed)
    """Datasets' and adapters' files that nothing refers to."""
    uploads: int = 0
    """That have begun, and have not grown since."""
    parts: Freed = field(default_factory=Freed)
    """Of uploads that are gone."""
    unfinished: Freed = field(default_factory=Freed)
    """What killed writes have left."""

    @property
    def bytes(self) -> int:
        found = (self.job_files, self.blobs, self.parts, self.unfinished)
        return sum(freed.bytes for freed in found)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bytes": self.bytes}


class Retention:
    """Cleans one database and its store. Any number of processes may try."""

    def __init__(self, engine: Engine, store: ArtifactStore, settings: Settings) -> None:
        self._reading = engine
        self._writing = engine.execution_options(writes=True)
        self._store = store
        self._settings = settings

    def clean(self, *, dry_run: bool = False) -> Cleaned:
        """Remove what is not kept. Killed at any moment it leaves nothing but garbage."""
        cleaned = Cleaned(dry_run=dry_run)
        with nullcontext(True) if dry_run else self._alone() as is_alone:
            if not is_alone:
                cleaned.busy = True
                return cleaned
            before = self._store.clock() - timedelta(hours=self._settings.keep_unreferenced_hours)
            is_in_use = self._is_in_use()
            self._forget_jobs(cleaned)
            self._forget_keys(cleaned)
            self._forget_uploads(cleaned)
            self._forget_usage(cleaned)
            if is_in_use:
                self._clear_parts(cleaned, before)
                self._clear_jobs(cleaned, before)
                self._collect_blobs(cleaned, before)
            cleaned.unfinished = self._store.forget_unfinished(before, dry_run=dry_run)
        log.info("cleaned", **cleaned.as_dict())
        return cleaned

    @property
    def _expired(self) -> ColumnElement[bool]:
        days = self._settings.keep_jobs_days
        if days is None:
            return false()
        ended = func.coalesce(JobRow.finished_at, JobRow.updated_at)
        return and_(JobRow.status.in_(TERMINAL), ended < now(-days * DAY))

    def _forget_jobs(self, cleaned: Cleaned) -> None:
        """The rows first: files without a row are garbage, a row without files is a broken job."""
        if cleaned.dry_run:
            with Session(self._reading) as session:
                count = select(func.count()).select_from(JobRow).where(self._expired)
                cleaned.jobs = session.scalar(count) or 0
            return
        oldest = select(JobRow.id).where(self._expired).order_by(JobRow.id).limit(BATCH)
        statement = delete(JobRow).where(JobRow.id.in_(oldest), self._expired).returning(*USED)
        while True:
            with Session(self._writing) as session, session.begin():
                jobs = session.execute(statement).all()
                gone = [job.id for job in jobs]
                for job in jobs:
                    if job.runtime:
                        session.execute(keep_usage(job))
            if not gone:
                return
            cleaned.jobs += len(gone)
            for job_id in gone:
                cleaned.job_files += self._store.forget_job(job_id)

    def _forget_keys(self, cleaned: Cleaned) -> None:
        is_old = IdempotencyRow.created_at < now(-self._settings.keep_idempotency_days * DAY)
        if cleaned.dry_run:
            with Session(self._reading) as session:
                count = select(func.count()).select_from(IdempotencyRow).where(is_old)
                cleaned.idempotency_keys = session.scalar(count) or 0
            return
        with Session(self._writing) as session, session.begin():
            outcome = session.execute(delete(IdempotencyRow).where(is_old))
            assert isinstance(outcome, CursorResult)
            cleaned.idempotency_keys = outcome.rowcount

    @property
    def _stale(self) -> ColumnElement[bool]:
        return UploadRow.updated_at < now(-self._settings.keep_unreferenced_hours * 3600)

    def _forget_uploads(self, cleaned: Cleaned) -> None:
        """The rows; a part that arrives now finds none, and is deleted by whoever brought it."""
        if cleaned.dry_run:
            with Session(self._reading) as session:
                count = select(func.count()).select_from(UploadRow).where(self._stale)
                cleaned.uploads = session.scalar(count) or 0
            return
        with Session(self._writing) as session, session.begin():
            outcome = session.execute(delete(UploadRow).where(self._stale))
            assert isinstance(outcome, CursorResult)
            cleaned.uploads = outcome.rowcount

    def _clear_parts(self, cleaned: Cleaned, before: datetime) -> None:
        """The files of uploads without a row: stale ones, and those whose end was killed."""
        for page in Parts(self._store).files():
            old = [entry for entry in page if upload_of(entry) and entry.modified < before]
            ids = {upload_of(entry) for entry in old}
            with Session(self._reading) as session:
                rows = select(UploadRow.id).where(UploadRow.id.in_(ids))
                if cleaned.dry_run:
                    rows = rows.where(not_(self._stale))
                known = set(session.scalars(rows))
            gone = [entry for entry in old if upload_of(entry) not in known]
            cleaned.parts += freed(gone) if cleaned.dry_run else self._store.delete(gone)

    def _forget_usage(self, cleaned: Cleaned) -> None:
        if not cleaned.dry_run:
            with Session(self._writing) as session, session.begin():
                session.execute(delete(UsageRow).where(is_past()))

    def _is_in_use(self) -> bool:
        """An empty database beside a full store is a wrong setting; nothing there is garbage."""
        with Session(self._reading) as session:
            tables = exists(JobRow.id) | exists(DatasetRow.id) | exists(UploadRow.id)
            return bool(session.scalar(select(tables)))

    def _clear_jobs(self, cleaned: Cleaned, before: datetime) -> None:
        """Checkpoints of jobs that are over, and all of jobs that are gone.

        Files of a job that is gone come from an attempt that has outlived it, or from a removal
        that was killed. Rows are read after the files are listed, and are there before any file.
        """
        for page in self._store.job_files():
            found = [entry for entry in page if _is_of_job(entry)]
            past = self._past(found, before, dry_run=cleaned.dry_run)
            cleaned.job_files += freed(past) if cleaned.dry_run else self._store.delete(past)

    def _past(self, entries: Sequence[Entry], before: datetime, *, dry_run: bool) -> list[Entry]:
        ids = {_job_of(entry) for entry in entries}
        expired = self._expired.label("expired")
        with Session(self._reading) as session:
            found = session.execute(
                select(JobRow.id, JobRow.status, expired).where(JobRow.id.in_(ids))
            )
            rows = {job_id: (status, is_expired) for job_id, status, is_expired in found}

        def is_past(entry: Entry) -> bool:
            row = rows.get(_job_of(entry))
            if row is None:
                return entry.modified < before
            status, is_expired = row
            if dry_run and is_expired:
                return True  # else it would be gone by now, and its files with it
            return status in TERMINAL and _is_checkpoint(entry)

        return [entry for entry in entries if is_past(entry)]

    def _collect_blobs(self, cleaned: Cleaned, before: datetime) -> None:
        """Delete the old files that nothing needs.

        Listed first, then looked for in the database: in the other order a file could be stored
        and referred to in between, and be listed without its reference. Now one that is stored
        after it was listed is no candidate; and one whose first reference comes after they were
        read has been put again before that, so it is young, which is looked at again before
        anything is deleted.
        """
        expired = self._expired if cleaned.dry_run else None
        with Candidates() as candidates:
            for page in self._store.blobs():
                candidates.add((hash_of(e), e.size) for e in page if e.modified < before)
            for hashes in references(self._reading, self._store, without=expired):
                candidates.discard(hashes)
            for shard, blobs in candidates.shards():
                if cleaned.dry_run:
                    cleaned.blobs += Freed(len(blobs), sum(blobs.values()))
                else:
                    cleaned.blobs += self._store.collect(shard, blobs.keys(), before)

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        if self._reading.dialect.name == "postgresql":
            with self._advisory_lock() as is_alone:
                yield is_alone
            return
        make_private(self._settings.data_dir)
        with (self._settings.data_dir / "cleaning.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    @contextmanager
    def _advisory_lock(self) -> Iterator[bool]:
        """Held by a connection of its own, without a transaction that would hold up VACUUM."""
        engine = self._reading.execution_options(isolation_level="AUTOCOMMIT")
        lock = {"lock": ADVISORY_LOCK}
        with engine.connect() as connection:
            is_alone = bool(connection.scalar(text("SELECT pg_try_advisory_lock(:lock)"), lock))
            try:
                yield is_alone
            finally:
                if is_alone:
                    with suppress(DBAPIError):  # then the connection is gone, and the lock with it
                        connection.execute(text("SELECT pg_advisory_unlock(:lock)"), lock)


def _is_of_job(entry: Entry) -> bool:
    return entry.key.count("/") > 1 and is_id(_job_of(entry), "job")


def _job_of(entry: Entry) -> str:
    return entry.key.split("/")[1]


def _is_checkpoint(entry: Entry) -> bool:
    return entry.key.split("/")[2] == "checkpoints"
