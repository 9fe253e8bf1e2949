"""The application: what it holds, who answers, and how errors look."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, TypedDict

from fastapi import APIRouter, Depends, FastAPI

from app import __version__, health, metrics, pages
from app.access import endpoints as keys
from app.access.authenticator import Authenticator
from app.access.dependencies import require_access
from app.access.rates import Rates
from app.access.shared_key import ensure_key
from app.access.streams import UploadsEndWithTheirKey
from app.adapters import endpoints as adapters
from app.adapters import list_endpoints as adapter_list
from app.audit import endpoints as audit
from app.broker_health import BrokerHealth
from app.changes import Changes, told_to_stop
from app.datasets import endpoints as datasets
from app.datasets import upload_endpoints as uploads
from app.datasets.resumable import Joins
from app.datasets.uploads import forget_broken
from app.db import ANSWER_SECONDS, Database, make_engine
from app.jobs import endpoints as jobs
from app.jobs import record_endpoints as records
from app.logs import configure_logs
from app.middleware import BodyLimit, RequestLog, SameSite
from app.models import endpoints as models
from app.models.catalogue import Catalogue
from app.openai_api import endpoints as openai_api
from app.openapi import describe
from app.periodic import Periodic
from app.problems import install_error_handlers
from app.quotas import endpoints as quotas
from app.quotas.limits import KnownLimits
from app.settings import Settings, get_settings
from app.storage import ArtifactStore, open_store
from app.tracing import configure_tracing, flush, telemetry
from app.webhooks import endpoints as webhooks
from app.webhooks.courier import delivering
from app.workers import endpoints as workers

if TYPE_CHECKING:
    from app.access.oidc import Tokens

DESCRIPTION = """
Fine-tunes language models to follow instructions, with
[Flat-LoRA](https://arxiv.org/abs/2409.14396): `POST /jobs`, poll `GET /jobs/{id}`, download
`GET /jobs/{id}/adapter`. Errors are problems (RFC 9457) with a stable `code`.
"""


class State(TypedDict):
    settings: Settings
    database: Database
    store: ArtifactStore
    authenticator: Authenticator
    wakes: Periodic | None
    """Sends wake-ups to the workers of a cluster."""
    deliveries: Periodic
    """Sends webhooks."""
    changes: Changes
    """Tells long-polls and streams."""
    broker: BrokerHealth
    metrics: metrics.Metrics
    models: Catalogue
    joins: Joins
    known_limits: KnownLimits
    rates: Rates


@contextmanager
def relay(settings: Settings) -> Iterator[Periodic | None]:
    """What is left in the outbox goes to the broker, beside the requests."""
    if not settings.is_cluster:
        yield None
        return
    from app.broker import make_celery  # a laptop's service starts without Celery
    from app.outbox import GATHER_SECONDS, Relay

    engine = make_engine(settings.database, answer_seconds=ANSWER_SECONDS)
    sender = Relay(engine, make_celery(settings.broker_url))
    try:
        with Periodic(
            "relay", settings.relay_seconds, sender.send_due, gather_seconds=GATHER_SECONDS
        ) as wakes:
            yield wakes
    finally:
        engine.dispose()


@asynccontextmanager
async def counting(settings: Settings) -> AsyncIterator[Rates]:
    """Requests are counted together by all API processes of a cluster."""
    if not settings.is_cluster:
        yield Rates(settings)
        return
    from app.access.exchange import Exchange  # a laptop's service has no Redis

    exchange = Exchange(settings.broker_url)
    telling = asyncio.create_task(exchange.run())
    try:
        yield Rates(settings, exchange)
    finally:
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)


def open_tokens(settings: Settings) -> "Tokens | None":
    if not settings.oidc_issuer:
        return None
    from app.access.oidc import Tokens  # most services have no identity provider

    return Tokens(settings)


def create_app(settings: Settings) -> FastAPI:
    broker = BrokerHealth(settings.broker_url)
    numbers = metrics.Metrics(settings, broker)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[State]:
        database = Database(settings.database)
        numbers.read_from(database)
        relaying = relay(settings)
        changes = Changes(database)
        key = ensure_key(settings)[0] if settings.auth == "key" else None
        authenticator = Authenticator(
            database, key, open_tokens(settings), settings.failed_keys_per_minute
        )
        store = open_store(settings)
        forget_broken(settings.uploads_dir)
        joins = Joins()
        try:
            async with counting(settings) as rates:
                with (
                    relaying as wakes,
                    delivering(settings, numbers.webhook_attempted) as deliveries,
                    told_to_stop(changes.close),
                ):
                    yield State(
                        settings=settings, database=database, store=store,
                        authenticator=authenticator, wakes=wakes, deliveries=deliveries,
                        changes=changes, broker=broker, metrics=numbers,
                        models=Catalogue(settings.model_roots), joins=joins,
                        known_limits=KnownLimits(database, settings), rates=rates,
                    )  # fmt: skip
        finally:
            joins.close()
            await changes.aclose()
            await authenticator.close()
            await database.engine.dispose()
            await asyncio.to_thread(flush)

    app = FastAPI(
        title="flatlora",
        description=DESCRIPTION,
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # app/pages.py
        redoc_url=None,
        telemetry=telemetry(),
        generate_unique_id_function=lambda route: route.name,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    install_error_handlers(app)
    app.include_router(health.router)
    app.include_router(metrics.router)
    app.include_router(pages.router)
    for routes in (
        jobs, records, adapters, adapter_list, datasets, uploads, models, workers, webhooks, keys,
        audit, quotas,
    ):  # fmt: skip
        _include(app, routes.router)
    _include(app, openai_api.router)
    app.add_middleware(UploadsEndWithTheirKey)
    app.add_middleware(
        BodyLimit,
        bytes=settings.max_body_bytes,
        upload_bytes=settings.max_upload_bytes,
        part_bytes=settings.max_part_bytes,
    )
    app.add_middleware(SameSite, hosts=settings.hosts)
    app.add_middleware(RequestLog, metrics=numbers)
    describe(app)
    return app


def _include(app: FastAPI, router: APIRouter) -> None:
    """Routes that ask who is there; what any of them may answer is told by app/openapi.py."""
    app.include_router(router, dependencies=[Depends(require_access)])


def make_app() -> FastAPI:
    """For a server: ``uvicorn --factory app.main:make_app``."""
    settings = get_settings()
    configure_logs(settings)
    configure_tracing("flatlora-api")
    return create_app(settings)
