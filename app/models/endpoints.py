"""Base models that a job may name."""

import asyncio

from fastapi import APIRouter, Request

from app.errors import problems
from app.models.folders import find_models
from app.models.schemas import Limits, ModelList

router = APIRouter(prefix="/models", tags=["models"])


@router.get("", summary="List base models", responses=problems())
async def list_models(request: Request) -> ModelList:
    settings = request.state.settings
    return ModelList(
        items=await asyncio.to_thread(find_models, settings.model_roots),
        hub=settings.hub_models,
        limits=Limits(max_rank=1024, max_sigma=1),
    )
