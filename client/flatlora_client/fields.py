"""The fields of a job, as ``jobs.create`` takes them. The service's guide explains each."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Required, TypeAlias, TypedDict

Column: TypeAlias = Literal[
    "messages", "conversations", "tools", "system",
    "instruction", "input", "output", "prompt", "completion", "text",
]  # fmt: skip
"""The columns that the service's formats know."""


class LoraFields(TypedDict, total=False):
    """The adapter."""

    alpha: float | None
    target_modules: Sequence[str] | Literal["all-linear"]
    dropout: float
    rslora: bool


class DataFields(TypedDict, total=False):
    """How rows are read."""

    format: Literal["auto", "chat", "sharegpt", "alpaca", "prompt_completion", "text"]
    mapping: Mapping[Column, str]
    max_bad_rows: int
    max_length: int
    loss_on: Literal["assistant", "last_assistant", "all"]


class TrainingFields(TypedDict, total=False):
    """The run."""

    epochs: float | None
    max_steps: int | None
    batch_size: int | None
    batch_tokens: int | None
    micro_batch_size: int | None
    packing: bool | None
    activation_checkpointing: bool | None
    quantization: Literal["4bit", "8bit"] | None
    learning_rate: float
    loraplus_lr_ratio: float
    schedule: Literal["cosine", "linear", "constant"]
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    precision: Literal["auto", "bf16", "fp32"]
    perturbation_memory: Literal["auto", "resident", "streamed"]
    checkpoint_steps: int | None
    max_bad_losses: int


class EvaluationFields(TypedDict, total=False):
    """The held-out rows."""

    validation_uri: str | None
    split: float
    max_rows: int
    every_steps: int | None
    patience: int | None
    min_delta: float
    keep: Literal["last", "best"]


class ResourceFields(TypedDict, total=False):
    """What the job may take."""

    gpus: int
    strategy: Literal["auto", "ddp", "fsdp"]
    max_queue_time: int | None
    max_runtime: int | None


class JobFields(TypedDict, total=False):
    """A job."""

    base_model: Required[str]
    dataset_uri: Required[str]
    rank: int
    sigma: float
    base_model_revision: str | None
    priority: int
    seed: int
    lora: LoraFields
    data: DataFields
    training: TrainingFields
    evaluation: EvaluationFields
    resources: ResourceFields
    name: str | None
    labels: Mapping[str, str]
    webhook_url: str | None
    dry_run: bool
    extra_fields: Mapping[str, Any]
    """Fields of a newer service, which this client has no names for."""
    idempotency_key: str
    """The same key and fields give the same job. One is made for each call where none is given."""


class JobFilters(TypedDict, total=False):
    """Which jobs a list has."""

    status: str | Sequence[str] | None
    base_model: str | None
    labels: Mapping[str, str] | None
    created_after: str | None
    """RFC 3339, with its zone."""
