"""The tiny trainer keeps the real one's promises, so that tests with it say something."""

import ast
import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from app.failpoints import VARIABLE
from app.jobs.schemas import JobCreate
from tests.faults import tiny_trainer
from tests.faults.twin import adapter_files, chain
from tests.system.service import Json, until
from worker.inputs import JOB_FILE, write_job
from worker.pipe import Message
from worker.process import Task, TrainerProcess
from worker.trainer import CANCELLED, DRAINED
from worker.training import checkpoints as real_checkpoints
from worker.training import run as real_run
from worker.training.config import BaseModel, DataFile

ROWS = b'{"messages": []}\n' * 20
STEPS = 30


class Job:
    """A job's folder on one machine, and runs of the trainer in it."""

    def __init__(self, folder: Path, **labels: str) -> None:
        self.folder = folder
        self.log = folder / "executions.jsonl"
        data = folder / "dataset" / "train"
        data.parent.mkdir(parents=True)
        data.write_bytes(ROWS)
        self.sha256 = hashlib.sha256(ROWS).hexdigest()
        body: Json = {
            "base_model": "org/model",
            "dataset_uri": "file:/rows.jsonl",
            "rank": 4,
            "labels": {"step_ms": "2", **labels},
            "training": {"max_steps": STEPS, "checkpoint_steps": 5},
        }
        self.spec = JobCreate.model_validate(body).resolved().model_dump(mode="json")
        base = BaseModel("org/model", folder, "abc")
        file = DataFile("file:/rows.jsonl", data, "rows.jsonl", self.sha256)
        write_job(folder, "job_1", self.spec, base, file, None)

    @property
    def states(self) -> list[str]:
        return chain(self.sha256, self.spec["seed"], self.spec["sigma"], STEPS)

    def start(
        self, task: Task = "train", *, fence: int = 1, failpoints: str = ""
    ) -> TrainerProcess:
        return TrainerProcess(
            task,
            self.folder,
            module="tests.faults.tiny_trainer",
            environment={
                "FLATLORA_EXECUTION_LOG": str(self.log),
                "FLATLORA_FENCE": str(fence),
                VARIABLE: failpoints,
            },
        )

    def run(
        self, task: Task = "train", *, fence: int = 1, failpoints: str = ""
    ) -> tuple[int, list[Message]]:
        with self.start(task, fence=fence, failpoints=failpoints) as trainer:
            messages = list(trainer.messages())
            return trainer.wait(), messages

    def executions(self, event: str) -> list[Json]:
        if not self.log.exists():
            return []
        entries = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [entry for entry in entries if entry["event"] == event]

    def steps(self) -> list[int]:
        return [entry["step"] for entry in self.executions("step")]

    def adapter(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.folder / "adapter").iterdir()}

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path / "job")


def of_kind(messages: list[Message], kind: str) -> list[Message]:
    return [message for message in messages if message["kind"] == kind]


def events(messages: list[Message]) -> list[tuple[str, Any]]:
    return [(message["type"], message["data"]) for message in of_kind(messages, "event")]


