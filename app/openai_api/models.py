"""``/v1/models``: base models that a job may name, and finished adapters."""

import asyncio

from fastapi import APIRouter, BackgroundTasks, Request

from app.errors import IllegalTransition, JobNotFound, Unauthenticated
from app.ids import is_id
from app.jobs import endpoints as native
from app.jobs.endpoints import Reading, Writing
from app.jobs.service import JobService
from app.models.endpoints import list_models
from app.openai_api.errors import BaseModelStays, ModelNotFound, refusals
from app.openai_api.presenting import has_adapter, unix
from app.openai_api.repository import OpenAIRepository
from app.openai_api.schemas import Model, ModelDeleted, ModelPage
from app.openai_api.shape import PREFIX
from app.sessions import ReadSession
from app.settings import Settings
from app.uris import UriError, check_hub_id, resolve_model_folder

router = APIRouter(prefix=f"{PREFIX}/models", tags=["openai"])

BASE = "base"


@router.get("", responses=refusals(Unauthenticated), summary="List base models and adapters")
async def list_openai_models(session: ReadSession, request: Request) -> ModelPage:
    """Of the hub's models those that the settings name; patterns such as `org/*` name no model."""
    adapters = [
        Model(id=job_id, created=unix(finished_at), owned_by=project)
        for job_id, project, finished_at in await OpenAIRepository(session).adapters()
    ]
    known = await list_models(request)
    named = [name for name in known.hub if "*" not in name]
    bases = await asyncio.to_thread(
        _bases, [*(model.id for model in known.items), *named], request.state.settings
    )
    return ModelPage(data=[*adapters, *bases])


def _bases(names: list[str], settings: Settings) -> list[Model]:
    found = (_base(name, settings) for name in names)
    return [model for model in found if model]


def _base(name: str, settings: Settings) -> Model | None:
    """None where a job that names it would be refused."""
    created = 0
    try:
        if name.startswith("file:"):
            folder = resolve_model_folder(name, settings.model_roots)
            created = int((folder / "config.json").stat().st_mtime)
        else:
            check_hub_id(name, settings.hub_models)
    except (UriError, OSError):
        return None
    return Model(id=name, created=created, owned_by=BASE)


@router.get(
    "/{model:path}",
    responses=refusals(Unauthenticated, ModelNotFound),
    summary="Show a base model or an adapter",
)
async def get_openai_model(model: str, jobs: Reading, request: Request) -> Model:
    """A model of the hub is one that a job may name: the hub itself is not asked."""
    if is_id(model, "job"):
        return await _adapter(model, jobs)
    if found := await asyncio.to_thread(_base, model, request.state.settings):
        return found
    raise ModelNotFound(model)


@router.delete(
    "/{model:path}",
    responses=refusals(Unauthenticated, ModelNotFound, BaseModelStays, IllegalTransition),
    summary="Delete an adapter, with its job",
)
async def delete_openai_model(
    model: str, jobs: Writing, request: Request, background: BackgroundTasks
) -> ModelDeleted:
    if is_id(model, "job"):
        await _adapter(model, jobs)
        await native.delete_job(model, jobs, request, background)
        return ModelDeleted(id=model)
    if await asyncio.to_thread(_base, model, request.state.settings):
        raise BaseModelStays(f"{model!r} is a base model.", "Adapters alone are deleted.")
    raise ModelNotFound(model)


async def _adapter(job_id: str, jobs: JobService) -> Model:
    try:
        row = await jobs.row(job_id)
    except JobNotFound:
        raise ModelNotFound(job_id) from None
    if not has_adapter(row) or not row.finished_at:
        raise ModelNotFound(job_id)
    return Model(id=row.id, created=unix(row.finished_at), owned_by=row.project)
