"""Numbers that a job's trainer tells, as it names them.

They pass through as they were written: what is not there stays away, and what a newer trainer adds
is passed on.
"""

from typing import Annotated

from pydantic import (
    ConfigDict,
    Field,
    PlainSerializer,
    WrapValidator,
    with_config,
)
from typing_extensions import TypedDict, TypeVar  # pydantic asks for this one, and brings it

T = TypeVar("T")

OPEN = ConfigDict(extra="allow")


# The document tells the type; what a trainer of another version has written is shown all the same.
# Lambdas: a function that names what it returns would take the type's place in the document.
Lenient = Annotated[
    T, WrapValidator(lambda value, _read: value), PlainSerializer(lambda value: value)
]


@with_config(OPEN)
class StepFigures(TypedDict, total=False):
    """Of an optimizer step. null where a number was not finite."""

    loss: Annotated[float | None, Field(description="Mean over the step's target tokens.")]
    learning_rate: float | None
    sigma: Annotated[float | None, Field(description="Strength of the noise in this step.")]
    grad_norm: Annotated[float | None, Field(description="Before clipping.")]
    tokens: Annotated[float | None, Field(description="Read in this step, without padding.")]
    tokens_per_second: float | None
    eta_seconds: Annotated[float | None, Field(description="Left, as the steps so far took.")]
    gpu_memory_bytes: Annotated[
        float | None, Field(description="The most that was in use, where there is a GPU.")
    ]


@with_config(OPEN)
class HeldOutFigures(TypedDict, total=False):
    """Of held-out rows, after a step."""

    loss: float | None
    accuracy: Annotated[float | None, Field(description="Share of the target tokens guessed.")]


@with_config(OPEN)
class Figures(StepFigures, total=False):
    """Of a step; of held-out rows `loss` and `accuracy` alone."""

    accuracy: Annotated[float | None, Field(description="Share of the target tokens guessed.")]


@with_config(OPEN)
class Progress(StepFigures, total=False):
    """Of the last step; or, before there is one, of the rows that are checked."""

    rows: Annotated[int | None, Field(description="Rows that have been read.")]
    of: Annotated[int | None, Field(description="Of how many, where that is known.")]


@with_config(OPEN)
class HeldOut(TypedDict, total=False):
    """What the held-out rows say of the adapter."""

    rows: int | None
    tokens: int | None
    dtype: str | None
    before: Annotated[HeldOutFigures | None, Field(description="Of the base model.")]
    after: Annotated[HeldOutFigures | None, Field(description="Of both, base and adapter.")]


@with_config(OPEN)
class Result(TypedDict, total=False):
    """What training has come to; of a dry run `dry_run` alone."""

    dry_run: bool
    base_model_revision: str | None
    held_out: HeldOut | None
    steps: Annotated[int | None, Field(description="Optimizer steps that were made.")]
    stopped_early: bool | None
    kept: Annotated[str | None, Field(description="Which step's adapter: `best` or `last`.")]
    kept_step: int | None
    epochs: float | None
    train_tokens: int | None
    sigma: float | None
    perturbed_layers: int | None
    trainable_parameters: int | None
    parameters: Annotated[int | None, Field(description="Of the base model.")]
    precision: str | None
    gpus: int | None
    strategy: str | None
