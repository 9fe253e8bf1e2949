"""The application: what it holds, who answers, and how errors look."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypedDict

from fastapi import Depends, FastAPI

from app import __version__, health
from app.adapters import endpoints as adapters
from app.auth import ensure_key, require_key
from app.datasets import endpoints as datasets
from app.datasets.uploads import forget_broken
from app.db import Database
from app.errors import install_error_handlers
from app.jobs import endpoints as jobs
from app.logs import configure_logs
from app.middleware import BodyLimit, RequestLog, SameSite
from app.models import endpoints as models
from app.openapi import describe
from app.settings import Settings, get_settings
from app.storage import ArtifactStore

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


def create_app(settings: Settings) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[State]:
        database = Database(settings.database)
        key = ensure_key(settings)[0] if settings.auth == "key" else None
        store = ArtifactStore.local(settings.artifacts_dir)
        forget_broken(settings.uploads_dir)
        try:
            yield State(settings=settings, database=database, store=store, key=key)
        finally:
            await database.engine.dispose()

    app = FastAPI(
        title="flatlora",
        description=DESCRIPTION,
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
        telemetry={"tracing": False},
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    install_error_handlers(app)
    app.include_router(health.router)
    with_key: dict[str, Any] = {"dependencies": [Depends(require_key)]}
    app.include_router(jobs.router, **with_key)
    app.include_router(adapters.router, **with_key)
    app.include_router(datasets.router, **with_key)
    app.include_router(models.router, **with_key)
    app.add_middleware(
        BodyLimit, bytes=settings.max_body_bytes, upload_bytes=settings.max_upload_bytes
    )
    app.add_middleware(SameSite, hosts=settings.hosts)
    app.add_middleware(RequestLog)
    describe(app)
    return app


def make_app() -> FastAPI:
    """For a server: ``uvicorn --factory app.main:make_app``."""
    configure_logs()
    return create_app(get_settings())
