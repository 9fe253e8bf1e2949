"""Whether the process lives, whether it can serve, and what it is. None of these asks for a key."""

import asyncio
import platform
from typing import Literal

import structlog
from fastapi import APIRouter, Request
from obstore.exceptions import BaseError
from pydantic import BaseModel, Field
from sqlalchemy import inspect, text
from sqlalchemy.exc import SQLAlchemyError

from app import __version__
from app.broker_health import BrokerState
from app.db import Database
from app.errors import NotReady, problems
from app.migrate import head
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


class Version(BaseModel):
    version: str
    api: int = 1
    python: str


@router.get("/healthz", summary="Does the process live?")
async def healthz() -> Health:
    return Health()


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


@router.get("/version", summary="Which version is this?")
async def version() -> Version:
    return Version(version=__version__, python=platform.python_version())


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
