"""The preflight report: what a job's trainer tells of its data, and of what it is going to need.

As the numbers of ``app.jobs.figures`` it passes through as it was written.
"""

from typing import Annotated

from pydantic import Field, with_config
from typing_extensions import TypedDict

from app.jobs.figures import OPEN


@with_config(OPEN)
class Format(TypedDict, total=False):
    """How the file was read."""

    name: Annotated[str, Field(description="Of the rows, such as `chat` or `alpaca`.")]
    file: Annotated[str, Field(description="Of the file, such as `jsonl`.")]
    compression: str | None


@with_config(OPEN)
class Rows(TypedDict, total=False):
    """Rows of the dataset."""

    read: int
    used: Annotated[int, Field(description="To train on.")]
    held_out: Annotated[int, Field(description="To evaluate on.")]
    bad: Annotated[int, Field(description="Skipped, as `data.max_bad_rows` allows.")]
    truncated: Annotated[int, Field(description="Cut at `length.limit`.")]
    dropped_without_targets: Annotated[int, Field(description="No token in the loss was left.")]
    duplicates: Annotated[int, Field(description="Rows that an earlier one is equal to.")]


@with_config(OPEN)
class HeldOutRows(TypedDict, total=False):
    """Rows of a file of held-out rows."""

    read: int
    held_out: int
    beyond_max_rows: Annotated[int, Field(description="Left out: more than `evaluation.max_rows`.")]
    bad: int
    truncated: int
    dropped_without_targets: int


@with_config(OPEN)
class BadRow(TypedDict, total=False):
    place: Annotated[str, Field(description="In the file, such as `line 37`.")]
    problem: Annotated[str, Field(description="What was found, and what was expected.")]


@with_config(OPEN)
class Validation(TypedDict, total=False):
    """Of `validation_uri`'s file."""

    uri: str
    format: Format
    rows: HeldOutRows
    bad_rows: list[BadRow]


@with_config(OPEN)
class Tokens(TypedDict, total=False):
    """Of the rows to train on."""

    all: int
    in_loss: Annotated[int, Field(description="Those that are learnt.")]


@with_config(OPEN)
class Lengths(TypedDict, total=False):
    """Tokens of a row to train on."""

    p50: int
    p90: int
    p99: int
    max: int
    limit: Annotated[int, Field(description="Where rows are cut.")]


@with_config(OPEN)
class Segment(TypedDict, total=False):
    text: str
    in_loss: bool


@with_config(OPEN)
class Plan(TypedDict, total=False):
    """How a step is going to be computed."""

    max_length: Annotated[int, Field(description="Tokens of a row, or of rows that are packed.")]
    micro_batch_size: Annotated[int, Field(description="Rows, or packs, of a forward pass.")]
    packing: Annotated[bool, Field(description="Whether rows share a sequence.")]
    varlen: Annotated[bool, Field(description="Whether attention needs no padding.")]
    activation_checkpointing: bool
    perturbation_memory: Annotated[
        str, Field(description="Noisy weights: kept (`resident`) or made as needed (`streamed`).")
    ]
    in_words: str


@with_config(OPEN)
class MemoryNeeds(TypedDict, total=False):
    """Of the device, at its peak."""

    weights_bytes: int
    adapter_bytes: Annotated[int, Field(description="With gradients and optimizer state.")]
    noise_bytes: int
    activations_bytes: int
    loss_bytes: int
    libraries_bytes: int
    total_bytes: int
    is_rough: bool
    device: str
    device_total_bytes: int
    device_free_bytes: int | None
    fits: Annotated[bool, Field(description="Whether the plan fits the device.")]
    in_words: str


@with_config(OPEN)
class TimeNeeds(TypedDict, total=False):
    """Very roughly."""

    seconds: float
    tokens_per_second: float
    is_rough: bool


@with_config(OPEN)
class PreflightReport(TypedDict, total=False):
    """What is known of a job before its base model is loaded.

    `plan`, `memory` and `time` are not there where the model's config is of an unknown kind.
    """

    format: Format
    rows: Rows
    bad_rows: Annotated[list[BadRow], Field(description="The first of them.")]
    tokens: Tokens
    length: Lengths
    steps: Annotated[int, Field(description="Optimizer steps.")]
    tokens_per_step: Annotated[int, Field(description="On average.")]
    first_example: Annotated[
        list[Segment], Field(description="The first row as the model reads it, in pieces.")
    ]
    validation: Validation
    plan: Plan
    memory: MemoryNeeds
    time: TimeNeeds
    warnings: list[str]
