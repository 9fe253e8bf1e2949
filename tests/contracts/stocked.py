"""A service that has something of everything: jobs in every state, with what a worker leaves.

An API, the embedded worker with the tiny trainer, and a receiver of webhooks. Without these a
fuzzer makes up ids that nobody has, and hears 404.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2

from tests.app.receiver import Receiver, receiving
from tests.faults.procs import reserve_port
from tests.system.service import EXAMPLES, ROOT
from tests.waiting import until

Json = dict[str, Any]
KEY = "flk_operator_of_the_fuzzed_service"
BYTES = b'{"prompt": "1", "completion": "2"}\n'
LONG = 600
"""Steps of a job that still runs when the fuzz begins: half a minute. Then come those that wait."""
DELETED = 4
"""Things of each kind that the fuzzer may use up; what it reads is kept from it."""


@contextmanager
def serving(folder: Path, database_url: str) -> Iterator[tuple[str, Receiver]]:
    """API and worker, each in a process of its own, on a migrated database."""
    with reserve_port() as reserved, receiving() as receiver:
        # By its number: on a socket that it is given, uvicorn lets each answer wait 40 ms (Nagle).
        port = reserved.getsockname()[1]
        environment = {
            **{name: value for name, value in os.environ.items() if "FLATLORA" not in name},
            "FLATLORA_ALLOWED_NETWORKS": "127.0.0.1/32",
            "FLATLORA_ALLOWED_PORTS": str(receiver.port),
            "FLATLORA_ALLOW_HTTP": "1",
            "FLATLORA_API_KEY": KEY,
            "FLATLORA_DATABASE_URL": database_url,
            "FLATLORA_DATA_DIR": str(folder / "data"),
            "FLATLORA_DATASET_ROOTS": str(ROOT),
            "FLATLORA_DATASET_SECONDS": "5",
            "FLATLORA_LOG_LEVEL": "error",
            "FLATLORA_MODEL_ROOTS": str(ROOT),
            "FLATLORA_POLL_SECONDS": "0.05",
            "FLATLORA_TRAINER_MODULE": "tests.faults.tiny_trainer",
            "FLATLORA_WEBHOOK_SECONDS": "0.2",
        }
        (folder / "data").mkdir(mode=0o700)
        uvicorn = ["uvicorn", "--factory", "app.main:make_app", "--log-level", "warning"]
        commands = [*uvicorn, "--port", str(port)], ["worker.dispatcher"]
        running = [
            subprocess.Popen([sys.executable, "-m", *command], env=environment)
            for command in commands
        ]
        url = f"http://127.0.0.1:{port}"
        try:
            until(lambda: _is_ready(url))
            yield url, receiver
            assert [process.poll() for process in running] == [None, None], "one has died"
        finally:
            for process in running:
                process.terminate()
            for process in running:
                assert process.wait(30) in {0, -15}


def _is_ready(url: str) -> bool:
    with suppress(httpx2.TransportError):
        return httpx2.get(f"{url}/readyz", timeout=30).is_success
    return False


class Stock:
    """What the service holds when the fuzz begins, in lists of ids by what they are used for."""

    def __init__(self, url: str, receiver: Receiver) -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        self._http = httpx2.Client(base_url=url, headers=headers, timeout=30)
        self._hook = receiver.url()
        self.ids: dict[str, list[str]] = {}

    def close(self) -> None:
        self._http.close()

    def fill(self) -> None:
        finished, failed, paused, cancelled, running, queued = self._jobs()
        spent = [self._job() for _ in range(DELETED)]
        for job_id in spent:
            self._ask(f"/jobs/{job_id}/cancel")
        self._fill_others()
        self._reach(paused, cancelled, running)
        for job_id in finished:
            self._become(job_id, "succeeded")
        self._become(failed, "failed")
        *kept, deleted, forgotten = finished
        self.ids |= {
            "jobs": [*kept, failed, paused, cancelled, running, *queued],
            "finished": kept,
            "over": [*kept, failed, cancelled],
            "stopped": [self._job() for _ in range(DELETED)] + [kept[0], failed, cancelled],
            "spent": [*spent, deleted],
            "spent models": [forgotten],
            "files of adapters": self._names(kept[0]),
            "deliveries": self._deliveries(kept[0]),
        }
        results = [job_id.replace("job_", "file-results-") for job_id in kept]
        self.ids["files"] += results

    def _jobs(self) -> tuple[list[str], str, str, str, str, list[str]]:
        """In the order in which the worker takes them, one at a time."""
        finished = [self._job() for _ in range(4)]
        failed = self._job(labels={"memory_at": "3"})
        paused, cancelled, running = (self._job(steps=LONG) for _ in range(3))
        return finished, failed, paused, cancelled, running, [self._job() for _ in range(2)]

    def _reach(self, paused: str, cancelled: str, running: str) -> None:
        """The states that are asked for while a job runs."""
        self._train(paused)
        self._ask(f"/jobs/{paused}/pause")
        self._become(paused, "paused")
        self._train(cancelled)
        self._ask(f"/jobs/{cancelled}/cancel")
        self._become(cancelled, "cancelled")
        self._train(running)

    def _job(self, steps: int = 6, **more: Any) -> str:
        body = {
            "base_model": f"file:{EXAMPLES / 'tiny-base'}",
            "dataset_uri": f"file:{EXAMPLES / 'data' / 'train.jsonl'}",
            "rank": 4,
            "training": {"max_steps": steps, "checkpoint_steps": 2},
            "labels": {"step_ms": "50" if steps == LONG else "1"},
            "webhook_url": self._hook,
            **more,
        }
        return str(self._ask("/jobs", json=body)["id"])

    def _fill_others(self) -> None:
        made = [self._dataset(rows) for rows in range(1, 3 + DELETED)]
        kept, spent = made[:2], made[2:]
        uploads = [self._upload(f"{number:064x}") for number in range(2 * DELETED)]
        self.ids |= {
            "datasets": kept,
            "spent datasets": spent[::2],
            "files": [dataset.replace("ds_", "file-") for dataset in kept],
            "spent files": [dataset.replace("ds_", "file-") for dataset in spent[1::2]],
            "keys": [self._ask("/keys", json={"name": str(n)})["id"] for n in range(DELETED)],
            "uploads": uploads[:DELETED],
            "spent uploads": uploads[DELETED:],
            "models": [f"file:{EXAMPLES / 'tiny-base'}"],
            "hooks": [self._hook],
        }

    def _dataset(self, rows: int) -> str:
        headers = {"Content-Type": "application/x-ndjson"}
        path = f"/datasets?filename={rows}.jsonl"
        return str(self._ask(path, content=BYTES * rows, headers=headers)["id"])

    def _upload(self, sha256: str) -> str:
        """Begun, with nothing sent yet."""
        answer = self._http.put(f"/datasets/uploads/{sha256}?filename=part.jsonl&size=1000")
        assert answer.is_success, answer.text
        return sha256

    def _names(self, job_id: str) -> list[str]:
        return [file["name"] for file in self._get(f"/jobs/{job_id}")["adapter"]["files"]]

    def _deliveries(self, job_id: str) -> list[str]:
        def delivered() -> list[str]:
            items = self._get(f"/jobs/{job_id}/deliveries")["items"]
            return [item["id"] for item in items if item["state"] == "delivered"]

        return until(delivered)

    def _train(self, job_id: str) -> None:
        """Wait until it has a checkpoint."""
        until(lambda: self._get(f"/jobs/{job_id}")["step"] >= 3, every=0.02)

    def _become(self, job_id: str, status: str) -> None:
        until(lambda: self._get(f"/jobs/{job_id}")["status"] == status, every=0.02)

    def _get(self, path: str) -> Json:
        answer = self._http.get(path)
        assert answer.is_success, answer.text
        found: Json = answer.json()
        return found

    def _ask(self, path: str, **more: Any) -> Json:
        answer = self._http.post(path, **more)
        assert answer.is_success, answer.text
        found: Json = answer.json()
        return found
