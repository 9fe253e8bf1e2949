"""The rows of a forward pass as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32, Int64, Shaped
from torch import Tensor

from worker.training.data.examples import Example
from worker.training.packing import Sequences, length


@dataclass(frozen=True)
class Batch:
    """Sequences of one or more rows each, and what is predicted where.

    Rows of one sequence do not see each other: their positions begin anew, and the first token of
    none is predicted.

    Attributes:
        inputs: Arguments of the model: ids, positions, and where rows begin or end.
        places: Where a target is predicted, in the flattened sequences.
        targets: Ids that are predicted there.
        tokens: Real tokens, without padding.
    """

    inputs: dict[str, Any]
    places: Int64[Tensor, " targets"]
    targets: Int64[Tensor, " targets"]
    tokens: int

    @classmethod
    def of(cls, sequences: Sequences, device: torch.device, *, end_to_end: bool = False) -> "Batch":
        """Lay rows out for one forward pass.

        Args:
            sequences: Rows that share a sequence stand together.
            device: Where the tensors go.
            end_to_end: All rows in one sequence without padding, for attention that is told where
                rows begin. Else sequences are padded at their end to the longest.
        """
        if end_to_end:
            layout = _Layout([[row for sequence in sequences for row in sequence]])
            named = layout.starts_of_rows()
        else:
            layout = _Layout(sequences)
            is_packed = any(len(sequence) > 1 for sequence in sequences)
            named = {} if is_packed else {"attention_mask": layout.is_real}
        inputs: dict[str, Any] = {
            "input_ids": layout.ids,
            "position_ids": layout.positions,
            **named,
        }
        where = np.flatnonzero(layout.is_target)
        return cls(
            inputs={name: _on(device, value) for name, value in inputs.items()},
            places=_on(device, where - 1),
            targets=_on(device, layout.ids.reshape(-1)[where]),
            tokens=int(layout.is_real.sum()),
        )


def _on(device: torch.device, value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    tensor = torch.from_numpy(value)
    if device.type == "cuda":  # the host goes on while it is copied
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class _Layout:
    """Sequences as arrays, each padded at its end."""

    def __init__(self, sequences: Sequences) -> None:
        self._sequences = sequences
        shape = len(sequences), max(map(length, sequences))
        self.ids = np.zeros(shape, dtype=np.int64)
        self.positions = np.zeros(shape, dtype=np.int64)
        self.is_real = np.zeros(shape, dtype=bool)
        self.is_target = np.zeros(shape, dtype=bool)
        for index, rows in enumerate(sequences):
            end = self._write(index, rows)
            # padding is a row of its own: nothing real attends to it
            self.positions[index, end:] = np.arange(shape[1] - end)

    def _write(self, index: int, rows: Sequence[Example]) -> int:
        start = 0
        for row in rows:
            end = start + len(row.ids)
            self.ids[index, start:end] = row.ids
            self.positions[index, start:end] = np.arange(len(row.ids))
            self.is_real[index, start:end] = True
            self.is_target[index, start + 1 : end] = row.in_loss[1:]
            start = end
        return start

    @cached_property
    def _lengths(self) -> Int32[np.ndarray, " rows"]:
        (rows,) = self._sequences
        return np.array([len(row.ids) for row in rows], dtype=np.int32)

    def starts_of_rows(self) -> dict[str, Shaped[np.ndarray, " rows+1"] | int]:
        """Under the names that transformers hands on to attention."""
        starts = np.append(np.int32(0), np.cumsum(self._lengths, dtype=np.int32))
        longest = int(self._lengths.max())
        return {
            "cu_seq_lens_q": starts,
            "cu_seq_lens_k": starts,
            "max_length_q": longest,
            "max_length_k": longest,
        }
