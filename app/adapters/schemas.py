"""The wire types of finished adapters."""

from datetime import datetime
from typing import Any, Self

from pydantic import BaseModel, Field

from app.jobs.answers import AdapterFile


class AdapterMetrics(BaseModel):
    """What training has come to; null where the trainer has not said."""

    loss_before: float | None = Field(None, description="Held-out loss of the base model.")
    loss_after: float | None = Field(None, description="Held-out loss of base and adapter.")
    accuracy_before: float | None = Field(None, description="Share of held-out tokens guessed.")
    accuracy_after: float | None = None
    held_out_rows: int | None = None
    steps: int | None = Field(None, description="Optimizer steps that were made.")
    kept_step: int | None = Field(None, description="The step of which this is the adapter.")
    epochs: float | None = None
    train_tokens: int | None = None
    trainable_parameters: int | None = None

    @classmethod
    def of(cls, result: dict[str, Any]) -> Self:
        """From a job's ``result``."""
        held_out = result.get("held_out") or {}
        before, after = held_out.get("before") or {}, held_out.get("after") or {}
        names = ("steps", "kept_step", "epochs", "train_tokens", "trainable_parameters")
        return cls(
            loss_before=before.get("loss"),
            loss_after=after.get("loss"),
            accuracy_before=before.get("accuracy"),
            accuracy_after=after.get("accuracy"),
            held_out_rows=held_out.get("rows"),
            **{name: result.get(name) for name in names},
        )


class StoredFile(AdapterFile):
    url: str = Field(description="Where it is downloaded.")


class FinishedAdapter(BaseModel):
    job_id: str
    name: str | None
    labels: dict[str, str]
    base_model: str
    base_model_revision: str | None = Field(
        description="Commit of a hub model, where it is known; else what the job asked for."
    )
    rank: int
    sigma: float
    metrics: AdapterMetrics
    size: int = Field(description="Bytes of all files.")
    files: list[StoredFile]
    url: str = Field(description="Where all files are downloaded, as one tar.")
    created_at: datetime = Field(description="When its job succeeded.")


class AdapterPage(BaseModel):
    items: list[FinishedAdapter]
    next: str | None = Field(description="Cursor of the next page: pass it as `after`.")
