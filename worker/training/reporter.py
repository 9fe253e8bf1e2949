"""What a run says of itself and how it is asked to stop; the service and tests implement it."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

Wish = Literal["cancel", "drain"]


class Reporter(Protocol):
    """Receives what happens in a run. Every value is plain JSON."""

    def phase(self, name: str) -> None:
        """The run entered a phase: ``validating, loading, training, evaluating``."""

    def rows(self, done: int, total: int | None) -> None:
        """About once a second while rows are validated: so many were read, or then rendered.

        ``total`` is of how many; None while they are read. A file of held-out rows begins anew.
        """

    def preflight(self, report: Mapping[str, Any]) -> None:
        """What was found in the dataset, before any model memory is taken."""

    def step(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        """Optimizer step ``step`` of ``total`` (1-based) is done.

        ``metrics`` has loss, learning_rate, sigma, grad_norm, tokens (without padding),
        tokens_per_second, eta_seconds.
        """

    def held_out(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Held-out rows were evaluated after ``step`` optimizer steps; 0 is the base model."""

    def event(self, type_: str, message: str, **data: Any) -> None:
        """Anything else worth a line in the job's history, such as a resume."""


class Control(Protocol):
    """Asked at every row that is validated, and at the boundary between two optimizer steps."""

    def wish(self) -> Wish | None:
        """What somebody outside wants, if anything."""
