"""What the process that reads a dataset may use, and what is said when it wanted more.

Time is not limited as a whole, for a good file may be large: it is limited between one sign of
progress and the next.
"""

import ctypes
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEMORY_BYTES = 180 << 20  # of the process, its libraries included
CPU_SECONDS = 8
WALL_SECONDS = 60

OUT_OF_MEMORY, DISK_FULL = 3, 4  # exit codes

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """End when the parent ends: when our standard input does, and on Linux at once."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.stack_size(1 << 18)
    threading.Thread(target=_end_with_input, name="parent", daemon=True).start()


def limit_memory() -> None:
    """Leave room for ``MEMORY_BYTES`` in all; what has been imported by now counts.

    Only Linux counts a process's own memory as it asks for it. Elsewhere there is no limit.
    """
    if sys.platform != "linux":
        return
    pages = [int(number) for number in Path("/proc/self/statm").read_text().split()]
    resident, own = pages[1] * resource.getpagesize(), pages[5] * resource.getpagesize()
    limit = own + max(0, MEMORY_BYTES - resident)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


@contextmanager
def more_memory(size: int) -> Iterator[None]:
    """Room for so many bytes more, while the block lasts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if not size or soft == resource.RLIM_INFINITY:
        yield
        return
    resource.setrlimit(resource.RLIMIT_DATA, (soft + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def leave_no_core() -> None:
    """No image of what was in memory is written where a reader crashes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def proceed() -> None:
    """Something was read: the clocks begin anew."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + CPU_SECONDS, hard))
    signal.alarm(WALL_SECONDS)


def explain_end(code: int) -> tuple[str, str]:
    """Why the process ended before it was done, and what to do.

    Args:
        code: Its exit code; negative for a signal.
    """
    keep = "Write the rows as JSONL, one to a line."
    smaller = f"Write Parquet with smaller pages and rows; else: {keep[0].lower()}{keep[1:]}"
    match code:
        case _ if code == OUT_OF_MEMORY:
            return f"one of its parts needs more than {MEMORY_BYTES >> 20} MiB of memory", smaller
        case _ if code == -signal.SIGXCPU:
            return f"for {CPU_SECONDS} seconds of computing no row came out of it", keep
        case _ if code == -signal.SIGALRM:
            return f"for {WALL_SECONDS} seconds no row came out of it", keep
        case _ if code < 0:
            name = signal.Signals(-code).name
            return f"its reader crashed ({name})", f"Is the file whole? {keep}"
    return f"its reader ended with {code}", f"Is the file whole? {keep}"


def _end_with_input() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