class TestUnbroken:
    def test_its_adapter_is_the_one_that_was_foretold(self, job: Job) -> None:
        code, messages = job.run()
        assert code == 0
        assert job.adapter() == adapter_files(job.states[-1], rank=4, base_model="org/model")
        assert job.run("verify") == (0, [{"kind": "result", "result": {}}])
        (result,) = of_kind(messages, "result")
        assert result["result"]["steps"] == STEPS

    def test_it_says_what_the_real_one_says(self, job: Job) -> None:
        _, messages = job.run()
        assert [message["step"] for message in of_kind(messages, "step")] == list(range(1, 31))
        assert [message["step"] for message in of_kind(messages, "held_out")] == [0, 20, 30]
        phases = [message["name"] for message in of_kind(messages, "phase")]
        assert phases[:3] == ["validating", "loading", "training"]
        steps = range(5, STEPS + 1, 5)
        told = events(messages)
        assert [(type_, data["step"]) for type_, data in told] == [
            ("job.checkpoint", step) for step in steps
        ]
        assert [data["kept"] for _, data in told] == [[5], *([n, n - 5] for n in steps[1:])]
        assert all(data["verified"] and data["size"] > 100 for _, data in told)
        assert len(of_kind(messages, "preflight")) == 1

    def test_its_texts_and_names_are_those_of_the_real_checkpoints(self) -> None:
        """So that a change there is not missed here."""

        def texts(module: Any) -> set[str]:
            """Of events, with the places that are filled in."""
            calls = [
                node
                for node in ast.walk(ast.parse(Path(module.__file__).read_text()))
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".event")
            ]
            return {ast.unparse(call).replace("self._reporter", "reporter") for call in calls}

        resumed = {text for text in texts(real_run) if "job.resumed" in text}
        assert len(resumed) == 1
        assert texts(real_checkpoints) | resumed == texts(tiny_trainer)
        assert real_checkpoints.KEPT == tiny_trainer.KEPT
        assert real_checkpoints.MANIFEST == tiny_trainer.MANIFEST

    def test_its_weights_are_a_safetensors_file_of_plain_lora(self, job: Job) -> None:
        job.run()
        tensors = load_file(job.folder / "adapter" / "adapter_model.safetensors")
        assert {name: tensor.shape for name, tensor in tensors.items()} == {
            "base_model.model.q_proj.lora_A.weight": (4, 8),
            "base_model.model.q_proj.lora_B.weight": (8, 4),
        }

    def test_another_seed_sigma_dataset_or_length_is_another_adapter(self) -> None:
        finals = {
            chain(*arguments)[-1]
            for arguments in (
                ("a", 1, 0.1, 9), ("b", 1, 0.1, 9), ("a", 2, 0.1, 9), ("a", 1, 0.2, 9),
                ("a", 1, 0.1, 8),
            )
        }  # fmt: skip
        assert len(finals) == 5

    def test_it_imports_no_torch_and_starts_in_a_moment(self) -> None:
        code = "import sys, tests.faults.tiny_trainer; sys.exit('torch' in sys.modules)"
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", code], check=True)
        assert time.monotonic() - started < 5

    def test_a_dry_run_trains_nothing(self, tmp_path: Path) -> None:
        job = Job(tmp_path / "job")
        record = json.loads((job.folder / JOB_FILE).read_text())
        record["spec"]["dry_run"] = True
        (job.folder / JOB_FILE).write_text(json.dumps(record))
        code, messages = job.run()
        assert code == 0
        assert of_kind(messages, "result")[0]["result"] == {"dry_run": True}
        assert not job.log.exists()


class TestResume:
    def test_killed_it_goes_on_from_its_checkpoint_to_the_same_bytes(self, tmp_path: Path) -> None:
        job = Job(tmp_path / "job", stall_at="13 first")  # it waits there until it is killed
        with job.start() as trainer:
            until(lambda: 12 in job.steps())
            trainer.kill()
            assert trainer.wait() == -signal.SIGKILL
        broken_at = job.steps()[-1]
        code, messages = job.run(fence=2)
        assert code == 0
        (resumed,) = job.executions("resume")
        assert broken_at - 5 <= resumed["step"] <= broken_at
        assert events(messages)[0] == ("job.resumed", {"step": resumed["step"]})
        second = [entry["step"] for entry in job.executions("step") if entry["fence"] == 2]
        assert second == list(range(resumed["step"] + 1, STEPS + 1))
        assert job.adapter() == adapter_files(job.states[-1], rank=4, base_model="org/model")

    def test_every_hash_in_the_log_is_that_of_the_chain(self, job: Job) -> None:
        job.run(failpoints=f"checkpoint.renamed=kill@{job.folder / 'once'}")
        job.run(fence=2)
        entries = [*job.executions("step"), *job.executions("resume"), *job.executions("end")]
        assert len(entries) == STEPS + 2
        assert all(entry["hash"] == job.states[entry["step"]] for entry in entries)

    @pytest.mark.parametrize("point", ["checkpoint.files_written", "checkpoint.renamed"])
    def test_killed_within_a_checkpoint_it_leaves_a_whole_one_or_none(
        self, job: Job, point: str
    ) -> None:
        code, _ = job.run(failpoints=f"{point}=kill@{job.folder / 'once'}")
        assert code == -signal.SIGKILL
        code, messages = job.run(fence=2)
        assert code == 0
        resumed = [data["step"] for type_, data in events(messages) if type_ == "job.resumed"]
        assert resumed == ([5] if point == "checkpoint.renamed" else [])
        assert job.adapter() == adapter_files(job.states[-1], rank=4, base_model="org/model")

    def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_taken(
        self, tmp_path: Path
    ) -> None:
        job = Job(tmp_path / "job", stall_at="13 first")  # it waits there until it is killed
        with job.start() as trainer:
            until(lambda: 12 in job.steps())
            trainer.kill()
            trainer.wait()
        *_, before, newest = (name for name in job.checkpoints() if not name.endswith(".tmp"))
        (job.folder / "checkpoints" / newest / "optimizer.safetensors").write_bytes(b"")
        _, messages = job.run(fence=2)
        assert events(messages)[:2] == [
            ("job.checkpoint_refused", {"checkpoint": newest}),
            ("job.resumed", {"step": int(before.removeprefix("ckpt-"))}),
        ]

    def test_only_two_are_kept(self, job: Job) -> None:
        job.run()
        assert job.checkpoints() == ["ckpt-000000025", "ckpt-000000030"]


