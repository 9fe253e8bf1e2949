"""Runs the job of a work folder in a process that a test kills.

python -m tests.worker.training.killed_run <folder> <pause in seconds after each step>
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.worker.training.conftest import Recorder
from worker.inputs import read_job
from worker.training.run import run


class Slow(Recorder):
    """Gives the killer time, and says on standard output where the run is."""

    def step(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        print(step, flush=True)  # noqa: T201 - the test reads it
        time.sleep(float(sys.argv[2]))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    recorder = Slow()
    run(read_job(folder), folder, recorder, recorder)
