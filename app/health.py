"""Whether the process lives, whether it can serve, and what it is. None of these asks for a key."""

import asyncio
import platform
from typing import Literal, Self

import structlog
from fastapi import APIRouter, Request
from obstore.exceptions import BaseError
from pydantic import BaseModel, Field
from sqlalchemy import inspect, text
from sqlalchemy.exc import SQLAlchemyError

from app import __version__
from app.broker_health import BrokerState
from app.datasets.uris import schemes
from app.db import Database
from app.errors import NotReady
from app.jobs.schemas import MAX_RANK, MAX_SIGMA
from app.migrate import head
from app.problems import problems
from app.settings import Settings
from app.storage import ArtifactStore

log = structlog.get_logger()
router = APIRouter(tags=["service"])

PATIENCE_SECONDS = 5


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(Health):
    broker: BrokerState | None = Field(
        None, description="Jobs are accepted without it too. null: this service has none."
    )


class Features(BaseModel):
    """What a client has to know of this service before it sends anything."""

    mode: Literal["embedded", "cluster"] = Field(
        description="One machine, or workers on several: there, paths are the workers' own."
    )
    auth: Literal["key", "none"] = Field(description="Whether requests need a key.")
    dataset_schemes: list[str] = Field(description="Beginnings of `dataset_uri`.")
    downloads: Literal["stream", "redirect"] = Field(
        description="Files of adapters come from here, or by 307 from the store."
    )
    max_body_bytes: int = Field(description="Of a request that is no upload.")
    max_dataset_bytes: int
    max_part_bytes: int = Field(description="Of one part of `PATCH /datasets/uploads/{sha256}`.")
    max_rank: int
    max_sigma: float

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls(
            mode="cluster" if settings.is_cluster else "embedded",
            auth=settings.auth,
            dataset_schemes=schemes(settings),
            downloads=settings.downloads,
            max_body_bytes=settings.max_body_bytes,
            max_dataset_bytes=settings.max_dataset_bytes,
            max_part_bytes=settings.max_part_bytes,
            max_rank=MAX_RANK,
            max_sigma=MAX_SIGMA,
        )


class Version(BaseModel):
    version: str
    api: Literal["1"] = Field("1", description="Raised when what clients rely on changes.")
    commit: str | None = Field(description="Of the code, where its builder has noted that.")
    python: str
    features: Features


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", summary="Does the process live?")
async def healthz() -> Health:
    return Health()


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", summary="Can it serve?", responses=problems(NotReady))
async def readyz(request: Request) -> Readiness:
    """Database reachable and migrated, store writable. An unreachable broker is only told."""
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await _check_database(request.state.database)
            await _check_store(request.state.store)
    except TimeoutError as error:
        raise NotReady("The database or the store does not answer.", "Try again.") from error
    return Readiness(broker=await request.state.broker.state())


@router.head("/version", include_in_schema=False)
@router.get("/version", summary="Which version is this, and what can it do?")
async def version(request: Request) -> Version:
    settings: Settings = request.state.settings
    return Version(
        version=__version__,
        commit=settings.commit or None,
        python=platform.python_version(),
        features=Features.of(settings),
    )


async def _check_database(database: Database) -> None:
    try:
        async with database.engine.connect() as connection:
            tables = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
            query = text("SELECT version_num FROM alembic_version")
            found = await connection.scalar(query) if "alembic_version" in tables else None
    except (SQLAlchemyError, OSError) as error:
        log.warning("the database does not answer", exc_info=error)
        raise NotReady("The database does not answer.", "Check FLATLORA_DATABASE_URL.") from error
    expected = await asyncio.to_thread(head)
    if found != expected:
        raise NotReady(
            f"The database is at migration {found or 'none'}, this program expects {expected}.",
            "Run `flatlora migrate`.",
        )


async def _check_store(store: ArtifactStore) -> None:
    try:
        await store.probe()
    except (BaseError, OSError) as error:
        log.warning("the store cannot be written", exc_info=error)
        raise NotReady(
            "The artifact store cannot be written.", "Check its disk and its rights."
        ) from error
