"""What may be asked of a job: shapes and ranges only; rules that need the world: service.py."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from app.net.urls import without_query

MAX_RANK = 1024
MAX_SIGMA = 1.0

Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
REVISION = r"^[A-Za-z0-9][A-Za-z0-9_./-]{0,127}$"
LABEL_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_./-]{0,62}$"
LabelName = Annotated[str, Field(pattern=LABEL_NAME)]
Label = Annotated[str, Field(max_length=256)]
LayerName = Annotated[str, Field(min_length=1)]
RowFormat = Literal["auto", "chat", "sharegpt", "alpaca", "prompt_completion", "text"]
Column = Literal[
    "messages", "conversations", "tools", "system",
    "instruction", "input", "output", "prompt", "completion", "text",
]  # fmt: skip
"""The columns that the formats know."""


def _holds_nul(value: object) -> bool:
    if isinstance(value, dict):
        return any(_holds_nul(part) for pair in value.items() for part in pair)
    if isinstance(value, list):
        return any(map(_holds_nul, value))
    return isinstance(value, str) and "\0" in value


class Body(BaseModel):
    """A request body refuses what it does not know, NaN, and numbers spelt as strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    @field_validator("*")
    @classmethod
    def _no_nul(cls, value: object) -> object:
        """Postgres keeps no NUL in a text."""
        if _holds_nul(value):
            raise ValueError("the character U+0000 is not allowed")
        return value


class LoraOptions(Body):
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="LoRA alpha; the update is scaled by alpha / rank. Default: 2 · rank."
    )
    target_modules: list[LayerName] | Literal["all-linear"] = Field(
        "all-linear",
        description="Layer names to adapt, or every linear layer but the head.",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rslora: bool = Field(False, description="Scale by alpha / √rank instead of alpha / rank.")

    @field_validator("target_modules")
    @classmethod
    def _some_layer(cls, layers: list[str] | str) -> list[str] | str:
        """Not by min_length: the other half of the union would complain too, of another thing."""
        if not layers:
            raise ValueError("expected one layer name at least, or 'all-linear'")
        return layers


class DataOptions(Body):
    format: RowFormat = Field(
        "auto",
        description="How a row is read. auto recognises and reports it, text only where asked for.",
    )
    mapping: dict[Column, str] = Field(
        default_factory=dict, description="Columns to rename: expected name → name in the file."
    )
    max_bad_rows: Annotated[int, Field(ge=0)] = Field(
        0, description="How many unreadable rows may be skipped (and counted) before the job fails."
    )
    max_length: Annotated[int, Field(ge=8)] = Field(
        1024, description="Tokens per row; what is longer is cut at the end, and counted."
    )
    loss_on: Literal["assistant", "last_assistant", "all"] = "assistant"


class TrainingOptions(Body):
    epochs: Annotated[float, Field(gt=0, le=1000)] | None = Field(
        None, description="Passes over the rows. Default 3 if max_steps is not given."
    )
    max_steps: Positive | None = Field(None, description="Optimizer steps; instead of epochs.")
    batch_size: Positive | None = Field(
        None, description="Rows per optimizer step. Default 16 if batch_tokens is not given."
    )
    batch_tokens: Positive | None = Field(
        None,
        description="Tokens per optimizer step, instead of batch_size: as many rows as fit.",
    )
    micro_batch_size: Positive | None = Field(
        None,
        description="Sequences (rows, or packed rows) per forward pass. "
        "Default: what memory allows.",
    )
    packing: bool | None = Field(
        None,
        description="Rows share sequences of max_length, and do not see each other. "
        "Default: where the GPU's attention keeps them apart for free.",
    )
    activation_checkpointing: bool | None = Field(
        None,
        description="Compute activations again in the backward pass: slower, with less memory. "
        "Default: where memory asks for it.",
    )
    quantization: Literal["4bit", "8bit"] | None = Field(
        None, description="How the frozen base is stored; the worker needs bitsandbytes."
    )
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    loraplus_lr_ratio: Annotated[float, Field(ge=1, le=1000)] = Field(
        1.0, description="Learning rate of B over that of A (LoRA+). 1 is plain AdamW."
    )
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="Compute type. auto: bf16 on a GPU that has it, fp32 elsewhere."
    )
    perturbation_memory: Literal["auto", "resident", "streamed"] = Field(
        "auto",
        description="Noisy weights: a copy of each layer, or one shared workspace.",
    )
    checkpoint_steps: Positive | None = Field(
        None, description="Steps between checkpoints. Default: a tenth of the run, at least 10."
    )
    max_bad_losses: Positive = Field(
        3, description="Steps in a row with a NaN or infinite loss after which the job stops."
    )

    @model_validator(mode="after")
    def _one_length(self) -> "TrainingOptions":
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("give epochs or max_steps, not both")
        if self.batch_tokens is not None and self.batch_size is not None:
            raise ValueError("give batch_size (rows) or batch_tokens, not both")
        return self


class EvaluationOptions(Body):
    validation_uri: str | None = Field(
        None, description="Held-out rows. Default: a split of the dataset."
    )
    split: Annotated[float, Field(gt=0, le=0.5)] = Field(
        0.05, description="Share of the rows held out when there is no validation_uri."
    )
    max_rows: Positive = Field(500, description="Held-out rows at most.")
    every_steps: Positive | None = Field(
        None, description="Steps between evaluations. Default: a quarter of the run, at least 20."
    )
    patience: Positive | None = Field(
        None,
        description="Evaluations without a lower held-out loss after which the run ends early.",
    )
    min_delta: Annotated[float, Field(ge=0)] = Field(
        0.0, description="By how much a held-out loss must be lower for patience to begin anew."
    )
    keep: Literal["last", "best"] = Field(
        "last", description="The finished adapter: of the last step, or of the lowest loss."
    )


