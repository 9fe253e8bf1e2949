"""A trainer with two GPUs, through NCCL: run by hand with ``pytest -m gpu`` where there are two."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.procs import is_alive
from tests.worker.training.conftest import folder_bytes
from tests.worker.training.killing import describe
from worker.inputs import LOG_FILE
from worker.process import TrainerProcess
from worker.training.config import Resources, TrainingJob

Make = Callable[..., TrainingJob]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def attempt(
    folder: Path, devices: str, then: Callable[[list[int]], None] = lambda _: None
) -> tuple[int, dict[str, Any]]:
    """Run the trainer; ``then`` is given its ranks once it trains."""
    environment = {"FLATLORA_DEVICE": devices, "CUDA_VISIBLE_DEVICES": devices.replace("+", ",")}
    said: dict[str, Any] = {}
    with TrainerProcess("train", folder, environment=environment) as trainer:
        for message in trainer.messages():
            if message["kind"] == "step" and "step" not in said:
                children = Path(f"/proc/{trainer.pid}/task/{trainer.pid}/children").read_text()
                then([int(pid) for pid in children.split()])
            said[message["kind"]] = message
        return trainer.wait(), said


def loss(said: dict[str, Any]) -> float:
    after: float = said["result"]["result"]["held_out"]["after"]["loss"]
    return after


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_gpus_train_as_one_does_and_go_on_bit_for_bit(
    make_job: Make, tmp_path: Path, strategy: Any
) -> None:
    def job(gpus: int, strategy: Any) -> TrainingJob:
        training = {"precision": "fp32", "max_steps": 30}
        resources = Resources(gpus, strategy)
        return make_job(sigma=0.0, lora={"dropout": 0.0}, training=training, resources=resources)

    describe(job(1, "auto"), tmp_path / "alone")
    for name in ("unbroken", "drained"):
        describe(job(2, strategy), tmp_path / name)
    code, alone = attempt(tmp_path / "alone", "0")
    assert code == 0
    code, together = attempt(tmp_path / "unbroken", "0+1")
    assert code == 0, (tmp_path / "unbroken" / LOG_FILE).read_text()
    assert together["result"]["result"]["strategy"] == strategy
    assert loss(together) == pytest.approx(loss(alone), rel=1e-3)

    code, said = attempt(
        tmp_path / "drained", "0+1", lambda ranks: os.kill(ranks[0], signal.SIGTERM)
    )
    assert (code, said["step"]["step"] < 30) == (75, True)
    code, said = attempt(tmp_path / "drained", "0+1")
    assert code == 0
    adapters = [folder_bytes(tmp_path / name / "adapter") for name in ("unbroken", "drained")]
    assert adapters[0] == adapters[1]


def test_a_killed_rank_ends_the_other_that_waits_in_a_kernel(
    make_job: Make, tmp_path: Path
) -> None:
    ranks: list[int] = []
    started = 0.0

    def kill_the_second(found: list[int]) -> None:
        nonlocal started
        ranks.extend(found)
        started = time.monotonic()
        os.kill(found[1], signal.SIGKILL)

    job = make_job(training={"max_steps": 100_000}, resources=Resources(2, "ddp"))
    describe(job, tmp_path / "job")
    code, said = attempt(tmp_path / "job", "0+1", kill_the_second)
    assert (code, "failed" in said) == (-signal.SIGKILL, False)
    assert time.monotonic() - started < 20
    assert not any(map(is_alive, ranks))
