"""A real service in processes of its own, for tests that send it requests and kill it."""

import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2

from tests.faults.procs import reserve_port
from tests.waiting import until as until

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
TERMINAL = {"succeeded", "failed", "cancelled"}

Json = dict[str, Any]


def example_job(**more: Any) -> Json:
    """The smallest real job there is, on the example's model and rows."""
    return {
        "base_model": f"file:{EXAMPLES / 'tiny-base'}",
        "dataset_uri": f"file:{EXAMPLES / 'data' / 'train.jsonl'}",
        "rank": 4,
        "sigma": 0.05,
        "lora": {"dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
        "data": {"max_length": 192},
        **more,
    }


def processes(*words: str) -> list[int]:
    """Ids of the living processes whose command line holds all the words."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if command and all(word in command for word in words):
            found.append(int(folder.name))
    return found


class Service:
    """``flatlora up`` on a folder. It may be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        self.log = folder / "service.log"
        reserved = reserve_port()  # also while it does not run
        weakref.finalize(self, reserved.close)
        self.port: int = reserved.getsockname()[1]
        self.environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("FLATLORA", "HF_"))
            },
            "FLATLORA_DATA_DIR": str(self.data_dir),
            "FLATLORA_PORT": str(self.port),
            "FLATLORA_DATASET_ROOTS": f"{folder},{EXAMPLES}",
            "FLATLORA_MODEL_ROOTS": f"{folder},{EXAMPLES}",
            "FLATLORA_POLL_SECONDS": "0.1",
        }
        self.up: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.up = subprocess.Popen(
                [sys.executable, "-m", "app.cli.main", "up"],
                stdout=log,
                stderr=log,
                env=self.environment,
                cwd=self.folder,
            )
        until(self._is_ready, seconds=90)

    def _is_ready(self) -> bool:
        assert self.up is not None
        assert self.up.poll() is None, self.log.read_text()
        try:
            return httpx2.get(f"http://127.0.0.1:{self.port}/readyz").is_success
        except httpx2.TransportError:
            return False

    @property
    def http(self) -> httpx2.Client:
        key = (self.data_dir / "api_key").read_text().strip()
        return httpx2.Client(
            base_url=f"http://127.0.0.1:{self.port}",
            headers={"Authorization": f"Bearer {key}"},
            timeout=30,
        )

    def flatlora(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run the command line against this service."""
        return subprocess.run(
            [sys.executable, "-m", "app.cli.main", *arguments],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )

    def submit(self, body: Json) -> str:
        with self.http as http:
            response = http.post("/jobs", json=body)
        assert response.status_code == 202, response.text
        return str(response.json()["id"])

    def job(self, job_id: str) -> Json:
        with self.http as http:
            response = http.get(f"/jobs/{job_id}")
        assert response.status_code == 200, response.text
        answer: Json = response.json()
        return answer

    def wait_for(self, job_id: str, seen: Callable[[Json], bool], *, seconds: float = 90) -> Json:
        """The job as it was when the condition first held."""
        job: Json = {}

        def look() -> bool:
            job.update(self.job(job_id))
            assert job["status"] not in TERMINAL or seen(job), job
            return seen(job)

        until(look, seconds=seconds)
        return job

    def finish(self, job_id: str) -> Json:
        job = self.wait_for(job_id, lambda job: job["status"] in TERMINAL)
        assert job["status"] == "succeeded", (job["failure"], self.log.read_text())
        return job

    def trainers(self) -> list[int]:
        return processes("worker.trainer", str(self.data_dir))

    def children(self) -> list[int]:
        """Every process of this service that its parent started."""
        assert self.up is not None
        pids = []
        for module in ("app.serve", "worker.dispatcher"):
            pids += [pid for pid in processes(module) if _parent(pid) == self.up.pid]
        return pids

    def dispatcher(self) -> int:
        assert self.up is not None
        (pid,) = [p for p in processes("worker.dispatcher") if _parent(p) == self.up.pid]
        return pid

    def kill(self) -> None:
        """``kill -9`` of the parent; what it started must follow."""
        assert self.up is not None
        self.up.send_signal(signal.SIGKILL)
        self.up.wait()

    def stop(self) -> None:
        if self.up and self.up.poll() is None:
            self.up.send_signal(signal.SIGTERM)
            assert self.up.wait(60) == 0


def _parent(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])
