"""A worker's numbers: written by many processes, added up by one, and never a job's trouble."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.faults.procs import reserve_port

# A parent that serves, and children that do what its input says: "<child> <call>" a line.
PARENT = """
import json, os, sys
from pathlib import Path
from app.settings import Settings
from worker import metrics

settings = Settings(data_dir=Path(sys.argv[1]), metrics_port=int(sys.argv[2]))
metrics.prepare_metrics(settings)
children = {}

def tell(child, call):
    if child == "parent":
        eval(call)
        return
    if child not in children:
        (ours, theirs), (answer, answered) = os.pipe(), os.pipe()
        if (pid := os.fork()) == 0:
            # or a sibling, or the child itself, would keep the pipe open whose end it waits for
            for end in (theirs, *(other for _, other, _ in children.values())):
                os.close(end)
            with open(ours) as calls:
                for line in iter(calls.readline, ""):
                    eval(line)
                    os.write(answered, b".")
            os._exit(0)
        children[child] = pid, theirs, answer
    pid, theirs, answer = children[child]
    os.write(theirs, f"{call}\\n".encode())
    os.read(answer, 1)

with metrics.serving_metrics(settings):
    print("ready", flush=True)
    for line in iter(sys.stdin.readline, ""):
        child, call = line.strip().split(" ", 1)
        if call == "kill":
            os.kill(children[child][0], 9)
            os.waitpid(children.pop(child)[0], 0)
        else:
            tell(child, call)
        print("done", flush=True)
"""


class Worker:
    def __init__(self, folder: Path) -> None:
        self._reserved = reserve_port()
        self.port: int = self._reserved.getsockname()[1]
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(folder), str(self.port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._heard() == "ready"

    def _heard(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()

    def tell(self, child: str, call: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{child} {call}\n")
        self._process.stdin.flush()
        assert self._heard() == "done"

    def scrape(self) -> dict[str, float]:
        """Values by ``name{label}``, where there is one label at most but ``le``."""
        response = httpx2.get(f"http://127.0.0.1:{self.port}/metrics", timeout=30)
        assert response.status_code == 200
        return {
            sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
            for family in text_string_to_metric_families(response.text)
            for sample in family.samples
        }

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        assert self._process.wait(30) == 0
        self._process.stdout.close()
        self._reserved.close()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    worker = Worker(tmp_path / "data")
    yield worker
    worker.close()


class TestNumbers:
    def test_those_of_all_processes_are_added_up(self, worker: Worker) -> None:
        for child, tokens in (("a", 100), ("b", 23), ("a", 7)):
            worker.tell(child, f"metrics.tokens({tokens})")
            worker.tell(child, "metrics.attempt_ended('succeeded', 40)")
        worker.tell("b", "metrics.attempt_began(3)")
        worker.tell("a", "metrics.attempt_began(None)")
        worker.tell("parent", "metrics.lease_expired(2)")
        worker.tell("b", "metrics.attempts_killed(1)")
        found = worker.scrape()
        assert found["flatlora_tokens_total"] == 130
        assert found["flatlora_job_attempts_total[succeeded]"] == 3
        assert found["flatlora_job_attempts_total[killed]"] == 1
        assert found["flatlora_lease_expired_total"] == 2
        assert found["flatlora_job_queue_seconds_count"] == 1
        assert found["flatlora_job_queue_seconds_bucket[5.0]"] == 1
        assert found["flatlora_job_queue_seconds_bucket[2.0]"] == 0
        assert found["flatlora_job_run_seconds_sum"] == 120
        assert found["flatlora_job_run_seconds_bucket[30.0]"] == 0
        assert found["flatlora_job_run_seconds_bucket[60.0]"] == 3

    def test_what_a_killed_process_has_counted_stays_and_what_it_held_does_not(
        self, worker: Worker
    ) -> None:
        for child, device in (("a", "0"), ("b", "1")):
            worker.tell(child, "metrics.tokens(5)")
            worker.tell(child, f"metrics.gpu_memory('{device}', 7000)")
        assert worker.scrape()["flatlora_gpu_memory_bytes[0]"] == 7000
        worker.tell("a", "kill")
        found = worker.scrape()
        assert "flatlora_gpu_memory_bytes[0]" not in found
        assert found["flatlora_gpu_memory_bytes[1]"] == 7000
        assert found["flatlora_tokens_total"] == 10

    def test_every_outcome_begins_at_zero_so_that_its_first_is_seen(self, worker: Worker) -> None:
        found = worker.scrape()
        for outcome in ("succeeded", "killed", "lease_lost", "worker_lost", "disk_full"):
            assert found[f"flatlora_job_attempts_total[{outcome}]"] == 0
        assert found["flatlora_tokens_total"] == found["flatlora_lease_expired_total"] == 0

    def test_a_step_of_a_trainer_is_heard(self, worker: Worker) -> None:
        step: dict[str, Any] = {"kind": "step", "metrics": {"tokens": 64, "gpu_memory_bytes": 9}}
        worker.tell("a", f"metrics.hear({step}, '0')")
        worker.tell("a", "metrics.hear({'kind': 'phase', 'name': 'training'}, '0')")
        worker.tell("a", "metrics.hear({'kind': 'step', 'metrics': {'tokens': 6}}, 'cpu')")
        worker.tell("a", "metrics.gpu_memory('cpu', 0)")
        found = worker.scrape()
        assert found["flatlora_tokens_total"] == 70
        assert found["flatlora_gpu_memory_bytes[0]"] == 9
        assert "flatlora_gpu_memory_bytes[cpu]" not in found

    def test_the_machine_is_told_too(self, worker: Worker) -> None:
        found = worker.scrape()
        assert found["flatlora_disk_free_bytes"] > 0
        assert found["process_open_fds"] > 0

    def test_a_file_that_its_process_has_died_over_is_left_out(self, worker: Worker) -> None:
        worker.tell("a", "metrics.tokens(5)")
        for content in (b"", b"\x00" * 65536, b"\xff" * 100, b"x"):
            (worker.folder / "metrics" / "counter_999999999.db").write_bytes(content)
            assert worker.scrape()["flatlora_tokens_total"] == 5

    def test_a_new_start_begins_at_zero(self, worker: Worker, tmp_path: Path) -> None:
        worker.tell("a", "metrics.tokens(5)")
        other = Worker(tmp_path / "data")
        assert other.scrape()["flatlora_tokens_total"] == 0
        other.close()


class TestNoTrouble:
    def python(self, code: str, folder: Path) -> Any:
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def test_without_a_port_nothing_is_written_or_imported(self, tmp_path: Path) -> None:
        code = """
