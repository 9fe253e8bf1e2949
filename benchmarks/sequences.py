"""Rows of realistic lengths, packed into sequences: what a step of instruction tuning is made of.

Lengths are drawn from a log-normal distribution, clipped: median 600 tokens and a standard
deviation of 0.9 of the logarithm, so a mean of about 880, as of a mixture of short answers and long
conversations. They are a choice, not a count of some dataset; a file of one's own takes their
place. Token ids are uniform. Only the tokens of rows are counted, never what fills a sequence up.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from worker.training.data.examples import Example
from worker.training.packing import Sequences, best_fit
from worker.training.packing import length as length_of

IGNORED = -100

MEDIAN, SPREAD, SHORTEST = 600, 0.9, 16


@dataclass(frozen=True)
class Data:
    """Steps of packed sequences.

    Attributes:
        name: What they are.
        length: Most tokens of a sequence.
        steps: The sequences of every step.
    """

    name: str
    length: int
    steps: list[Sequences]

    def tokens(self, step: int) -> int:
        """Real tokens of a step."""
        return sum(map(length_of, self.steps[step]))

    def targets(self, step: int) -> int:
        """Tokens that the loss is taken on; the first of a row is never predicted."""
        return sum(row.targets for sequence in self.steps[step] for row in sequence)


def packed_data(
    length: int, sequences: int, steps: int, *, vocab: int, seed: int, learnt: float = 1.0
) -> Data:
    """Steps of sequences, each filled with rows of drawn lengths.

    Args:
        length: Most tokens of a sequence.
        sequences: Of a step.
        steps: How many.
        vocab: Ids are below it.
        seed: Draws lengths and ids.
        learnt: Share of each row's tokens, at its end, that the loss is taken on.
    """
    random = np.random.default_rng(seed)
    rows, total = [], int(1.02 * length * sequences * steps)
    while total > 0:
        size = MEDIAN * length / 4096 * np.exp(SPREAD * random.standard_normal())
        rows.append(_row(random, int(np.clip(size, SHORTEST, length)), vocab, learnt))
        total -= len(rows[-1].ids)
    return in_steps("packed rows", rows, length, sequences, steps, seed)


def full_data(length: int, sequences: int, steps: int, *, vocab: int, seed: int) -> Data:
    """Steps of sequences that are one row each: nothing to pack, nothing to keep apart."""
    random = np.random.default_rng(seed)
    drawn = [[[_row(random, length, vocab, 1.0)] for _ in range(sequences)] for _ in range(steps)]
    return Data("full rows", length, drawn)


def from_file(path: Path, length: int, sequences: int, steps: int, *, seed: int) -> Data:
    """Rows of a file: JSON lines with ``input_ids`` and, if not all is learnt, ``labels``.

    Raises:
        ValueError: If the file has too few rows.
    """
    rows = []
    with path.open() as lines:
        for line in lines:
            found = json.loads(line)
            ids = np.array(found["input_ids"][:length], dtype=np.int32)
            labels = np.array(found.get("labels", found["input_ids"])[:length])
            rows.append(Example(ids, labels != IGNORED))
    return in_steps(f"rows of {path.name}", rows, length, sequences, steps, seed)


def in_steps(
    name: str, rows: Sequence[Example], length: int, sequences: int, steps: int, seed: int
) -> Data:
    """Pack rows, and deal full and less full sequences out over the steps at random."""
    packed = best_fit(rows, length)
    full = sorted(packed, key=length_of, reverse=True)[: sequences * steps]
    if len(full) < sequences * steps:
        raise ValueError(
            f"{len(rows):,} rows fill {len(full)} sequences of {length} tokens; "
            f"{steps} steps of {sequences} sequences need {sequences * steps}"
        )
    order = np.random.default_rng(seed).permutation(len(full))
    dealt = [full[index] for index in order]
    return Data(name, length, [dealt[i * sequences : (i + 1) * sequences] for i in range(steps)])


def _row(random: np.random.Generator, size: int, vocab: int, learnt: float) -> Example:
    ids = random.integers(3, vocab, size).astype(np.int32)  # the first three are special
    return Example(ids, np.arange(size) >= size - max(1, round(learnt * size)))