class TestSignals:
    @pytest.fixture
    def job(self, tmp_path: Path) -> Job:
        """Not done before it has heard."""
        return Job(tmp_path / "job", step_ms="50")

    def test_drained_it_writes_a_checkpoint_of_where_it_stands(self, job: Job) -> None:
        with job.start() as trainer:
            until(lambda: 7 in job.steps())
            trainer.signal(signal.SIGTERM)
            list(trainer.messages())
            assert trainer.wait() == DRAINED
        assert job.checkpoints()[-1] == f"ckpt-{job.steps()[-1]:09d}"
        assert job.executions("end")[-1]["how"] == "drain"

    def test_cancelled_it_writes_none(self, job: Job) -> None:
        with job.start() as trainer:
            until(lambda: 7 in job.steps())
            trainer.signal(signal.SIGUSR1)
            list(trainer.messages())
            assert trainer.wait() == CANCELLED
        assert job.checkpoints()[-1] == f"ckpt-{job.steps()[-1] // 5 * 5:09d}"

    def test_deaf_it_goes_on(self, tmp_path: Path) -> None:
        job = Job(tmp_path / "job", deaf="1")
        with job.start() as trainer:
            until(lambda: 3 in job.steps())
            trainer.signal(signal.SIGTERM)
            trainer.signal(signal.SIGUSR1)
            list(trainer.messages())
            assert trainer.wait() == 0


class TestTrouble:
    def test_it_dies_of_a_segfault_each_time(self, tmp_path: Path) -> None:
        job = Job(tmp_path / "job", crash_at="7")
        assert [job.run(fence=fence)[0] for fence in (1, 2)] == [-signal.SIGSEGV] * 2
        assert job.steps() == [*range(1, 7), 6]

    def test_or_under_the_first_fence_only(self, tmp_path: Path) -> None:
        job = Job(tmp_path / "job", crash_at="7 first")
        assert [job.run(fence=fence)[0] for fence in (1, 2)] == [-signal.SIGSEGV, 0]

    @pytest.mark.parametrize(
        ("label", "reason"), [("full_at", "disk_full"), ("memory_at", "gpu_out_of_memory")]
    )
    def test_it_tells_the_reason_of_a_failure(
        self, tmp_path: Path, label: str, reason: str
    ) -> None:
        code, messages = Job(tmp_path / "job", **{label: "7"}).run()
        assert code == 1
        assert of_kind(messages, "failed")[0]["reason"] == reason

    def test_stalled_it_says_nothing_and_hears_nothing(self, tmp_path: Path) -> None:
        job = Job(tmp_path / "job", stall_at="7")
        with job.start() as trainer:
            until(lambda: 6 in job.steps())
            trainer.signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                trainer._process.wait(0.5)
        assert job.steps()[-1] == 6

    def test_an_adapter_that_was_changed_is_not_verified(self, job: Job) -> None:
        job.run()
        (job.folder / "adapter" / "README.md").write_text("changed")
        code, messages = job.run("verify")
        assert code == 1
        assert of_kind(messages, "failed")[0]["reason"] == "publish_failed"
        assert "README.md" in of_kind(messages, "failed")[0]["message"]
