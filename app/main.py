"""The application: what it holds, who answers, and how errors look."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypedDict

from fastapi import Depends, FastAPI

from app import __version__, health, metrics
from app.adapters import endpoints as adapters
from app.auth import ensure_key, require_key
from app.broker_health import BrokerHealth
from app.changes import Changes, told_to_stop
from app.datasets import endpoints as datasets
from app.datasets.uploads import forget_broken
from app.db import ANSWER_SECONDS, Database, make_engine
from app.errors import install_error_handlers
from app.jobs import endpoints as jobs
from app.jobs import record_endpoints as records
from app.logs import configure_logs
from app.middleware import BodyLimit, RequestLog, SameSite
from app.models import endpoints as models
from app.openapi import describe
from app.periodic import Periodic
from app.settings import Settings, get_settings
from app.storage import ArtifactStore, open_store
from app.tracing import configure_tracing, flush, telemetry
from app.workers import endpoints as workers

DESCRIPTION = """
Fine-tunes language models to follow instructions, with
[Flat-LoRA](https://arxiv.org/abs/2409.14396): `POST /jobs`, poll `GET /jobs/{id}`, download
`GET /jobs/{id}/adapter`. Errors are problems (RFC 9457) with a stable `code`.
"""


class State(TypedDict):
    settings: Settings
    database: Database
    store: ArtifactStore
    key: str | None
    wakes: Periodic | None
    """Sends wake-ups to the workers of a cluster."""
    changes: Changes
    """Tells long-polls and streams."""
    broker: BrokerHealth
    metrics: metrics.Metrics


@contextmanager
def relay(settings: Settings) -> Iterator[Periodic | None]:
    """What is left in the outbox goes to the broker, beside the requests."""
    if not settings.is_cluster:
        yield None
        return
    from app.broker import make_celery  # a laptop's service starts without Celery
    from app.outbox import Relay

    engine = make_engine(settings.database, answer_seconds=ANSWER_SECONDS)
    sender = Relay(engine, make_celery(settings.broker_url))
    try:
        with Periodic("relay", settings.relay_seconds, sender.send_due) as wakes:
            yield wakes
    finally:
        engine.dispose()


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
        store = open_store(settings)
        forget_broken(settings.uploads_dir)
        try:
            with relaying as wakes, told_to_stop(changes.close):
                yield State(
                    settings=settings, database=database, store=store, key=key, wakes=wakes,
                    changes=changes, broker=broker, metrics=numbers,
                )  # fmt: skip
        finally:
            await changes.aclose()
            await database.engine.dispose()
            await asyncio.to_thread(flush)

    app = FastAPI(
        title="flatlora",
        description=DESCRIPTION,
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
        telemetry=telemetry(),
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    install_error_handlers(app)
    app.include_router(health.router)
    app.include_router(metrics.router)
    with_key: dict[str, Any] = {"dependencies": [Depends(require_key)]}
    app.include_router(jobs.router, **with_key)
    app.include_router(records.router, **with_key)
    app.include_router(adapters.router, **with_key)
    app.include_router(datasets.router, **with_key)
    app.include_router(models.router, **with_key)
    app.include_router(workers.router, **with_key)
    app.add_middleware(
        BodyLimit, bytes=settings.max_body_bytes, upload_bytes=settings.max_upload_bytes
    )
    app.add_middleware(SameSite, hosts=settings.hosts)
    app.add_middleware(RequestLog, metrics=numbers)
    describe(app)
    return app


def make_app() -> FastAPI:
    """For a server: ``uvicorn --factory app.main:make_app``."""
    settings = get_settings()
    configure_logs(settings)
    configure_tracing("flatlora-api")
    return create_app(settings)
