"""Where a run computes: the device, the type of its numbers, and the processes beside it."""

from dataclasses import dataclass

import torch

from worker.training.config import TrainingJob
from worker.training.model.base import choose_device, choose_dtype
from worker.training.model.sharding import is_divided
from worker.training.ranks import Ranks


@dataclass(frozen=True)
class Place:
    """What a job finds on its machine.

    Attributes:
        device: Of this process.
        dtype: What the base model computes in.
        divided: Whether the base is divided among the ranks.
        ranks: The processes that train together.
    """

    device: torch.device
    dtype: torch.dtype
    divided: bool
    ranks: Ranks

    @classmethod
    def of(cls, job: TrainingJob) -> "Place":
        """The place of this process.

        Raises:
            ConfigInvalid: If the base is to be divided, and there is nobody to share it with.
        """
        device = choose_device()
        dtype = choose_dtype(job.training, device)
        divided = is_divided(job, device, dtype)
        return cls(device, dtype, divided, Ranks(device, in_lockstep=divided))

    @property
    def strategy(self) -> str:
        """What each rank holds of the base, by the name that jobs use."""
        return "fsdp" if self.divided else "ddp"

    @property
    def precision(self) -> str:
        """The type by its name."""
        return str(self.dtype).removeprefix("torch.")
