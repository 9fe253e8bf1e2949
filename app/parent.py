"""A child process that never outlives the process that started it."""

import ctypes
import os
import signal
import stat
import sys
import threading
import time

PR_SET_PDEATHSIG = 1
POLL_SECONDS = 1  # where the kernel cannot be asked


def die_with_parent() -> None:
    """End when the parent ends, however it ends.

    The parent holds a pipe to our standard input and never writes to it, so its end is the
    parent's end, on any system. Linux kills us even while we cannot read (long C calls). Where
    standard input is no pipe, nobody of ours is the parent: a service manager, say.
    """
    if not stat.S_ISFIFO(os.fstat(0).st_mode):
        return
    _ask_the_kernel()
    threading.Thread(target=_end_with_input, name="parent", daemon=True).start()


def follow(parent: int) -> None:
    """For a process that ``parent`` has forked: end when that ends, or has ended already."""
    _ask_the_kernel()
    threading.Thread(target=_end_with, args=(parent,), name="parent", daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _ask_the_kernel() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_with_input() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
