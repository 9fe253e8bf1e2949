"""Base models that a job may name."""

from fastapi import APIRouter, Request

from app.errors import Unauthenticated
from app.models.schemas import Limits, ModelList
from app.problems import problems
from app.settings import Settings

router = APIRouter(prefix="/models", tags=["models"])


@router.get("", summary="List base models", responses=problems(Unauthenticated))
async def list_models(request: Request) -> ModelList:
    """A folder that has come or gone is seen within a few seconds."""
    settings: Settings = request.state.settings
    return ModelList(
        items=await request.state.models.found(),
        hub=settings.hub_models,
        limits=Limits(max_dataset_bytes=settings.max_dataset_bytes),
    )
