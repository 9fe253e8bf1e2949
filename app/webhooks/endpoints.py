"""The routes of webhooks: the log of a job's deliveries, the project's secret, the test button."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import APIRouter, BackgroundTasks, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession
from standardwebhooks import Webhook

from app.access.dependencies import admins_only
from app.db import now
from app.errors import (
    DeliveryNotFound,
    Forbidden,
    InvalidRequest,
    JobNotFound,
    Unauthenticated,
    WebhookSecretUnreadable,
)
from app.faults import Fault
from app.ids import is_id, new_id
from app.jobs.repository import JobRepository
from app.net.errors import NetError
from app.net.rules import Rules
from app.net.urls import check_url
from app.problems import problems
from app.sessions import ReadSession, WriteSession, note_change, transaction, write_down
from app.tables import WebhookDeliveryRow, WebhookSecretRow
from app.webhooks.backoff import GIVE_UP_SECONDS
from app.webhooks.notices import payload
from app.webhooks.schemas import (
    Delivery,
    DeliveryPage,
    WebhookSecret,
    WebhookTest,
    WebhookTested,
    present,
)
from app.webhooks.secrets import SecretUnreadable, Vault, adding, make_secret, rotating, secret_of
from app.webhooks.sending import attempt, make_client

# Not in the API's own threads: a name server that never answers holds each for long.
LOOK_UPS = ThreadPoolExecutor(4, thread_name_prefix="webhook-test-names")
router = APIRouter(tags=["webhooks"])

Row = WebhookDeliveryRow
URL_FAULTS = ("uri_malformed", "uri_scheme_unsupported", "address_not_allowed", "port_not_allowed")


class DeliveryQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    after: int = Field(0, ge=0, le=2**31 - 1, description="Number of the last event seen.")
    limit: int = Field(100, ge=1, le=1000)


def get_vault(request: Request) -> Vault:
    return Vault(request.state.settings.secret_key)


UseVault = Annotated[Vault, Depends(get_vault)]


@router.get(
    "/jobs/{job_id}/deliveries",
    responses=problems(Unauthenticated, JobNotFound, InvalidRequest),
    summary="What became of a job's webhooks",
)
async def list_deliveries(
    job_id: str, session: ReadSession, query: Annotated[DeliveryQuery, Query()]
) -> DeliveryPage:
    """In the order of the events."""
    if await JobRepository(session).get(job_id) is None:
        raise JobNotFound(job_id)
    statement = select(Row).where(Row.job_id == job_id, Row.seq > query.after)
    rows = (await session.scalars(statement.order_by(Row.seq).limit(query.limit + 1))).all()
    shown = rows[: query.limit]
    return DeliveryPage(
        items=[present(row) for row in shown],
        next=shown[-1].seq if len(rows) > query.limit else None,
    )


@router.post(
    "/deliveries/{delivery_id}/retry",
    status_code=202,
    responses=problems(Unauthenticated, Forbidden, DeliveryNotFound),
    summary="Send a delivery again",
)
async def retry_delivery(
    delivery_id: str, session: WriteSession, request: Request, background: BackgroundTasks
) -> Delivery:
    """Now, and for another day if need be. Also one that has arrived: the receiver knows its id."""
    statement = (
        update(Row)
        .where(Row.id == delivery_id)
        .values(state="pending", due_at=now(), tries=0, give_up_at=now(GIVE_UP_SECONDS))
        .returning(Row)
    )
    row = await session.scalar(statement) if is_id(delivery_id, "msg") else None
    if row is None:
        raise DeliveryNotFound(delivery_id)
    background.add_task(request.state.deliveries.nudge)  # after the commit and the answer
    return present(row)


@router.get(
    "/webhooks/secret",
    dependencies=[Depends(admins_only)],
    responses=problems(Unauthenticated, Forbidden, WebhookSecretUnreadable),
    summary="Show what webhooks are signed with",
)
async def show_webhook_secret(
    session: WriteSession, vault: UseVault, request: Request
) -> WebhookSecret:
    """Made when it is first asked for. The audit log keeps who has seen it."""
    note_change(request, "webhook_secret")
    return _shown(await _secret(session, vault), vault)


@router.post(
    "/webhooks/secret",
    dependencies=[Depends(admins_only)],
    responses=problems(Unauthenticated, Forbidden),
    summary="Rotate what webhooks are signed with",
)
async def rotate_webhook_secret(
    session: WriteSession, vault: UseVault, request: Request
) -> WebhookSecret:
    """For 24 hours the secret before signs too: each webhook then carries both signatures."""
    note_change(request, "webhook_secret")
    row = await _secret(session, vault)
    await session.execute(
        rotating(vault.seal(make_secret()), keep_previous=_is_readable(row, vault))
    )
    return _shown(await _secret(session, vault), vault)


@router.post(
    "/webhooks/test",
    responses=problems(Unauthenticated, InvalidRequest, WebhookSecretUnreadable, faults=URL_FAULTS),
    summary="Send a webhook now",
)
async def test_webhook(body: WebhookTest, vault: UseVault, request: Request) -> WebhookTested:
    """A signed `webhook.test`, once. The answer says what came back."""
    rules = Rules.of(request.state.settings)
    try:
        check_url(body.url, rules)
    except NetError as error:
        fault = Fault(pointer="/url", detail=error.detail, code=error.code)
        raise InvalidRequest(error.detail, error.hint, faults=[fault]) from error
    async with transaction(request, writes=True) as session:
        signers = _signers(await _secret(session, vault), vault)
        await write_down(request, session, urlsplit(body.url).hostname or "")
    message_id = new_id("msg")
    told = payload("webhook.test", datetime.now(UTC), {"message": "Webhooks arrive here."})
    async with make_client(rules, LOOK_UPS) as client:  # the database is not held meanwhile
        outcome = await attempt(client, signers, body.url, message_id, told)
    return WebhookTested(id=message_id, delivered=outcome.is_delivered, **outcome.as_logged())


async def _secret(session: AsyncSession, vault: Vault) -> WebhookSecretRow:
    row: WebhookSecretRow | None = await session.scalar(secret_of())
    if row is None:
        dialect = session.get_bind().dialect.name
        await session.execute(adding(dialect, vault.seal(make_secret())))
        row = (await session.scalars(secret_of())).one()
    return row


def _signers(row: WebhookSecretRow, vault: Vault) -> Sequence[Webhook]:
    try:
        return vault.signers(row)
    except SecretUnreadable as error:
        raise WebhookSecretUnreadable(str(error)) from error


def _is_readable(row: WebhookSecretRow, vault: Vault) -> bool:
    try:
        vault.open(row.secret)
    except SecretUnreadable:
        return False
    return True


def _shown(row: WebhookSecretRow, vault: Vault) -> WebhookSecret:
    try:
        secret = vault.open(row.secret)
    except SecretUnreadable as error:
        raise WebhookSecretUnreadable(str(error)) from error
    return WebhookSecret(
        secret=secret, created_at=row.created_at, previous_until=row.previous_until
    )
