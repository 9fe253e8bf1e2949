"""Whether the process lives, whether it can serve, and what it is. None of these asks for a key."""

import asyncio
import os
import platform
from pathlib import Path

from fastapi import APIRouter, Request
from pydantic import BaseModel
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from app import __version__
from app.errors import NotReady
from app.migrate import head

router = APIRouter(tags=["service"])


class Health(BaseModel):
    status: str = "ok"


class Version(BaseModel):
    version: str
    python: str


@router.get("/healthz", summary="Does the process live?")
async def healthz() -> Health:
    return Health()


@router.get("/readyz", summary="Can it serve?")
async def readyz(request: Request) -> Health:
    """Database reachable and migrated, store writable."""
    settings = request.state.settings
    try:
        async with request.state.database.reading() as session:
            revision = await session.scalar(text("SELECT version_num FROM alembic_version"))
    except SQLAlchemyError as error:
        raise NotReady("The database does not answer.", "Check FLATLORA_DATABASE_URL.") from error
    if revision != head():
        raise NotReady(
            f"The database is at migration {revision}, this program expects {head()}.",
            "Run `flatlora up`, or migrate the database.",
        )
    if not await asyncio.to_thread(_is_writable, settings.artifacts_dir):
        raise NotReady("The artifact folder cannot be written.", "Check the disk and its rights.")
    return Health()


@router.get("/version", summary="Which version is this?")
async def version() -> Version:
    return Version(version=__version__, python=platform.python_version())


def _is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)
