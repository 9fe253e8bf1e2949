"""Deliveries that are due are sent, beside the requests of the API, and their outcomes written.

A thread asks the database (app/periodic.py) and an event loop of its own sends. A delivery is taken
under a lease; who dies between sending and writing has sent what another will send again, under
the same id. Of one job a delivery waits for the one before while that is under way, not while it
waits for its next attempt; to one host only so many go at once, so that none holds up the others.
"""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog
from anyio.from_thread import BlockingPortal, start_blocking_portal
from sqlalchemy import ColumnElement, Engine, Select, func, or_, select
from sqlalchemy.orm import Session
from standardwebhooks import Webhook

from app.db import ANSWER_SECONDS, make_engine, now
from app.failpoints import Point, failpoint
from app.net.client import AsyncPublicClient
from app.net.rules import Rules
from app.periodic import Periodic
from app.settings import Settings
from app.tables import WebhookDeliveryRow
from app.webhooks.backoff import next_attempt
from app.webhooks.notices import Notices
from app.webhooks.secrets import SecretUnreadable, Vault, adding, make_secret, secret_of
from app.webhooks.sending import Kind, Outcome, attempt, make_client

log = structlog.get_logger()

LEASE_SECONDS = 60  # an attempt takes 15 at most
PER_HOST, AT_ONCE = 4, 200
LOOK_UPS = 32  # of names at a time: a dead resolver holds each for long
CLOSE_SECONDS = 3
MOST_LOGGED = 50

Row = WebhookDeliveryRow


@dataclass(frozen=True)
class Taken:
    """A delivery under our lease."""

    id: str
    project: str
    host: str
    url: str
    body: str
    claims: int


class Courier:
    """Sends what is due. Any number of processes may: each delivery is taken by one at a time."""

    def __init__(self, engine: Engine, settings: Settings, count: Callable[[Kind], None]) -> None:
        """``count`` is told of every attempt."""
        self._reading = engine
        self._writing = engine.execution_options(writes=True)
        self._rules = Rules.of(settings)
        self._vault = Vault(settings.secret_key)
        self._count = count
        self._notices = Notices(engine)
        self._under_way: dict[Future[Outcome], Taken] = {}
        self._stack = ExitStack()
        self._portal: BlockingPortal | None = None
        self._client: AsyncPublicClient | None = None
        self._at_work = threading.Lock()
        self.when_done: Callable[[], None] = lambda: None

    def turn(self) -> None:
        """Write what came back, make deliveries of new events, and send what is due."""
        with self._at_work:
            self._write_outcomes()
            self._notices.make()
            self._send_due()

    def close(self) -> None:
        """What is under way may still arrive; what does not in time is sent again by others."""
        wait(self._under_way, CLOSE_SECONDS)
        if self._at_work.acquire(timeout=CLOSE_SECONDS):
            try:
                self._write_outcomes()
            except Exception as error:  # they are sent once more
                log.warning("outcomes of webhooks were not written", exc_info=error)
            finally:
                self._at_work.release()
        for future in self._under_way:
            future.cancel()
        self._stack.close()

    def _send_due(self) -> None:
        with Session(self._reading) as session:
            due = session.execute(ready()).all()
        chosen = self._choose([(row.id, row.host) for row in due])
        if not chosen:
            return
        with Session(self._writing) as session, session.begin():
            taken = _take(session, chosen)
            signers = {project: self._signers(session, project) for project in _projects(taken)}
        failpoint(Point.WEBHOOK_BEFORE_SEND)
        for delivery in taken:
            self._start(delivery, signers[delivery.project])

    def _choose(self, due: Sequence[tuple[str, str]]) -> list[str]:
        """Those for which there is room."""
        busy = Counter(taken.host for taken in self._under_way.values())
        chosen: list[str] = []
        for delivery_id, host in due:
            if len(self._under_way) + len(chosen) >= AT_ONCE:
                break
            if busy[host] < PER_HOST:
                busy[host] += 1
                chosen.append(delivery_id)
        return chosen

    def _signers(self, session: Session, project: str) -> Sequence[Webhook] | None:
        """None: the secret cannot be read, which is told in the log of the delivery."""
        dialect = session.get_bind().dialect.name
        row = session.scalar(secret_of(project))
        if row is None:
            session.execute(adding(dialect, self._vault.seal(make_secret()), project=project))
            row = session.scalars(secret_of(project)).one()
        try:
            return self._vault.signers(row)
        except SecretUnreadable as error:
            log.error("webhooks cannot be signed", project=project, error=str(error))
            return None

    def _start(self, delivery: Taken, signers: Sequence[Webhook] | None) -> None:
        if self._portal is None:
            self._open()
        assert self._portal is not None
        future = self._portal.start_task_soon(self._attempt, delivery, signers)
        self._under_way[future] = delivery
        future.add_done_callback(lambda _: self.when_done())

    def _open(self) -> None:
        """At the first delivery: a service without webhooks has neither loop nor client."""
        portal = self._stack.enter_context(start_blocking_portal(name="webhooks-loop"))
        portal.call(_let_names_be_looked_up)
        client = portal.call(_made, self._rules)
        self._client = self._stack.enter_context(portal.wrap_async_context_manager(client))
        self._portal = portal

    async def _attempt(self, delivery: Taken, signers: Sequence[Webhook] | None) -> Outcome:
        if signers is None:
            return _not_signed()
        assert self._client is not None
        outcome = await attempt(self._client, signers, delivery.url, delivery.id, delivery.body)
        failpoint(Point.WEBHOOK_AFTER_SEND)
        return outcome

    def _write_outcomes(self) -> None:
        done = {future: taken for future, taken in self._under_way.items() if future.done()}
        if not done:
            return
        outcomes = {taken: _outcome_of(future) for future, taken in done.items()}
        with Session(self._writing) as session, session.begin():
            _write(session, outcomes)
        for future, taken in done.items():
            del self._under_way[future]
            self._count(outcomes[taken].kind)


