"""Several processes that train one job, started and ended as one.

Each is told its place by the variables that ``torchrun`` sets (``RANK``, ``WORLD_SIZE``, …), but
torchrun itself is not used: its rendezvous listens on every interface and unpickles what it is
sent; it moves ranks into sessions of their own, out of reach of whoever ends the trainer's group;
and it lets the others hang for half a minute when one has died. Here the ranks meet at a socket of
the loopback that is bound before they start, so nobody can take its port, and they are in the
launcher's group, so that one signal ends all.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

Message = dict[str, Any]

# Variables that name descriptors: of the bound socket, for rank 0 alone, and of the pipe on which a
# rank says why it fails.
STORE_DESCRIPTOR = "FLATLORA_STORE_DESCRIPTOR"
FAILURE_DESCRIPTOR = "FLATLORA_FAILURE_DESCRIPTOR"

POLL_SECONDS = 0.05
GRACE_SECONDS = 2.0  # for the others to end by themselves once one has failed

DRAINED = 75  # EX_TEMPFAIL: try again later
CANCELLED = 76
# Ends that all ranks reach by themselves, each when it is done with what it is at.
PEACEFUL = frozenset({0, DRAINED, CANCELLED})
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
SETTINGS = {
    "GLOO_SOCKET_IFNAME": LOOPBACK,
    "NCCL_SOCKET_IFNAME": LOOPBACK,
    # Sums in one order, so that the same job gives the same bits each time.
    "NCCL_ALGO": "Ring",
    "NCCL_NVLS_ENABLE": "0",
}


@dataclass(frozen=True)
class Ended:
    """How one rank came to its end.

    Attributes:
        rank: Which.
        code: Its exit code; negative for a signal.
        was_killed: Whether the launcher has killed it because another one had failed.
        failures: What it has said of that: ``{reason, message, hint}``.
    """

    rank: int
    code: int
    was_killed: bool = False
    failures: Sequence[Message] = ()


@dataclass
class _Process:
    process: "subprocess.Popen[bytes]"
    words: int
    said: bytes = b""
    was_killed: bool = False
    failures: list[Message] = field(default_factory=list)

    def listen(self) -> None:
        with suppress(BlockingIOError):
            while part := os.read(self.words, 1 << 16):
                self.said += part
        *lines, self.said = self.said.split(b"\n")
        self.failures += [json.loads(line) for line in lines]


class RankProcesses:
    """Processes that run the same command, gone when the block is left.

    Each has a pipe of its own: a JSON object on it, one a line, says why the rank fails.
    Descriptors that this process has inherited are theirs too: the pipe to the supervisor, and the
    job folder's lock, which is held until the last of them is gone.

    Args:
        command: Of a rank.
        environments: What each rank gets beside this process's own environment; as many as ranks.
    """

    def __init__(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        self._command = command
        self._ranks: list[_Process] = []
        size = len(environments)
        with socket.create_server(("127.0.0.1", 0), backlog=size) as meeting:
            shared = SETTINGS | {
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(meeting.getsockname()[1]),
            }
            threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // size))}
            try:
                for rank, own in enumerate(environments):
                    place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    self._start(threads | os.environ | shared | dict(own) | place, meeting)
            except BaseException:
                self._kill()
                raise

    def __enter__(self) -> "RankProcesses":
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._kill()
        for rank in self._ranks:
            rank.process.wait()
            os.close(rank.words)
            if rank.process.stdin:
                rank.process.stdin.close()

    @property
    def pids(self) -> list[int]:
        """Of the ranks, in their order."""
        return [rank.process.pid for rank in self._ranks]

    def signal_all(self, number: int) -> None:
        """Send a signal to each rank: while rows are read each listens for itself.

        At a step it is rank 0 that has heard it or not, and tells the others.
        """
        for rank in self._ranks:
            rank.process.send_signal(number)

    def wait(self) -> list[Ended]:
        """Until all have ended, and how, in the order of their ends.

        Once one has failed the others get a moment, as they may have failed for the same reason
        and know more; then they are killed, since they may wait for it for ever.
        """
        ended: list[Ended] = []
        running = dict(enumerate(self._ranks))
        kill_at = float("inf")
        while running:
            time.sleep(POLL_SECONDS)
            for number, rank in list(running.items()):
                code = rank.process.poll()
                rank.listen()
                has_failed = bool(rank.failures) or code not in {None, *PEACEFUL}
                if has_failed and not rank.was_killed:
                    kill_at = min(kill_at, time.monotonic() + GRACE_SECONDS)
                if code is not None:
                    ended.append(Ended(number, code, rank.was_killed, rank.failures))
                    del running[number]
            if time.monotonic() > kill_at:
                self._kill()
        return ended

    def _start(self, environment: dict[str, str], meeting: socket.socket) -> None:
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        os.set_inheritable(writing, True)
        is_first = not self._ranks
        meeting.set_inheritable(is_first)
        environment[FAILURE_DESCRIPTOR] = str(writing)
        if is_first:
            environment[STORE_DESCRIPTOR] = str(meeting.fileno())
        try:
            process = subprocess.Popen(  # noqa: S603 - our own module
                self._command,
                stdin=subprocess.PIPE,  # never written to: its end tells the rank to leave
                env=environment,
                close_fds=False,
            )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        self._ranks.append(_Process(process, reading))

    def _kill(self) -> None:
        for rank in self._ranks:
            if rank.process.poll() is None:
                rank.was_killed = True
                rank.process.kill()


def failure_of(ended: Sequence[Ended]) -> Message | None:
    """What the job's author is told, if a rank has said why it fails.

    A reason that a rank has foreseen comes first; then the first that failed, as the others may
    have failed because it did. Where one was killed by somebody else, only that counts.
    """
    said = [failure for one in ended for failure in one.failures]
    foreseen = [failure for failure in said if failure["reason"] != "internal"]
    if foreseen:
        return foreseen[0]
    return said[0] if said and death_of(ended) is None else None


def death_of(ended: Sequence[Ended]) -> signal.Signals | None:
    """The signal that has ended a rank, unless the launcher had sent it."""
    died = [one.code for one in ended if one.code < 0 and not one.was_killed]
    return signal.Signals(-died[0]) if died else None


def code_of(ended: Sequence[Ended]) -> int:
    """The exit code of all together: that of the first that has failed, or on which they agree."""
    codes = [one.code for one in ended if not one.was_killed]
    failed = [code for code in codes if code not in PEACEFUL]
    return failed[0] if failed else max(codes, default=1)
