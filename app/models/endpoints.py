"""Base models that a job may name."""

import asyncio

from fastapi import APIRouter, Request

from app.errors import Unauthenticated, problems
from app.jobs.schemas import MAX_RANK, MAX_SIGMA
from app.models.folders import find_models
from app.models.schemas import Limits, ModelList
from app.settings import Settings

router = APIRouter(prefix="/models", tags=["models"])


@router.get("", summary="List base models", responses=problems(Unauthenticated))
async def list_models(request: Request) -> ModelList:
    settings: Settings = request.state.settings
    return ModelList(
        items=await asyncio.to_thread(find_models, settings.model_roots),
        hub=settings.hub_models,
        limits=Limits(
            max_rank=MAX_RANK,
            max_sigma=MAX_SIGMA,
            max_dataset_bytes=settings.max_dataset_bytes,
        ),
    )
