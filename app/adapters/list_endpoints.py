"""The adapters that are there, each with where it is downloaded."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import Field, model_validator

from app.adapters.schemas import AdapterPage, FinishedAdapter
from app.adapters.service import AdapterService
from app.errors import AdapterNotFound, InvalidRequest, Unauthenticated
from app.jobs.endpoints import LIST_FAULTS, Page, PlainText, label_filters
from app.jobs.repository import JobFilter
from app.problems import problems
from app.sessions import ReadSession

router = APIRouter(prefix="/adapters", tags=["adapters"])


class ListQuery(Page):
    base_model: PlainText | None = None
    limit: int = Field(20, ge=1, le=100)
    after: str | None = Field(None, max_length=256, description="`next` of the page before.")

    @model_validator(mode="before")
    @classmethod
    def _without_labels(cls, values: dict[str, Any]) -> dict[str, Any]:
        """``label_filters`` reads those."""
        return {name: value for name, value in values.items() if not name.startswith("label.")}


def reading(request: Request, session: ReadSession) -> AdapterService:
    return AdapterService(session, request.scope.get("root_path", ""))


Reading = Annotated[AdapterService, Depends(reading)]


@router.get(
    "",
    responses=problems(Unauthenticated, InvalidRequest, faults=LIST_FAULTS),
    summary="List finished adapters, newest first",
)
async def list_adapters(
    adapters: Reading,
    query: Annotated[ListQuery, Query()],
    labels: Annotated[dict[str, str], Depends(label_filters)],
) -> AdapterPage:
    """Filter by a label of the job with `label.<name>=<value>`."""
    wanted = JobFilter(base_model=query.base_model, labels=labels)
    return await adapters.list(wanted, limit=query.limit, after=query.after)


@router.get(
    "/{job_id}",
    responses=problems(Unauthenticated, AdapterNotFound),
    summary="Show a finished adapter",
)
async def show_adapter(job_id: str, adapters: Reading) -> FinishedAdapter:
    return await adapters.get(job_id)