import json, sys
from pathlib import Path
from app.settings import Settings
from worker import metrics
settings = Settings(data_dir=Path(sys.argv[1]))
metrics.prepare_metrics(settings)
with metrics.serving_metrics(settings):
    metrics.attempt_began(1), metrics.attempt_ended("succeeded", 1), metrics.tokens(1)
    metrics.lease_expired(1), metrics.gpu_memory("0", 1), metrics.attempts_killed(1)
print(json.dumps("prometheus_client" in sys.modules))
"""
        assert self.python(code, tmp_path / "data") is False
        assert not (tmp_path / "data").exists()

    def test_a_full_disk_costs_the_numbers_and_no_job(self, tmp_path: Path) -> None:
        code = """
import json, resource, signal, sys
from pathlib import Path
from app.settings import Settings
from worker import metrics
metrics.prepare_metrics(Settings(data_dir=Path(sys.argv[1]), metrics_port=9))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # no file may become larger
metrics.tokens(1), metrics.attempt_ended("succeeded", 1)
print(json.dumps("works on"))
"""
        assert self.python(code, tmp_path / "data") == "works on"

    def test_the_files_are_whole_so_that_no_full_disk_can_kill_who_writes_them(
        self, worker: Worker
    ) -> None:
        worker.tell("a", "metrics.gpu_memory('0', 1)")
        files = list((worker.folder / "metrics").glob("*.db"))
        assert len(files) >= 3
        for file in files:
            found = file.stat()
            assert found.st_blocks * 512 >= found.st_size == 65536

    def test_a_port_that_is_taken_is_told_and_the_worker_works(self, tmp_path: Path) -> None:
        code = """
import json, sys
from pathlib import Path
from app.settings import Settings
from worker import metrics
settings = Settings(data_dir=Path(sys.argv[1]), metrics_port=int(sys.argv[1].rpartition("-")[2]))
metrics.prepare_metrics(settings)
with metrics.serving_metrics(settings):
    metrics.tokens(1)
print(json.dumps("works on"))
"""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            folder = tmp_path / f"data-{taken.getsockname()[1]}"
            assert self.python(code, folder) == "works on"
