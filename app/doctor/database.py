"""The database: reached, migrated, its clock; what its rows say of queue, workers and outbox."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import Connection, inspect, make_url, select, text
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from app import __version__
from app.census import SILENT_SECONDS, Census, take_census
from app.db import make_engine, now
from app.doctor.finding import Check, Finding, fail, ok, told, warn
from app.jobs.states import Status
from app.migrate import head
from app.settings import Settings

SLOW_SECONDS = 0.1  # of one round trip
CLOCK_SECONDS = 2
QUEUED_SECONDS = 300
OUTBOX_SECONDS = 60
OLDEST_POSTGRES = 130000  # as the server writes 13.0

EXPECTED = "a database that answers"
MEND = "Check FLATLORA_DATABASE_URL (host, port, name, user, password), and that the server runs."


def database(settings: Settings) -> Iterator[Finding]:
    try:
        url = make_url(settings.database)
    except ArgumentError:
        yield fail("database", "FLATLORA_DATABASE_URL is no URL", "postgresql://…", MEND)
        return
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
        yield ok("database", f"{url.database} is not there yet; it is made at the first start")
        return
    engine = None
    try:
        engine = make_engine(settings.database)
        with engine.connect() as connection:
            yield _reached(connection)
            yield _clock(connection)
            schema = _schema(connection)
            yield schema
            if not schema.mend:
                yield from _rows(settings, take_census(connection))
    except ModuleNotFoundError as error:
        mend = "pip install flatlora-service[cluster]"
        yield fail("database", f"no driver: {error}", EXPECTED, mend)
    except (SQLAlchemyError, OSError) as error:
        yield fail("database", told(error), EXPECTED, _mend(str(error)))
    finally:
        if engine is not None:
            engine.dispose()


def _mend(error: str) -> str:
    if "password authentication" in error:
        return (
            "Correct the password in FLATLORA_DATABASE_URL; in it, the signs @ : / are written "
            "%40 %3A %2F."
        )
    if "does not exist" in error:
        return "Create the database or the user that FLATLORA_DATABASE_URL names, or correct it."
    return MEND


def _reached(connection: Connection) -> Finding:
    started = time.perf_counter()
    connection.execute(select(1))
    seconds = time.perf_counter() - started
    name = connection.dialect.name
    version = ".".join(str(part) for part in connection.dialect.server_version_info or ())
    found = f"{name} {version}, {1000 * seconds:.1f} ms a round trip"
    if name == "postgresql":
        number = int(connection.scalar(text("SHOW server_version_num")) or 0)
        if number < OLDEST_POSTGRES:
            return fail("database", found, "Postgres 13 or newer", "Upgrade the server.")
    if seconds > SLOW_SECONDS:
        expected = f"under {1000 * SLOW_SECONDS:g} ms"
        return warn("database", found, expected, "Put the service and its database side by side.")
    return ok("database", found, EXPECTED)


def _clock(connection: Connection) -> Finding:
    """Leases go by the database's clock, so that a wrong one here does no more than confuse."""
    before = datetime.now(UTC)
    theirs = connection.scalar(select(now()))
    after = datetime.now(UTC)
    assert theirs is not None
    ahead = (theirs - (before + (after - before) / 2)).total_seconds()
    found = f"the database's clock is {abs(ahead):.2f} s {'ahead' if ahead > 0 else 'behind'}"
    expected = f"within {CLOCK_SECONDS} s of this machine's"
    if abs(ahead) > CLOCK_SECONDS:
        mend = "Let both machines keep time by NTP: timedatectl set-ntp true"
        return warn("clock", found, expected, mend)
    return ok("clock", found, expected)


def _schema(connection: Connection) -> Finding:
    tables = inspect(connection).get_table_names()
    query = text("SELECT version_num FROM alembic_version")
    found = connection.scalar(query) if "alembic_version" in tables else None
    expected = f"migration {head()}"
    if found == head():
        return ok("schema", f"migration {found}", expected)
    return fail("schema", f"migration {found or 'none'}", expected, "flatlora migrate")


def _rows(settings: Settings, census: Census) -> Iterator[Finding]:
    if settings.is_cluster:
        yield from _workers(census)
    yield _queue(settings, census)
    if settings.is_cluster:
        yield _outbox(census)


def _workers(census: Census) -> Iterator[Finding]:
    expected = f"workers that were heard within {SILENT_SECONDS} s"
    if not census.workers:
        mend = "Start one with `flatlora worker`: until then jobs wait."
        yield warn("workers", "none is registered", expected, mend)
        return
    silent = [name for name, worker in census.workers.items() if worker.is_silent]
    others = {w.version for w in census.workers.values()} - {__version__}
    found = f"{len(census.workers)} with {census.slots} slots"
    if silent:
        mend = "See the logs of those machines. Their jobs go to other workers by themselves."
        yield warn("workers", f"{found}; silent: {', '.join(silent)}", expected, mend)
    else:
        yield ok("workers", found, expected)
    if others:
        mend = "Bring all machines to one version."
        found = f"workers run {', '.join(sorted(others))}"
        yield warn("workers", found, f"{__version__}, as here", mend)


def _queue(settings: Settings, census: Census) -> Finding:
    queued = census.jobs[Status.QUEUED]
    found = f"{queued} queued, {census.held} running"
    if queued:
        found += f"; the oldest has waited {census.oldest_queued_seconds:.0f} s"
    is_idle = census.held < census.slots if settings.is_cluster else census.held == 0
    expected = "no job waits while a slot is idle"
    if is_idle and census.oldest_queued_seconds > QUEUED_SECONDS:
        where = "the workers" if settings.is_cluster else "`flatlora up`"
        return warn("queue", found, expected, f"See the log of {where}: nobody takes the jobs.")
    return ok("queue", found, expected)


def _outbox(census: Census) -> Finding:
    found = f"{census.outbox} wake-ups are due, the oldest for {census.outbox_lag_seconds:.0f} s"
    expected = f"none for longer than {OUTBOX_SECONDS} s"
    if census.outbox_lag_seconds > OUTBOX_SECONDS:
        mend = "Check the broker; API and workers send what is left as soon as it answers."
        return warn("outbox", found, expected, mend)
    return ok("outbox", found, expected)


DATABASE = Check("database", database, EXPECTED, MEND)
