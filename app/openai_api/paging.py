"""Pages as OpenAI's clients turn them: ``after`` is the id of the last item seen."""

from typing import Annotated

from pydantic import Field

from app.jobs.endpoints import Page

After = Annotated[str | None, Field(max_length=256, description="Id of the last item seen.")]


class PageQuery(Page):
    limit: int = Field(20, ge=1, le=1000)
    after: After = None
