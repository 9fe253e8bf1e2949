"""Processes of the fault tests: started so that none outlives the tests, found, and ended."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.waiting import until

# What is started becomes its own command after this: killed when the tests die, and nobody's root.
BOUND = """
import ctypes, os, sys
user, group, *command = sys.argv[1:]
if user:
    os.setgroups([])
    os.setgid(int(group))
    os.setuid(int(user))
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
os.execvp(command[0], command)
"""

# Linux takes the end of the *thread* that has started a process for its parent's end, and tests
# start processes from threads that end. This one stays.
_starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="starter")


def spawn(
    command: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str] | None = None,
    folder: Path = Path("/"),
    owner: tuple[int, int] | None = None,
) -> "subprocess.Popen[bytes]":
    """Start a program that dies with the tests, by the name of its first word.

    ``owner`` is the user and the group that it becomes; only root may name one.
    """
    user, group = map(str, owner) if owner else ("", "")
    bound = [sys.executable, "-I", "-S", "-c", BOUND, user, group, *command]
    with log.open("ab") as output:

        def start() -> "subprocess.Popen[bytes]":
            return subprocess.Popen(
                bound,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=folder,
                start_new_session=True,
            )

        return _starter.submit(start).result()


def reserve_port() -> socket.socket:
    """A port that stays ours until the socket is closed, also while nobody listens on it.

    Nothing listens on this socket, so connections to the port are refused until a server, which
    sets SO_REUSEADDR as all of them do, binds it too.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    command: str
    """Its words, between spaces."""


def living() -> dict[int, Process]:
    """All processes by their ids, without those that have ended and wait to be collected."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (process := _read(folder)):
            found[process.pid] = process
    return found


def is_alive(pid: int) -> bool:
    return _read(Path(f"/proc/{pid}")) is not None


def descendants(pid: int) -> list[Process]:
    """What a process has started, and what that has; parents before their children."""
    found, parents = [], [pid]
    for parent in parents:
        children = [process for child in _children(parent) if (process := _read(child))]
        found += children
        parents += [child.pid for child in children]
    return found


def naming(text: str) -> list[Process]:
    """Living processes whose command line or environment holds the text."""
    wanted = text.encode()
    return [
        process
        for process in living().values()
        if text in process.command or wanted in _bytes(Path(f"/proc/{process.pid}/environ"))
    ]


def end(pids: Collection[int], *, seconds: float = 20) -> None:
    """``kill -9``, and wait until they are gone."""
    for pid in pids:
        send(pid, signal.SIGKILL)
    until(lambda: not any(is_alive(pid) for pid in pids), seconds=seconds, every=0.005)


def send(pid: int, number: signal.Signals) -> bool:
    """Whether the process was still there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _children(pid: int) -> list[Path]:
    """Their folders; the kernel keeps a list for each thread."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return []
    words = b" ".join(_bytes(thread / "children") for thread in threads)
    return [Path(f"/proc/{child.decode()}") for child in words.split()]


def _read(folder: Path) -> Process | None:
    # pid (name) state parent …; the name may hold anything
    stat = _bytes(folder / "stat").decode(errors="replace").rpartition(")")[2].split()
    if not stat or stat[0] in {"Z", "X"}:
        return None
    words = _bytes(folder / "cmdline").decode(errors="replace").replace("\0", " ").strip()
    return Process(int(folder.name), int(stat[1]), words)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended meanwhile, or is somebody else's
        return b""
