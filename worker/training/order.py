"""Which rows an optimizer step sees: a pure function of the seed and the step.

A resumed run needs no position in the data but its step.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from worker.training.config import Training
from worker.training.data.rendering import Example


def steps_per_epoch(training: Training, rows: int) -> int:
    """The last step of an epoch takes the rows that are left, so every row is seen."""
    return math.ceil(rows / training.batch_size)


def total_steps(training: Training, rows: int) -> int:
    """Optimizer steps of the whole run."""
    if training.max_steps is not None:
        return training.max_steps
    assert training.epochs is not None
    return max(1, math.ceil(training.epochs * steps_per_epoch(training, rows)))


class RowOrder:
    """Rows of each step: every epoch is a permutation of its own.

    Args:
        rows: Number of rows.
        training: Gives the batch size.
        seed: Of the job.
    """

    def __init__(self, rows: int, training: Training, seed: int) -> None:
        self._rows = rows
        self._batch_size = training.batch_size
        self._steps_per_epoch = steps_per_epoch(training, rows)
        self._seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def rows_of(self, step: int) -> Int64[np.ndarray, " batch"]:
        """Indices of the rows of optimizer step ``step``, counted from 0."""
        epoch, position = divmod(step, self._steps_per_epoch)
        if epoch != self._epoch:
            digest = hashlib.sha256(f"rows {self._seed} {epoch}".encode()).digest()
            generator = np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "big")))
            self._epoch, self._permutation = epoch, generator.permutation(self._rows)
        return self._permutation[position * self._batch_size : (position + 1) * self._batch_size]


def micro_batches(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """A step's rows in groups of similar length, the longest first.

    Sorting saves padding, and what runs out of memory does so in the first group. It changes no
    result but by rounding: a step's loss is a sum over all of its tokens.
    """
    ordered = sorted(examples, key=lambda example: -len(example.ids))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]