def ready() -> Select[str, str]:
    """Due and in nobody's hands, the first of its job; of each host the oldest, hosts in turn."""
    columns = (Row.id, Row.job_id, Row.seq, Row.host, Row.due_at, Row.leased_until)
    # Materialized: else SQLite reads the whole table in the order of the window that follows.
    due = select(*columns).where(Row.due_at <= now()).cte("due").prefix_with("MATERIALIZED")
    turn = func.row_number().over(partition_by=due.c.job_id, order_by=due.c.seq)
    in_turn = select(due, turn.label("turn")).subquery()
    place = func.row_number().over(partition_by=in_turn.c.host, order_by=in_turn.c.due_at)
    free = (
        select(in_turn.c.id, in_turn.c.host, in_turn.c.due_at, place.label("place"))
        .where(in_turn.c.turn == 1, _is_free(in_turn.c.leased_until))
        .subquery()
    )
    return (
        select(free.c.id, free.c.host)
        .where(free.c.place <= PER_HOST)
        .order_by(free.c.place, free.c.due_at)
    )


def _is_free(leased_until: ColumnElement[datetime | None]) -> ColumnElement[bool]:
    return or_(leased_until.is_(None), leased_until < now())


def _take(session: Session, chosen: Sequence[str]) -> list[Taken]:
    """Those of them that nobody else has taken meanwhile."""
    rows = session.scalars(
        select(Row)
        .where(Row.id.in_(chosen), Row.due_at <= now(), _is_free(Row.leased_until.expression))
        .with_for_update(skip_locked=True)
    ).all()
    taken = []
    for row in sorted(rows, key=lambda row: chosen.index(row.id)):
        claims = row.claims + 1
        taken.append(Taken(row.id, row.project, row.host, row.url, row.body, claims))
        row.claims, row.leased_until = claims, now(LEASE_SECONDS)
    return taken


def _write(session: Session, outcomes: Mapping[Taken, Outcome]) -> None:
    moment = session.scalars(select(now())).one()
    ours = {taken.id: (taken, outcome) for taken, outcome in outcomes.items()}
    rows = session.scalars(select(Row).where(Row.id.in_(ours)).order_by(Row.id).with_for_update())
    for row in rows:
        taken, outcome = ours[row.id]
        if row.claims == taken.claims:  # else another has taken it, as we were gone for long
            _note(row, outcome, moment)


def _note(row: Row, outcome: Outcome, moment: datetime) -> None:
    row.attempts = [*row.attempts, outcome.as_logged()][-MOST_LOGGED:]
    row.tries += 1
    row.leased_until = None
    row.due_at = None
    if outcome.is_delivered:
        row.state = "delivered"
        return
    if not outcome.is_final:
        asked_for = outcome.retry_after
        row.due_at = next_attempt(row.tries, moment, row.give_up_at, asked_for=asked_for)
    if row.due_at is None:
        row.state = "failed"
        log.warning("a webhook was given up", delivery=row.id, job_id=row.job_id, type=row.type)


def _outcome_of(future: Future[Outcome]) -> Outcome:
    error = future.exception()
    if error is None:
        return future.result()
    log.error("a webhook could not be sent, for a fault of ours", exc_info=error)
    told = "The service met an error of its own; its log has it."
    return Outcome("error", datetime.now(UTC), 0, error=told)


def _not_signed() -> Outcome:
    told = (
        "It could not be signed: the project's secret cannot be read with the FLATLORA_SECRET_KEY "
        "of this service. Set the right one, or rotate the secret (POST /webhooks/secret)."
    )
    return Outcome("error", datetime.now(UTC), 0, error=told)


def _projects(taken: Sequence[Taken]) -> set[str]:
    return {delivery.project for delivery in taken}


async def _let_names_be_looked_up() -> None:
    look_ups = ThreadPoolExecutor(LOOK_UPS, thread_name_prefix="webhooks-names")
    asyncio.get_running_loop().set_default_executor(look_ups)


async def _made(rules: Rules) -> AsyncPublicClient:
    return make_client(rules)


@contextmanager
def delivering(settings: Settings, count: Callable[[Kind], None]) -> Iterator[Periodic]:
    """Webhooks are told, beside the requests. What it gives can be nudged."""
    engine = make_engine(settings.database, answer_seconds=ANSWER_SECONDS)
    courier = Courier(engine, settings, count)
    duty = Periodic("webhooks", settings.webhook_seconds, courier.turn)
    courier.when_done = duty.nudge
    try:
        with duty:
            yield duty
    finally:
        courier.close()
        engine.dispose()
