"""Engines, and transactions of one project or of all.

SQLite and Postgres are written by the same statements, but for app/jobs/submission.py.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import structlog
from sqlalchemy import (
    Connection,
    Double,
    Engine,
    create_engine,
    event,
    literal,
    make_url,
)
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    create_async_engine,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from app.errors import DatabaseUnavailable
from app.scope import PROJECT, ScopedSession
from app.tables import UtcDateTime

log = structlog.get_logger()

SQLITE_BUSY_SECONDS = 30
REQUEST_SECONDS = 60  # of one request's transaction, and of its turn in a line of a thousand
ANSWER_SECONDS = 10  # to one statement of a request: a silent database is told sooner
HOUSEKEEPING_SECONDS = 300  # the same, of what nobody waits for

# A connection whose other end has gone says so within half a minute, also if it is only waiting.
POSTGRES = {
    "application_name": "flatlora",
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,  # milliseconds
}
POOL: dict[str, Any] = {"pool_pre_ping": True, "pool_timeout": 5, "pool_size": 10}
LINE = POOL | {"pool_timeout": REQUEST_SECONDS}  # many requests at once are no outage


OUTAGES = (OperationalError, InterfaceError, PoolTimeout)
"""What a database raises that may answer again later."""


class now(FunctionElement[datetime]):  # noqa: N801 - reads as the SQL function that it is
    """The database's clock, shifted by some seconds. Leases never trust a worker's clock."""

    inherit_cache = True  # the shift is a parameter, so statements are compiled once
    type = UtcDateTime()

    def __init__(self, plus_seconds: float = 0) -> None:
        super().__init__(*([literal(float(plus_seconds), Double)] if plus_seconds else []))


@compiles(now, "sqlite")
def _sqlite_now(element: now, compiler: SQLCompiler, **options: Any) -> str:
    # Three digits from SQLite, three zeros: the text form in which SQLAlchemy keeps a time.
    shift = compiler.process(element.clauses, **options)
    shift = f", printf('%+f seconds', {shift})" if shift else ""
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now'{shift})"


@compiles(now, "postgresql")
def _postgres_now(element: now, compiler: SQLCompiler, **options: Any) -> str:
    shift = compiler.process(element.clauses, **options)
    return f"(clock_timestamp() + make_interval(secs => {shift}))" if shift else "clock_timestamp()"


def make_engine(url: str, *, answer_seconds: float = HOUSEKEEPING_SECONDS) -> Engine:
    """A blocking engine, for the worker and the command line.

    ``answer_seconds``: a Postgres that says nothing for so long is an outage.
    """
    if make_url(url).get_backend_name() == "postgresql":
        engine = create_engine(url, connect_args=POSTGRES, **POOL)
        _be_impatient(engine, answer_seconds)
        return engine
    engine = create_engine(url)
    _prepare_sqlite(engine)
    return engine


def make_async_engine(url: str) -> AsyncEngine:
    """The API's engine for the same database."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql":
        engine = create_async_engine(parsed, connect_args=POSTGRES, **LINE)
        _be_impatient(engine.sync_engine, ANSWER_SECONDS)
        return engine
    engine = create_async_engine(parsed.set(drivername="sqlite+aiosqlite"))
    _prepare_sqlite(engine.sync_engine)
    return engine


def _be_impatient(engine: Engine, answer_seconds: float) -> None:
    from app.postgres import be_impatient  # an embedded service has no psycopg

    be_impatient(engine, answer_seconds)


def _prepare_sqlite(engine: Engine) -> None:
    """WAL, foreign keys, and transactions that say at BEGIN whether they will write.

    A reading transaction that turns into a writing one fails at once with SQLITE_BUSY whatever
    the timeout, so writers take the lock at BEGIN (option ``writes``).
    """

    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {SQLITE_BUSY_SECONDS * 1000}")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


class Database:
    """The API's ways into the database: to read, and to write, each for one project."""

    def __init__(self, url: str) -> None:
        self.engine = make_async_engine(url)
        self._engines = {False: self.engine, True: self.engine.execution_options(writes=True)}

    @asynccontextmanager
    async def scoped(
        self, project: str, *, writes: bool = False, **known: Any
    ) -> AsyncIterator[AsyncSession]:
        """One transaction that sees and writes the rows of one project (app/scope.py).

        ``known``: what its ``info`` tells besides.
        """
        session = AsyncSession(
            self._engines[writes],
            sync_session_class=ScopedSession,
            expire_on_commit=False,
            info={PROJECT: project, **known},
        )
        async with _transaction(session):
            yield session

    @asynccontextmanager
    async def unscoped(self, *, writes: bool = False) -> AsyncIterator[AsyncSession]:
        """One transaction that sees everything: for who is asking, before that is known."""
        session = AsyncSession(self._engines[writes], expire_on_commit=False)
        async with _transaction(session):
            yield session


@asynccontextmanager
async def _transaction(session: AsyncSession) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(REQUEST_SECONDS), session, session.begin():
            yield
    except (*OUTAGES, TimeoutError) as error:
        log.warning("the database does not answer", exc_info=error)
        raise DatabaseUnavailable from error
