"""Numbers that a job's trainer tells, as it names them.

They pass through as they were written: what is not there stays away, and what a newer trainer adds
is passed on.
"""

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

OPEN = ConfigDict(extra="allow", use_attribute_docstrings=True)


@with_config(OPEN)
class StepFigures(TypedDict, total=False):
    """Of an optimizer step."""

    loss: float | None
    """Mean over the step's target tokens; null where it was not finite."""
    learning_rate: float | None
    sigma: float | None
    """The strength of Flat-LoRA's noise in this step."""
    grad_norm: float | None
    """Before clipping; null where it was not finite."""
    tokens: float | None
    """That the step has read, without padding."""
    tokens_per_second: float | None
    eta_seconds: float | None
    """Left, as the steps so far have taken."""
    gpu_memory_bytes: float | None
    """The most that was in use, where there is a GPU."""


@with_config(OPEN)
class HeldOutFigures(TypedDict, total=False):
    """Of held-out rows, after a step."""

    loss: float | None
    accuracy: float | None
    """Share of the target tokens that were guessed."""


@with_config(OPEN)
class Figures(StepFigures, HeldOutFigures, total=False):
    """Of a step; or of held-out rows: loss and accuracy."""


@with_config(OPEN)
class Progress(StepFigures, total=False):
    """Of the last step; or, before there is one, of the rows that are checked."""

    rows: int | None
    """Rows that have been read."""
    of: int | None
    """Of how many, where that is known."""


@with_config(OPEN)
class HeldOut(TypedDict, total=False):
    """What the held-out rows say of the adapter."""

    rows: int | None
    tokens: int | None
    dtype: str | None
    before: HeldOutFigures | None
    """Of the base model."""
    after: HeldOutFigures | None
    """Of the base model with the adapter."""


@with_config(OPEN)
class Result(TypedDict, total=False):
    """What training has come to; of a dry run `dry_run` alone."""

    dry_run: bool
    base_model_revision: str | None
    held_out: HeldOut | None
    steps: int | None
    """Optimizer steps that were made."""
    stopped_early: bool | None
    kept: str | None
    """Which step's adapter: `best` or `last`."""
    kept_step: int | None
    epochs: float | None
    train_tokens: int | None
    sigma: float | None
    perturbed_layers: int | None
    trainable_parameters: int | None
    parameters: int | None
    """Of the base model."""
    precision: str | None
    gpus: int | None
    strategy: str | None
