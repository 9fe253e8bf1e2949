"""The process that reads a dataset, run by another one that writes down what it took."""

import sys
from dataclasses import dataclass
from pathlib import Path

PROGRAM = """#!{python} -IS
import os, signal, sys

child = os.posix_spawn({python!r}, [{python!r}, *sys.argv[1:]], os.environ)
_, status, used = os.wait4(child, 0)
with open({usage!r}, "w") as usage:
    usage.write(f"{{used.ru_maxrss}} {{used.ru_utime + used.ru_stime}}")
if os.WIFSIGNALED(status):
    os.kill(os.getpid(), os.WTERMSIG(status))
sys.exit(os.waitstatus_to_exitcode(status))
"""


@dataclass(frozen=True)
class Usage:
    """What a process took."""

    peak_bytes: int
    cpu_seconds: float


class Measured:
    """An interpreter that stands in for ours: the same, but measured.

    A child begins with the peak memory of the process that it was forked from: here a small one.
    """

    def __init__(self, folder: Path) -> None:
        self._usage = folder / "usage"
        self.python = folder / "python"
        self.python.write_text(PROGRAM.format(python=sys.executable, usage=str(self._usage)))
        self.python.chmod(0o700)

    def usage(self) -> Usage:
        peak, seconds = self._usage.read_text().split()
        unit = 1 if sys.platform == "darwin" else 1024
        return Usage(int(peak) * unit, float(seconds))
