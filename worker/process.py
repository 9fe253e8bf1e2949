"""A trainer subprocess: started apart, listened to, told to stop, and never left behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from worker.inputs import LOG_FILE
from worker.pipe import Message, read_messages

# Nothing else of the supervisor's environment reaches the trainer: no database, no keys.
PASSED_ON = (
    "CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH",
    "MKL_NUM_THREADS", "NVIDIA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PATH", "TMPDIR", "TZ",
)  # fmt: skip
FIXED = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic matmuls on CUDA
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "warning",
}


Task = Literal["train", "verify"]


class TrainerProcess:
    """One run of ``worker.trainer`` in a session of its own."""

    def __init__(self, task: Task, folder: Path) -> None:
        reading, writing = os.pipe()
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        try:
            with (folder / LOG_FILE).open("ab") as log:
                # -P: a folder called `app` where the service was started must not shadow ours.
                self._process = subprocess.Popen(  # noqa: S603 - our own module and folder
                    [sys.executable, "-P", "-m", "worker.trainer", task, str(folder), str(writing)],
                    stdin=subprocess.PIPE,  # never written to: its end tells the trainer to leave
                    stdout=log,
                    stderr=log,
                    pass_fds=[writing],
                    env=environment | FIXED,
                    start_new_session=True,
                )
        finally:
            os.close(writing)
        self._reading = reading

    @property
    def pid(self) -> int:
        return self._process.pid

    def messages(self) -> Iterator[Message]:
        """What it says, until it closes the pipe or dies."""
        return read_messages(self._reading)

    def wait(self) -> int:
        """Its exit code; negative for a signal. Whatever it has started dies with it."""
        code = self._process.wait()
        if self._process.stdin:
            self._process.stdin.close()
        self.kill()
        return code

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """End the trainer and all that it has started."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        except PermissionError:  # macOS says this of a group of which only zombies are left
            return


def out_of_memory_kills() -> int:
    """How many processes the kernel has killed for memory since it started; 0 if it cannot tell."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
