"""A job as the trainer sees it: plain values, every default resolved.

This is the one place where a job's record becomes settings of the training code.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

Quantization = Literal["4bit", "8bit"]


@dataclass(frozen=True)
class BaseModel:
    """Which model is adapted.

    Attributes:
        name: As the job named it.
        path: Where it is loaded from: a folder.
        revision: The commit, for a model of the hub.
    """

    name: str
    path: Path
    revision: str | None = None

    @property
    def reference(self) -> str:
        """What PEFT and servers load it by: a hub id, or the path of a folder."""
        return str(self.path) if self.name.startswith("file:") else self.name


@dataclass(frozen=True)
class DataFile:
    """A fetched dataset.

    Attributes:
        uri: As the job named it.
        path: The local copy.
        filename: The original name; its suffixes tell the format (``rows.jsonl.gz``).
        sha256: Of the local copy.
        revision: The commit, for a file of the hub.
    """

    uri: str
    path: Path
    filename: str
    sha256: str
    revision: str | None = None


@dataclass(frozen=True)
class Lora:
    """Shape of the adapter."""

    rank: int
    alpha: float
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    dropout: float = 0.0
    rslora: bool = False


@dataclass(frozen=True)
class Data:
    """How rows are read and rendered."""

    format: Literal["auto", "chat", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    mapping: Mapping[str, str] | None = None
    max_bad_rows: int = 0
    max_length: int = 1024
    loss_on: Literal["assistant", "last_assistant", "all"] = "assistant"


@dataclass(frozen=True)
class Training:
    """How long, how, and how fast.

    Attributes:
        batch_size: Rows per optimizer step, on all ranks together.
        batch_tokens: Tokens per optimizer step instead: as many rows as fit, one at least.
        micro_batch_size: Sequences per forward pass: rows, or packed rows of ``max_length`` tokens
            at most. None: as many as memory allows.
        packing: Whether rows share sequences. None: where attention can keep them apart for free.
        activation_checkpointing: Whether activations are computed again in the backward pass. None:
            where memory asks for it.
        quantization: How the frozen base is stored.
        loraplus_lr_ratio: Learning rate of B over that of A (LoRA+, arXiv 2402.12354).
    """

    epochs: float | None = 3.0
    max_steps: int | None = None
    batch_size: int = 16
    batch_tokens: int | None = None
    micro_batch_size: int | None = None
    packing: bool | None = None
    activation_checkpointing: bool | None = None
    quantization: Quantization | None = None
    learning_rate: float = 2e-4
    loraplus_lr_ratio: float = 1.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    perturbation_memory: Literal["auto", "resident", "streamed"] = "auto"
    checkpoint_steps: int | None = None
    max_bad_losses: int = 3


@dataclass(frozen=True)
class Evaluation:
    """Which rows are held out, how often they are looked at, and what is made of it.

    Attributes:
        patience: Evaluations without a lower loss after which the run ends. None: it never does.
        min_delta: By how much a loss must be lower for patience to begin anew.
        keep: Which adapter is the finished one: of the last step, or of the lowest held-out loss.
    """

    split: float = 0.05
    max_rows: int = 500
    every_steps: int | None = None
    patience: int | None = None
    min_delta: float = 0.0
    keep: Literal["last", "best"] = "last"


@dataclass(frozen=True)
class Resources:
    """What the job runs on.

    Attributes:
        gpus: Processes that train together, each on a GPU of its own.
        strategy: Whether each holds the whole base (``"ddp"``) or a part of it (``"fsdp"``).
            ``"auto"``: a part where the whole does not fit.
    """

    gpus: int = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"


@dataclass(frozen=True)
class TrainingJob:
    """All that determines the adapter.

    Attributes:
        clock: The moment that a chat template is told when it asks for the date: the same at every
            attempt, so that a resumed run reads the same tokens.
    """

    job_id: str
    base_model: BaseModel
    dataset: DataFile
    validation: DataFile | None
    sigma: float
    seed: int
    lora: Lora
    data: Data
    training: Training
    evaluation: Evaluation
    resources: Resources = Resources()
    dry_run: bool = False
    clock: datetime | None = None

    @classmethod
    def from_record(
        cls,
        job_id: str,
        spec: Mapping[str, Any],
        base_model: BaseModel,
        dataset: DataFile,
        validation: DataFile | None,
        clock: datetime | None = None,
    ) -> "TrainingJob":
        """Translate a job's resolved ``spec`` (see the HTTP contract) and its fetched inputs."""
        return cls(
            job_id=job_id,
            base_model=base_model,
            dataset=dataset,
            validation=validation,
            sigma=float(spec["sigma"]),
            seed=spec["seed"],
            lora=_pick(Lora, {"rank": spec["rank"], **spec["lora"]}),
            data=_pick(Data, spec["data"]),
            training=_pick(Training, _with_batch(spec["training"])),
            evaluation=_pick(Evaluation, spec["evaluation"]),
            resources=_pick(Resources, spec.get("resources", {})),
            dry_run=spec["dry_run"],
            clock=clock,
        )


def _with_batch(training: Mapping[str, Any]) -> dict[str, Any]:
    """Without a ``batch_size`` of nothing, which a job has that counts tokens."""
    nothing = ("batch_size", None)
    return {name: value for name, value in training.items() if (name, value) != nothing}


Group = TypeVar("Group", Lora, Data, Training, Evaluation, Resources)


def _pick(group: type[Group], values: Mapping[str, Any]) -> Group:
    known = {field.name for field in fields(group)}
    return group(**{name: value for name, value in values.items() if name in known})
