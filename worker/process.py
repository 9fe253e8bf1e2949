"""A trainer subprocess: started apart, listened to, told to stop, and never left behind."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal

from worker.inputs import LOG_FILE
from worker.pipe import Message, read_messages

# Nothing else of the supervisor's environment reaches the trainer: no database, no keys.
PASSED_ON = (
    "CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "FLATLORA_EXECUTION_LOG", "FLATLORA_FAILPOINTS",
    "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH",
    "MKL_NUM_THREADS", "NVIDIA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PATH", "TMPDIR", "TZ",
)  # fmt: skip
# How the names begin of what an operator sets for the exchange between GPUs. Three of them are the
# trainer's own where a job has several (worker/training/launch.py).
EXCHANGE = ("NCCL_", "NVSHMEM_", "TORCH_NCCL_", "TORCH_SYMMMEM", "TORCH_SYMM_MEM_")
FIXED = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic matmuls on CUDA
    "PYTHONUNBUFFERED": "1",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # passes differ in length
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "warning",
}
# Only what fetches from the hub may reach it, and has the token for it.
OFFLINE = {"HF_HUB_OFFLINE": "1"}
TRUSTED = ("SSL_CERT_DIR", "SSL_CERT_FILE")
PROXIES = (
    "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "https_proxy", "http_proxy", "no_proxy",
)  # fmt: skip
# By which obstore finds the identity of a container at Azure, and an account of Google's.
IDENTITIES = ("IDENTITY_ENDPOINT", "IDENTITY_HEADER", "SERVICE_ACCOUNT")
HUB = (
    "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_TOKEN_PATH",
    "HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT", "XDG_CACHE_HOME", *PROXIES, *TRUSTED,
)  # fmt: skip

Task = Literal["download", "hub", "web", "bucket", "train", "verify"]

FETCHING: dict[Task, tuple[str, ...]] = {
    "download": HUB,
    "hub": HUB,
    "web": TRUSTED,  # no proxy: that would connect to addresses which nobody has checked
    "bucket": (*IDENTITIES, *PROXIES, *TRUSTED),
}
"""What a task gets that fetches something."""
CLOUDS = ("AWS_", "AZURE_", "GOOGLE_")
"""How the names begin of what else ``bucket`` gets."""

LOCK_FILE = "trainer.lock"
LOCK_SECONDS = 10  # for a killed trainer to be gone


class FolderBusy(Exception):
    """A trainer of another attempt works in the job's folder, and cannot or must not be ended."""


class TrainerProcess:
    """One run of ``worker.trainer`` in a session of its own, gone when the block is left."""

    def __init__(
        self,
        task: Task,
        folder: Path,
        *arguments: str,
        module: str = "worker.trainer",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """``environment`` is added to what every trainer gets."""
        fence = int((environment or {}).get("FLATLORA_FENCE", "0"))
        lock = _take_over(folder / LOCK_FILE, fence)
        reading, writing = os.pipe()
        command = [sys.executable, "-P", "-m", module, task, str(folder), str(writing)]
        try:
            with (folder / LOG_FILE).open("ab") as log:
                # -P: a folder called `app` where the service was started must not shadow ours.
                self._process = subprocess.Popen(  # noqa: S603 - our own module and folder
                    [*command, *arguments],
                    stdin=subprocess.PIPE,  # never written to: its end tells the trainer to leave
                    stdout=log,
                    stderr=log,
                    pass_fds=[writing, lock],
                    env=_environment(task) | dict(environment or {}),
                    start_new_session=True,
                )
            os.pwrite(lock, f"{self._process.pid} {fence}\n".encode(), 0)
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
            os.close(lock)
        self._reading = reading

    def __enter__(self) -> "TrainerProcess":
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.kill()
        self.wait()

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


def _environment(task: Task) -> dict[str, str]:
    names = PASSED_ON + FETCHING.get(task, ())
    begins = EXCHANGE + (CLOUDS if task == "bucket" else ())
    passed = {
        name: text for name, text in os.environ.items() if name in names or name.startswith(begins)
    }
    return passed | FIXED | ({} if FETCHING.get(task) is HUB else OFFLINE)


def _take_over(path: Path, fence: int) -> int:
    """Lock the folder for a new trainer, which holds the lock for as long as it lives.

    One of an older fence that still holds it has no right to run: its supervisor hangs, or has not
    noticed that it lost its lease. Against one of a newer fence it is the caller who has lost it.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + LOCK_SECONDS
    while time.monotonic() < deadline:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with suppress(ValueError, ProcessLookupError):
                pid, held_by = map(int, os.pread(lock, 64, 0).split())
                if held_by > fence:
                    break
                os.killpg(pid, signal.SIGKILL)
            time.sleep(0.05)
        else:
            os.ftruncate(lock, 0)
            return lock
    os.close(lock)
    raise FolderBusy(f"A trainer of another attempt works in {path.parent}.")


def out_of_memory_kills() -> int:
    """How many processes the kernel has killed for memory since it started; 0 if it cannot tell."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
