"""Processes on this machine that form one process group, to run functions in."""

import multiprocessing
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

T = TypeVar("T")

# What takes seconds to import: once, in the server that the processes are forked from.
_PRELOADED = ["peft", "torch._dynamo", "torch.distributed.fsdp", "transformers"]


class RankFailed(AssertionError):
    """A function raised on a rank, or took too long."""


class Ranks:
    """Processes that form one gloo group on the CPU, and call a function together.

    They are started at the first call and serve all later ones, as importing takes seconds. After
    a failure they are ended, since the others may wait for the one that failed, and started anew.
    """

    def __init__(self, number: int = 2) -> None:
        self._number = number
        self._processes: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def call(self, function: Callable[..., T], *args: Any, limit: float = 240) -> list[T]:
        """Call a function on all ranks at once.

        Args:
            function: A function at the top of a module.
            args: Its arguments; they and what it returns are pickled.
            limit: Seconds that it has.

        Returns:
            What it returned, by rank.

        Raises:
            RankFailed: With the traceback of each rank that failed.
        """
        if not self._processes:
            self._start()
        task = pickle.dumps((function, args))  # a pipe of torch's would share tensors' memory
        try:
            for _, connection in self._processes:
                connection.send_bytes(task)
            answers = self._answers(time.monotonic() + limit)
        except BaseException:  # the next call would get this one's answers
            self.close()
            raise
        faults = {rank: fault for rank, (_, fault) in answers.items() if fault is not None}
        if faults or len(answers) < self._number:
            self.close()
            late = {*range(self._number)} - {*answers}
            faults |= dict.fromkeys(late, f"no answer within {limit} s or a second after a failure")
            raise RankFailed("\n".join(f"rank {r}: {fault}" for r, fault in sorted(faults.items())))
        return [answers[rank][0] for rank in range(self._number)]

    def close(self) -> None:
        """End the processes."""
        for process, connection in self._processes:
            process.kill()
            process.join()
            process.close()
            connection.close()
        self._processes = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._folder = tempfile.TemporaryDirectory(prefix="flatlora-ranks-")
        meeting = f"{self._folder.name}/meeting"
        for rank in range(self._number):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(there, meeting, rank, self._number), daemon=True
            )
            process.start()
            there.close()
            self._processes.append((process, here))

    def _answers(self, until: float) -> dict[int, tuple[Any, str | None]]:
        """What the ranks have answered when all have, one has failed or time is up."""
        answers: dict[int, tuple[Any, str | None]] = {}
        rank_of = {connection: rank for rank, (_, connection) in enumerate(self._processes)}
        while rank_of:
            if any(fault is not None for _, fault in answers.values()):
                until = min(until, time.monotonic() + 10)  # the others may fail alike
            ready = wait([*rank_of], timeout=max(0, until - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = rank_of.pop(connection)
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())  # noqa: S301 - our own
                except EOFError:
                    answers[rank] = None, "the process ended"
        return answers


@contextmanager
def ranks_of(number: int) -> Iterator[Ranks]:
    """Ranks that are ended when the block is left."""
    ranks = Ranks(number)
    try:
        yield ranks
    finally:
        ranks.close()


def _serve(connection: Connection, meeting: str, rank: int, number: int) -> None:
    import torch
    import torch.distributed as dist
    from jaxtyping import install_import_hook

    warnings.simplefilter("error")  # as in the tests themselves, with pyproject's exception
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=number)
    with install_import_hook("flatlora", "beartype.beartype"):
        while True:
            answer: tuple[Any, str | None]
            try:
                function, args = pickle.loads(connection.recv_bytes())  # noqa: S301 - our own
                answer = function(*args), None
            except EOFError:  # the tests' process is gone
                return
            except BaseException:
                answer = None, traceback.format_exc()
            connection.send_bytes(pickle.dumps(answer))


__all__ = ["RankFailed", "Ranks", "ranks_of"]
