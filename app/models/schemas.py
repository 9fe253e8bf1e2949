from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from app.jobs.schemas import MAX_RANK, MAX_SIGMA

ALWAYS_THERE = ConfigDict(json_schema_serialization_defaults_required=True)


class ModelLimits(BaseModel):
    model_config = ALWAYS_THERE

    max_length: int | None = Field(
        description="Tokens of a row; of a longer one the rest is cut. null: its own "
        "configuration does not say, or is not known here."
    )
    max_rank: int = MAX_RANK
    max_sigma: float = MAX_SIGMA


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
    limits: ModelLimits


class Limits(BaseModel):
    """Of every job here, whichever its base model."""

    model_config = ALWAYS_THERE

    max_rank: int = MAX_RANK
    max_sigma: float = MAX_SIGMA
    max_dataset_bytes: int


class ModelList(BaseModel):
    items: list[BaseModelInfo] = Field(description="Folders below the configured roots.")
    hub: list[str] = Field(description="Hub ids that may be named; * stands for anything.")
    hub_limits: ModelLimits = Field(
        default_factory=lambda: ModelLimits(max_length=None),
        description="Of each model that `hub` lets in.",
    )
    limits: Limits
