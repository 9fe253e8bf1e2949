"""Connections to Postgres on which neither side waits for ever for the other.

TCP tells when a machine is gone. It does not tell when what stands between (a pooler, a balancer,
a frozen server) keeps the connection and says nothing. So an answer is waited for only so long; and
the server ends a transaction that its client has left open, with the locks that others wait for.
"""

from math import ceil
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.errors import ReadOnlySqlTransaction, _WaitTimeout
from sqlalchemy import Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import OperationalError

Value = TypeVar("Value")

INTERVAL = 0.1  # at which psycopg looks for signals
CONNECT_SECONDS = 5
IDLE = 4  # times as long as we wait for the server, it waits for us within a transaction


class Connection(psycopg.Connection[Any]):
    answer_seconds: float | None = None

    def wait(
        self, gen: PQGen[Value], interval: float = INTERVAL, timeout: float | None = None
    ) -> Value:
        if timeout is not None:
            return super().wait(gen, interval, timeout)
        try:
            return super().wait(gen, interval, self.answer_seconds)
        except _WaitTimeout as error:
            self.pgconn.finish()  # what comes later belongs to nobody
            raise _silence(self.answer_seconds) from error


class AsyncConnection(psycopg.AsyncConnection[Any]):
    answer_seconds: float | None = None

    async def wait(
        self,
        gen: PQGen[Value],
        interval: float = INTERVAL,
        timeout: float | None = None,  # noqa: ASYNC109 - so psycopg has named it
    ) -> Value:
        if timeout is not None:
            return await super().wait(gen, interval, timeout)
        try:
            return await super().wait(gen, interval, self.answer_seconds)
        except _WaitTimeout as error:
            self.pgconn.finish()
            raise _silence(self.answer_seconds) from error


def _silence(seconds: float | None) -> psycopg.OperationalError:
    return psycopg.OperationalError(f"the server has said nothing for {seconds:g} seconds")


def be_impatient(engine: Engine, answer_seconds: float) -> None:
    """Of an engine for psycopg: limit how long its connections wait, and are waited for."""
    is_async = engine.dialect.is_async
    connect_seconds = min(CONNECT_SECONDS, ceil(answer_seconds))
    idle = f"SET idle_in_transaction_session_timeout = {round(1000 * IDLE * answer_seconds)}"

    async def connect_async(*args: Any, **options: Any) -> AsyncConnection:
        connection = await AsyncConnection.connect(*args, **options)
        connection.answer_seconds = answer_seconds
        try:
            await connection.execute(idle)
            await connection.commit()
        except BaseException:
            await connection.close()
            raise
        return connection

    @event.listens_for(engine, "do_connect")
    def on_connect(_dialect: Any, _record: Any, args: list[Any], options: dict[str, Any]) -> Any:
        options["connect_timeout"] = connect_seconds
        if is_async:
            options["async_creator_fn"] = connect_async
            return None
        connection = Connection.connect(*args, **options)
        connection.answer_seconds = answer_seconds
        try:
            connection.execute(idle)
            connection.commit()
        except BaseException:
            connection.close()
            raise
        return connection

    @event.listens_for(engine, "handle_error")
    def on_error(context: ExceptionContext) -> OperationalError | None:
        """However a connection was lost, it is an outage: psycopg calls some an internal error.

        So is a server that only reads: a standby, or a primary that has just become one.
        """
        cause, is_lost = context.original_exception, context.is_disconnect
        if isinstance(context.sqlalchemy_exception, OperationalError) or not (
            is_lost or isinstance(cause, ReadOnlySqlTransaction)
        ):
            return None
        return OperationalError(
            context.statement, context.parameters, cause, connection_invalidated=is_lost
        )
