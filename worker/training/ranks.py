"""The processes that train one job together: alone, or as ``worker.training.launch`` starts them.

Every rank knows all rows of a step and takes its share of the micro-batches; gradients are summed
once per step, so a step's loss is the sum over its tokens whatever the number of ranks.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from worker.training.errors import Stopped
from worker.training.launch import STORE_DESCRIPTOR
from worker.training.reporter import Wish

Item = TypeVar("Item")


@contextmanager
def joined(timeout_seconds: float) -> Iterator[None]:
    """Be one of the ranks that the launcher has started, while the block lasts.

    They exchange tensors through NCCL where this process sees a GPU, its own alone, and through
    gloo on the CPU.

    Args:
        timeout_seconds: How long one may wait for the others, at any time.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    has_gpu = torch.cuda.is_available()
    timeout = timedelta(seconds=timeout_seconds)
    store = dist.TCPStore(  # type: ignore[attr-defined] # torch does not say that it exports it
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=int(os.environ[STORE_DESCRIPTOR]) if rank == 0 else None,
    )
    dist.init_process_group(
        "nccl" if has_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=torch.device("cuda", 0) if has_gpu else None,
    )
    try:
        yield
    except Stopped:  # all at the same step
        dist.destroy_process_group()
        raise
    # not where the block has failed: the others may be in a collective that this one will not join
    dist.destroy_process_group()


class Ranks:
    """This process among those that train the same job.

    Args:
        device: Where tensors are that are exchanged.
        in_lockstep: Whether each forward pass needs all ranks, as a sharded model's does.

    Attributes:
        rank: Number of this process, from 0.
        size: How many there are.
    """

    def __init__(self, device: torch.device, *, in_lockstep: bool = False) -> None:
        self._device = device
        self._in_lockstep = in_lockstep
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that reports and writes files."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[tuple[Item, bool]]:
        """This rank's items: every ``size``-th, so those that are sorted by length are even.

        Returns:
            Each with whether it counts. In lockstep a rank that has fewer than another takes one
            more, which does not count.
        """
        mine = [(item, True) for item in items[self.rank :: self.size]]
        if self._in_lockstep and len(mine) < -(-len(items) // self.size):
            mine.append((items[-1], False))
        return mine

    def sum(self, *values: float) -> list[float]:
        """Each value's sum over all ranks, in float64; the same bits on every rank."""
        if self.size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(summed)
        return [float(value) for value in summed.tolist()]

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by its sum over all ranks; all at once, in one flat tensor.

        A rank that has had no micro-batch has no gradients, and counts as zeros.

        Args:
            parameters: The same on every rank, in the same order, of one dtype.
        """
        if self.size == 1:
            return
        parameters = list(parameters)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def agree(self, *, ok: bool) -> bool:
        """Whether all ranks say yes."""
        return self.sum(float(not ok))[0] == 0

    def first_says(self, value: int) -> int:
        """What rank 0 says."""
        return int(self.sum(float(value) if self.is_first else 0.0)[0])

    def first_tells(self, text: str) -> str:
        """The text that rank 0 has, such as what it alone has read or decided."""
        if self.size == 1:
            return text
        words = text.encode() if self.is_first else b""
        length = self.first_says(len(words))
        values = list(words) if self.is_first else [0] * length
        told = torch.tensor(values, dtype=torch.uint8, device=self._device)
        dist.broadcast(told, src=0)
        return bytes(told.tolist()).decode()

    def strongest(self, wish: Wish | None) -> Wish | None:
        """What any of the ranks was asked for: to cancel rather than to drain."""
        drain, cancel = self.sum(float(wish == "drain"), float(wish == "cancel"))
        return "cancel" if cancel else "drain" if drain else None

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()


def is_of_others(error: BaseException | None) -> bool:
    """Whether an error says no more than that another rank is gone, or does not answer.

    gloo tells of it by plain RuntimeErrors that name its source file.
    """
    while error is not None:
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
