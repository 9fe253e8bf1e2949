"""The wire types of the OpenAI-compatible API: OpenAI's names, and Unix seconds."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from app.jobs.schemas import Body, JobCreate


def _auto(value: object) -> object:
    return None if value == "auto" else value


def _auto_or(kind: str) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": kind}, {"type": "null"}]})


AutoInt = Annotated[int | None, BeforeValidator(_auto), _auto_or("integer")]
AutoNumber = Annotated[float | None, BeforeValidator(_auto), _auto_or("number")]


class HyperparametersIn(Body):
    """OpenAI's three, and any field of `lora`, `data`, `training` and `evaluation`, by its name."""

    model_config = ConfigDict(extra="allow")

    n_epochs: AutoNumber = Field(None, description="`training.epochs`")
    batch_size: AutoInt = Field(None, description="`training.batch_size`: rows per step.")
    learning_rate_multiplier: AutoNumber = Field(
        None, description="`training.learning_rate` is its default times this."
    )


class SupervisedIn(Body):
    hyperparameters: HyperparametersIn | None = None


class MethodIn(Body):
    type: Literal["supervised", "dpo", "reinforcement"] = Field(description="`supervised` alone.")
    supervised: SupervisedIn | None = None
    dpo: dict[str, Any] | None = None
    reinforcement: dict[str, Any] | None = None


class FineTuningJobCreate(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "file:examples/tiny-base",
                    "training_file": "file-01932b5ac1de7000b7b5e3a2e4c41d6f",
                    "method": {
                        "type": "supervised",
                        "supervised": {"hyperparameters": {"n_epochs": 3, "sigma": 0.05}},
                    },
                }
            ]
        }
    )

    model: Annotated[str, Field(min_length=1, max_length=1024)] = Field(
        description="A base model as the native API names it: a hub id, or `file:` and a folder."
    )
    training_file: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="Id of an uploaded file; a dataset URI of the native API also works."
    )
    validation_file: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = Field(
        None, description="The job's `name`."
    )
    seed: int | None = None
    hyperparameters: HyperparametersIn | None = Field(
        None, description="OpenAI has deprecated them here, in favour of `method`."
    )
    method: MethodIn | None = None
    metadata: dict[str, str] | None = Field(None, description="The job's `labels`.")
    integrations: list[dict[str, Any]] | None = Field(None, description="None are supported.")
    flatlora: dict[str, Any] | None = Field(
        None,
        description="Any part of the body of `POST /jobs`, as it is there: with the client, "
        '`extra_body={"flatlora": {"lora": {"alpha": 32}}}`.',
    )


class Hyperparameters(BaseModel):
    n_epochs: float | int | None
    batch_size: int | None
    learning_rate_multiplier: float
    learning_rate: float
    rank: int
    sigma: float


class Supervised(BaseModel):
    hyperparameters: Hyperparameters


class Method(BaseModel):
    type: Literal["supervised"] = "supervised"
    supervised: Supervised


class JobError(BaseModel):
    code: str = Field(description="The native `failure.reason`.")
    message: str
    param: str | None


OpenAIStatus = Literal[
    "validating_files", "queued", "running", "pausing", "paused", "succeeded", "failed", "cancelled"
]


class FineTuningJob(BaseModel):
    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    model: str
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    status: OpenAIStatus
    fine_tuned_model: str | None = Field(
        description="The adapter's id: in `GET /v1/models`, `GET /adapters/{id}` and "
        "`GET /jobs/{id}/adapter`."
    )
    organization_id: str = Field(description="The project.")
    training_file: str
    validation_file: str | None
    result_files: list[str]
    hyperparameters: Hyperparameters
    method: Method
    seed: int
    trained_tokens: int | None
    metadata: dict[str, str] | None
    integrations: list[dict[str, Any]]
    error: JobError | None
    user_provided_suffix: str | None
    flatlora: JobCreate = Field(description="The native `spec`: every default written out.")


Level = Literal["info", "warn", "error"]


class FineTuningEvent(BaseModel):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Level
    type: Literal["message", "metrics"]
    message: str
    data: dict[str, Any]


class CheckpointMetrics(BaseModel):
    step: int
    train_loss: float | None
    full_valid_loss: float | None = Field(description="Where that step was evaluated.")
    full_valid_mean_token_accuracy: float | None


class FineTuningCheckpoint(BaseModel):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: CheckpointMetrics


class File(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: None = None
    filename: str
    purpose: Literal["fine-tune", "fine-tune-results"]
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="0 where it is not known: of a model of the hub.")
    owned_by: str = Field(description="The project, of an adapter; `base`, of a base model.")


class ModelDeleted(BaseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class ModelPage(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class FilePage(BaseModel):
    object: Literal["list"] = "list"
    data: list[File]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FineTuningJobPage(BaseModel):
    object: Literal["list"] = "list"
    data: list[FineTuningJob]
    has_more: bool


class FineTuningEventPage(BaseModel):
    object: Literal["list"] = "list"
    data: list[FineTuningEvent]
    has_more: bool


class FineTuningCheckpointPage(BaseModel):
    object: Literal["list"] = "list"
    data: list[FineTuningCheckpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool
