"""Which rows of a step share a sequence, and which sequences a forward pass.

Rows are packed anew within each optimizer step, so packing never changes which rows a step sees,
and the step's loss, a sum over its tokens, is the same packed or not.
"""

import bisect
import math
from collections.abc import Sequence

from worker.training.data.examples import Example
from worker.training.plan import Plan

Sequences = list[list[Example]]
"""Sequences of a forward pass, each of one row or of several end to end."""


def micro_batches(rows: Sequence[Example], plan: Plan, ranks: int = 1) -> list[Sequences]:
    """The forward passes of a step: the longest sequences first, so memory runs out at once.

    Args:
        rows: The step's rows.
        plan: How many tokens or sequences a pass takes, and whether rows share sequences.
        ranks: That share the passes: sequences are no longer than lets each have some.
    """
    even = math.ceil(length(rows) / ranks)
    capacity = min(plan.capacity, even)
    sequences = best_fit(rows, capacity) if plan.packing else [[row] for row in rows]
    ordered = sorted(sequences, key=lambda sequence: -length(sequence))
    size = plan.sequences
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def best_fit(rows: Sequence[Example], capacity: int) -> Sequences:
    """Rows in as few sequences as best-fit decreasing finds; rows longer than that stay alone.

    Each row, the longest first, goes to the fullest sequence in which it still fits. The order of
    equal rows is that of the step, so the same rows are always packed in the same way.

    Args:
        rows: The rows.
        capacity: Tokens that a sequence may have.
    """
    sequences: Sequences = []
    room: list[tuple[int, int]] = []  # tokens left and sequence, the fullest first
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        size = len(row.ids)
        place = bisect.bisect_left(room, (size, -1))
        if place == len(room):
            sequences.append([row])
            left, index = capacity - size, len(sequences) - 1
        else:
            left, index = room.pop(place)
            sequences[index].append(row)
            left -= size
        if left > 0:
            bisect.insort(room, (left, index))
    return sequences


def length(sequence: Sequence[Example]) -> int:
    """Tokens of a sequence."""
    return sum(len(row.ids) for row in sequence)
