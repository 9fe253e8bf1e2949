from typing import Literal

from pydantic import BaseModel, Field


class BaseModelInfo(BaseModel):
    id: str = Field(description="What a job names it by.")
    source: Literal["folder"]
    architecture: str | None
    parameters: int | None
    size_bytes: int
    max_positions: int | None = Field(description="The longest row that it can read, in tokens.")
    dtype: str | None
    has_chat_template: bool = Field(description="Without one it cannot be tuned on conversations.")
    vocabulary: int | None


class Limits(BaseModel):
    max_rank: int
    max_sigma: float
    max_dataset_bytes: int


class ModelList(BaseModel):
    items: list[BaseModelInfo] = Field(description="Folders below the configured roots.")
    hub: list[str] = Field(description="Hub ids that may be named; * stands for anything.")
    limits: Limits
