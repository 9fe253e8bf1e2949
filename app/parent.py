"""A child process that never outlives the process that started it."""

import ctypes
import os
import signal
import stat
import sys
import threading

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """End when the parent ends, however it ends.

    The parent holds a pipe to our standard input and never writes to it, so its end is the
    parent's end, on any system. Linux kills us even while we cannot read (long C calls). Where
    standard input is no pipe, nobody of ours is the parent: a service manager, say.
    """
    if not stat.S_ISFIFO(os.fstat(0).st_mode):
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_end_with_input, name="parent", daemon=True).start()


def _end_with_input() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
