"""Which rows an optimizer step sees: a pure function of the seed and the step.

A resumed run needs no position in the data but its step.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from worker.training.config import Training, TrainingJob

Lengths = Sequence[int] | Int64[np.ndarray, " rows"]
"""Tokens of each row."""


class RowOrder:
    """Rows of each step: every epoch is a permutation of its own, cut into steps.

    A step has ``batch_size`` rows or, with ``batch_tokens``, as many as stay within that, one at
    least. The last step of an epoch takes the rows that are left, so every row is seen.

    Args:
        lengths: Tokens of each row.
        training: Gives the size of a step.
        seed: Of the job.
    """

    def __init__(self, lengths: Lengths, training: Training, seed: int) -> None:
        self._lengths = np.array(lengths, dtype=np.int64)
        self._training = training
        self._seed = seed
        self._first_steps = [0]  # of each epoch that has been looked at, and of the next
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)
        self._ends = np.empty(0, dtype=np.int64)

    def rows_of(self, step: int) -> Int64[np.ndarray, " batch"]:
        """Indices of the rows of optimizer step ``step``, counted from 0."""
        epoch = self._epoch_of(step)
        self._load(epoch)
        position = step - self._first_steps[epoch]
        start = self._ends[position - 1] if position else 0
        return self._permutation[start : self._ends[position]]

    def steps(self, epochs: float) -> int:
        """Optimizer steps of so many passes over the rows; a part of an epoch is rounded up."""
        whole = math.floor(epochs)
        done = self._first_step(whole)
        part = epochs - whole
        if part:
            done += math.ceil(part * (self._first_step(whole + 1) - done))
        return max(1, done)

    def epochs(self, steps: int) -> float:
        """Passes over the rows after so many steps."""
        epoch = self._epoch_of(steps)
        first, following = self._first_step(epoch), self._first_step(epoch + 1)
        return epoch + (steps - first) / (following - first)

    def _epoch_of(self, step: int) -> int:
        epoch = 0 if self._training.batch_tokens else step // self._steps_per_epoch
        while self._training.batch_tokens and self._first_step(epoch + 1) <= step:
            epoch += 1
        if not self._training.batch_tokens:
            self._first_step(epoch)
        return epoch

    @property
    def _steps_per_epoch(self) -> int:
        return math.ceil(len(self._lengths) / self._training.batch_size)

    def _first_step(self, epoch: int) -> int:
        while len(self._first_steps) <= epoch:
            number = len(self._first_steps) - 1
            if self._training.batch_tokens:
                self._load(number)
                steps = len(self._ends)
            else:
                steps = self._steps_per_epoch
            self._first_steps.append(self._first_steps[-1] + steps)
        return self._first_steps[epoch]

    def _load(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        digest = hashlib.sha256(f"rows {self._seed} {epoch}".encode()).digest()
        generator = np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "big")))
        self._epoch, self._permutation = epoch, generator.permutation(len(self._lengths))
        self._ends = self._cut()

    def _cut(self) -> Int64[np.ndarray, " steps"]:
        """Where the epoch's steps end."""
        rows, size = len(self._permutation), self._training.batch_size
        if self._training.batch_tokens is None:
            return np.append(np.arange(size, rows, size), rows)
        upto = np.cumsum(self._lengths[self._permutation])
        ends = []
        start = 0
        while start < rows:
            before = upto[start - 1] if start else 0
            limit = before + self._training.batch_tokens
            start = max(start + 1, int(np.searchsorted(upto, limit, side="right")))
            ends.append(start)
        return np.array(ends)


def total_steps(training: Training, lengths: Lengths, seed: int) -> int:
    """Optimizer steps of the whole run."""
    if training.max_steps is not None:
        return training.max_steps
    assert training.epochs is not None
    return RowOrder(lengths, training, seed).steps(training.epochs)


def evaluation_every(job: TrainingJob, steps: int) -> int:
    """Steps between two evaluations; the last step has one in any case."""
    return job.evaluation.every_steps or max(20, math.ceil(steps / 4))