class Resources(Body):
    gpus: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="GPUs of one worker that train the job together."
    )
    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="Each GPU holds the whole base (ddp) or a part of it (fsdp). "
        "auto: a part where the whole does not fit.",
    )
    max_queue_time: Positive | None = Field(
        None,
        description="Seconds after which a job that has not started fails with max_queue_time.",
    )
    max_runtime: Positive | None = Field(
        None, description="Seconds after which a running job is stopped with max_runtime."
    )

    @model_validator(mode="after")
    def _somebody_to_share_with(self) -> "Resources":
        if self.strategy == "fsdp" and self.gpus == 1:
            raise ValueError("fsdp divides the base among GPUs: give gpus, or leave strategy out")
        return self


LATER_TRAINING = [
    "activation_checkpointing", "batch_size", "batch_tokens", "loraplus_lr_ratio",
    "micro_batch_size", "packing", "quantization",
]  # fmt: skip
LATER_EVALUATION = ["keep", "min_delta", "patience"]
LATER_RESOURCES = ["gpus", "max_queue_time", "strategy"]
LATER = ["priority", "webhook_url"]
"""Fields that 0.1 does not know, or knows with another default."""


class JobCreate(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "base_model": "file:examples/tiny-base",
                    "dataset_uri": "file:examples/data/train.jsonl",
                    "rank": 16,
                    "sigma": 0.05,
                }
            ]
        }
    )

    base_model: Annotated[str, Field(min_length=1, max_length=1024)] = Field(
        description="A hub id, or file: and a folder below a configured root."
    )
    dataset_uri: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="file: below a configured root, dataset: and the id of an upload, https: at a "
        "public address, s3:, gs: or az: in a listed bucket, or hf://datasets/… of the hub."
    )
    rank: Rank = Field(16, description="LoRA rank.")
    sigma: Annotated[float, Field(ge=0, le=MAX_SIGMA)] = Field(
        0.05,
        description="Perturbation strength σ; 0 is plain LoRA, the paper advises 0.05 to 0.10.",
    )
    base_model_revision: Annotated[str, Field(pattern=REVISION)] | None = Field(
        None,
        description="Commit, tag or branch of a hub id; resolved to a commit.",
    )
    priority: Annotated[int, Field(ge=0, le=9)] = Field(
        5, description="0 starts before 9. Among the jobs of one project; projects take turns."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    lora: LoraOptions = LoraOptions()
    data: DataOptions = DataOptions()
    training: TrainingOptions = TrainingOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    resources: Resources = Resources()
    name: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    labels: Annotated[dict[LabelName, Label], Field(max_length=16)] = Field(default_factory=dict)
    webhook_url: Annotated[str, Field(min_length=1, max_length=2048)] | None = Field(
        None,
        description="https: told as the job begins, writes a checkpoint, pauses and ends.",
    )
    dry_run: bool = Field(
        False, description="Stop, and succeed, after the preflight report on the data."
    )

    @model_validator(mode="after")
    def _fit_together(self) -> "JobCreate":
        if self.resources.strategy == "fsdp":
            if self.training.quantization:
                raise ValueError("a quantised base cannot be divided: give strategy ddp")
            if self.training.perturbation_memory == "resident":
                raise ValueError("with fsdp noisy weights are streamed: not resident")
        return self

    @field_validator("base_model_revision")
    @classmethod
    def _no_way_up(cls, revision: str | None) -> str | None:
        """The hub's client makes a part of a path of it."""
        if revision and ".." in revision:
            raise ValueError("expected a commit, tag or branch, without '..'")
        return revision

    def stored(self) -> dict[str, Any]:
        """As the job's row keeps it: without what 0.1 does not know, where that says nothing."""
        spec = self.model_dump(mode="json")
        for group, model, names in (
            (spec, JobCreate, LATER),
            (spec["training"], TrainingOptions, LATER_TRAINING),
            (spec["evaluation"], EvaluationOptions, LATER_EVALUATION),
            (spec["resources"], Resources, LATER_RESOURCES),
        ):
            for name in names:
                if group[name] == model.model_fields[name].default:
                    del group[name]
        return spec

    def told(self) -> "JobCreate":
        """As answers show it: without the queries of URLs, which may be secret."""
        evaluation, held_out = self.evaluation, self.evaluation.validation_uri
        if held_out:
            uri = without_query(held_out)
            evaluation = evaluation.model_copy(update={"validation_uri": uri})
        return self.model_copy(
            update={
                "dataset_uri": without_query(self.dataset_uri),
                "webhook_url": self.webhook_url and without_query(self.webhook_url),
                "evaluation": evaluation,
            }
        )

    def resolved(self) -> "JobCreate":
        """The same job with every default that depends on another field written out."""
        training, lora = self.training, self.lora
        if training.epochs is None and training.max_steps is None:
            training = training.model_copy(update={"epochs": 3.0})
        if training.batch_size is None and training.batch_tokens is None:
            training = training.model_copy(update={"batch_size": 16})
        if lora.alpha is None:
            lora = lora.model_copy(update={"alpha": 2.0 * self.rank})
        return self.model_copy(update={"training": training, "lora": lora})
