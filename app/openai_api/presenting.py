"""A job, its events and its checkpoints as OpenAI's clients read them."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from app.jobs.schemas import JobCreate
from app.jobs.states import Phase, Reason, Status
from app.openai_api.creation import LEARNING_RATE
from app.openai_api.ids import checkpoint_id, event_id, file_id, results_id
from app.openai_api.schemas import (
    CheckpointMetrics,
    FineTuningCheckpoint,
    FineTuningEvent,
    FineTuningJob,
    Hyperparameters,
    JobError,
    Level,
    Method,
    OpenAIStatus,
    Supervised,
)
from app.tables import EventRow, JobRow

STATUS: dict[Status, OpenAIStatus] = {
    Status.QUEUED: "queued",
    Status.RUNNING: "running",
    Status.CANCELLING: "running",
    Status.PAUSING: "pausing",
    Status.PAUSED: "paused",
    Status.SUCCEEDED: "succeeded",
    Status.FAILED: "failed",
    Status.CANCELLED: "cancelled",
}
VALIDATING = {Phase.FETCHING, Phase.VALIDATING}
PARAMS = {
    Reason.DATASET_INVALID: "training_file",
    Reason.DATASET_UNAVAILABLE: "training_file",
    Reason.BASE_MODEL_UNAVAILABLE: "model",
}
LEVELS: dict[str, Level] = {
    "job.failed": "error",
    "job.waiting": "warn",
    "job.requeued": "warn",
    "job.replanned": "warn",
    "job.checkpoint_refused": "warn",
}


def unix(moment: datetime) -> int:
    return int(moment.timestamp())


def present_job(row: JobRow) -> FineTuningJob:
    spec = JobCreate.model_validate(row.spec).told()
    hyperparameters = _hyperparameters(spec)
    is_finished = has_adapter(row)
    return FineTuningJob(
        id=row.id,
        model=row.base_model,
        created_at=unix(row.created_at),
        finished_at=unix(row.finished_at) if row.finished_at else None,
        estimated_finish=_estimated_finish(row),
        status=_status(row),
        fine_tuned_model=row.id if is_finished else None,
        organization_id=row.project,
        training_file=file_id(spec.dataset_uri),
        validation_file=file_id(uri) if (uri := spec.evaluation.validation_uri) else None,
        result_files=[results_id(row.id)] if is_finished else [],
        hyperparameters=hyperparameters,
        method=Method(supervised=Supervised(hyperparameters=hyperparameters)),
        seed=spec.seed,
        trained_tokens=(row.result or {}).get("train_tokens"),
        metadata=row.labels or None,
        integrations=[],
        error=_error(row),
        user_provided_suffix=row.name,
        flatlora=spec,
    )


def has_adapter(row: JobRow) -> bool:
    return row.status == Status.SUCCEEDED and row.adapter is not None


def _status(row: JobRow) -> OpenAIStatus:
    if row.status == Status.RUNNING and row.phase in VALIDATING:
        return "validating_files"
    return STATUS[Status(row.status)]


def _hyperparameters(spec: JobCreate) -> Hyperparameters:
    training = spec.training
    return Hyperparameters(
        n_epochs=_whole(training.epochs),
        batch_size=training.batch_size,
        learning_rate_multiplier=float(f"{training.learning_rate / LEARNING_RATE:.6g}"),
        learning_rate=training.learning_rate,
        rank=spec.rank,
        sigma=spec.sigma,
    )


def _whole(number: float | None) -> float | int | None:
    """3, not 3.0: OpenAI's clients know whole epochs alone."""
    return int(number) if number is not None and number.is_integer() else number


def _estimated_finish(row: JobRow) -> int | None:
    seconds = (row.progress or {}).get("eta_seconds")
    if row.status != Status.RUNNING or seconds is None:
        return None
    return unix(row.updated_at + timedelta(seconds=seconds))


def _error(row: JobRow) -> JobError | None:
    if row.status != Status.FAILED or not row.reason:
        return None
    message = " ".join(part for part in (row.message, row.hint) if part)
    return JobError(code=row.reason, message=message, param=PARAMS.get(Reason(row.reason)))


def present_event(row: EventRow) -> FineTuningEvent:
    is_metrics = row.type == "job.evaluated"
    return FineTuningEvent(
        id=event_id(row.job_id, row.seq),
        created_at=unix(row.at),
        level=LEVELS.get(row.type, "info"),
        type="metrics" if is_metrics else "message",
        message=row.message,
        data={"event": row.type, **row.data, **(_valid(row.data) if is_metrics else {})},
    )


def _valid(held_out: Mapping[str, Any]) -> dict[str, Any]:
    """Held-out numbers by OpenAI's names."""
    return {
        "full_valid_loss": held_out.get("loss"),
        "full_valid_mean_token_accuracy": held_out.get("accuracy"),
    }


def present_checkpoint(
    row: EventRow, train: Mapping[str, Any], held_out: Mapping[str, Any]
) -> FineTuningCheckpoint:
    """``train`` and ``held_out``: the metrics of its step."""
    step = row.data["step"]
    return FineTuningCheckpoint(
        id=checkpoint_id(row.job_id, step),
        created_at=unix(row.at),
        fine_tuning_job_id=row.job_id,
        fine_tuned_model_checkpoint=f"{row.job_id}:ckpt-step-{step}",
        step_number=step,
        metrics=CheckpointMetrics(step=step, train_loss=train.get("loss"), **_valid(held_out)),
    )
