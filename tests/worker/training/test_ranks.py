"""A job on two ranks: one adapter, that of a single process up to rounding, and exact resume.

Ranks that only compute are forked from a server that has imported all; one test starts a trainer as
the worker does.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from tests.flatlora.ranks import RankFailed, ranks_of
from tests.flatlora.ranks import Ranks as Processes
from tests.worker.training.conftest import Recorder, folder_bytes
from tests.worker.training.killing import describe
from worker.inputs import LOG_FILE
from worker.process import TrainerProcess
from worker.training.config import Resources, TrainingJob
from worker.training.errors import Stopped
from worker.training.ranks import Ranks, is_of_others
from worker.training.run import run

Make = Callable[..., TrainingJob]
CPU = torch.device("cpu")


class Trained(NamedTuple):
    """What a run on one rank has come to."""

    end: str | dict[str, Any]
    losses: list[float]


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with ranks_of(2) as processes:
        yield processes


def train(job: TrainingJob, folder: Path, stop: tuple[int, str] | None = None) -> Trained:
    """On every rank alike, but that only the first is told to stop."""
    recorder = Recorder(stop if Ranks(CPU).is_first else None)
    folder.mkdir(exist_ok=True)
    end: str | dict[str, Any]
    try:
        end = run(job, folder, recorder, recorder)
    except Stopped as stopped:
        end = stopped.wish
    losses = [step["loss"] for step in recorder.steps]
    return Trained(end, losses)


class TestWholeRuns:
    @pytest.fixture
    def uneven(self, make_job: Make) -> Callable[..., TrainingJob]:
        """Five passes a step, so that one rank has one more than the other."""

        def make(strategy: str, gpus: int = 2, **values: Any) -> TrainingJob:
            training = {"batch_size": 5, "micro_batch_size": 1, "max_steps": 4}
            resources = Resources(gpus, strategy)  # type: ignore[arg-type] # a literal
            return make_job(training=training, lora={"dropout": 0.0}, resources=resources, **values)

        return make

    @pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
    def test_without_noise_it_makes_the_adapter_of_one_process(
        self, processes: Processes, uneven: Make, tmp_path: Path, strategy: str
    ) -> None:
        alone = train(uneven("auto", gpus=1, sigma=0.0), tmp_path / "alone")
        first, second = processes.call(train, uneven(strategy, sigma=0.0), tmp_path / "together")
        assert first == second
        assert isinstance(first.end, dict)
        assert (first.end["gpus"], first.end["strategy"]) == (2, strategy)
        assert first.losses == pytest.approx(alone.losses, rel=1e-6)
        expected = load_file(tmp_path / "alone" / "adapter" / "adapter_model.safetensors")
        found = load_file(tmp_path / "together" / "adapter" / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        for name, weight in expected.items():  # Adam divides small by small
            torch.testing.assert_close(found[name], weight, rtol=1e-2, atol=1e-4, msg=name)

    def test_with_noise_both_strategies_compute_the_same(
        self, processes: Processes, uneven: Make, tmp_path: Path
    ) -> None:
        ddp, _ = processes.call(train, uneven("ddp"), tmp_path / "ddp")
        fsdp, _ = processes.call(train, uneven("fsdp"), tmp_path / "fsdp")
        assert fsdp.losses == pytest.approx(ddp.losses, rel=1e-6)

    @pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
    def test_all_stop_at_the_same_step_and_go_on_bit_for_bit(
        self, processes: Processes, make_job: Make, tmp_path: Path, strategy: str
    ) -> None:
        job = make_job(resources=Resources(2, strategy))  # type: ignore[arg-type]
        unbroken, _ = processes.call(train, job, tmp_path / "unbroken")
        for step in (3, 5):
            stopped = processes.call(train, job, tmp_path / "stopped", (step, "drain"))
            assert [one.end for one in stopped] == ["drain"] * 2
        first, second = processes.call(train, job, tmp_path / "stopped")
        assert first.losses == second.losses == unbroken.losses[5:]
        adapters = [folder_bytes(tmp_path / run / "adapter") for run in ("unbroken", "stopped")]
        assert adapters[0] == adapters[1]

    @pytest.mark.parametrize("wish", ["cancel", "drain"])
    def test_all_stop_where_one_stops_while_it_reads_the_rows(
        self, processes: Processes, make_job: Make, tmp_path: Path, wish: str
    ) -> None:
        job = make_job(resources=Resources(2))
        found = processes.call(train, job, tmp_path / "run", (0, wish))
        assert found == [Trained(wish, [])] * 2
        assert not list((tmp_path / "run").iterdir())

    def test_a_wish_to_cancel_leaves_no_checkpoint(
        self, processes: Processes, make_job: Make, tmp_path: Path
    ) -> None:
        job = make_job(resources=Resources(2))
        found = processes.call(train, job, tmp_path / "run", (1, "cancel"))
        assert [(one.end, len(one.losses)) for one in found] == [("cancel", 1)] * 2
        assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_the_trainer_of_a_job_of_two_gpus_goes_on_as_its_two_ranks(
    processes: Processes, make_job: Make, tmp_path: Path
) -> None:
    """From where others were stopped, in processes of its own."""
    job, folder = make_job(resources=Resources(2)), tmp_path / "job"
    describe(job, folder)
    processes.call(train, job, folder, (3, "drain"))
    environment = {"FLATLORA_DEVICE": "cpu+cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with TrainerProcess("train", folder, environment=environment) as trainer:
        said = list(trainer.messages())
        assert trainer.wait() == 0, (folder / LOG_FILE).read_text()
    assert [one["step"] for one in said if one["kind"] == "step"] == list(range(4, 9))
    (result,) = (one["result"] for one in said if one["kind"] == "result")
    (first, _) = processes.call(train, job, tmp_path / "unbroken")
    assert result == first.end
    assert folder_bytes(folder / "adapter") == folder_bytes(tmp_path / "unbroken" / "adapter")


def exchanged() -> dict[str, Any]:
    """What a rank gets of each kind of exchange."""
    ranks = Ranks(CPU)
    one, none, last = (nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (4,), (1,)))
    one.grad = torch.full((2, 3), 1.0 + ranks.rank)
    if not ranks.is_first:
        last.grad = torch.full((1,), 7.0)
    ranks.sum_gradients([one, none, last])
    ranks.wait()
    return {
        "place": (ranks.rank, ranks.size, ranks.is_first),
        "sum": ranks.sum(0.1, float(ranks.rank)),
        "gradients": [parameter.grad for parameter in (one, none, last)],
        "agree": (ranks.agree(ok=True), ranks.agree(ok=ranks.is_first)),
        "first": ranks.first_says(5 - ranks.rank),
        "text": (ranks.first_tells("näh" if ranks.is_first else "x"), ranks.first_tells("")),
        "uneven": ranks.share("abc"),
        "lockstep": Ranks(CPU, in_lockstep=True).share("abc"),
        "even": Ranks(CPU, in_lockstep=True).share("ab"),
        "group": dist.get_backend(),
    }


def alone_since() -> None:
    """The second ends, and the first says what it makes of that."""
    ranks = Ranks(CPU)
    ranks.wait()  # until both are there
    if not ranks.is_first:
        os._exit(1)
    try:
        for _ in range(10):
            ranks.wait()
    except RuntimeError as error:
        own = RuntimeError("of its own")
        raise AssertionError(f"{is_of_others(error)}, {is_of_others(own)}") from error


class TestExchange:
    def test_one_that_is_left_alone_knows_that_it_is_not_to_blame(self) -> None:
        with ranks_of(2) as processes, pytest.raises(RankFailed, match="Error: True, False"):
            processes.call(alone_since)

    def test_ranks_tell_each_other(self, processes: Processes) -> None:
        found = processes.call(exchanged)
        for rank, one in enumerate(found):
            assert one["place"] == (rank, 2, rank == 0)
            assert one["sum"] == [0.2, 1.0]
            assert [gradient.unique().tolist() for gradient in one["gradients"]] == [[3], [0], [7]]
            assert one["agree"] == (True, False)
            assert (one["first"], one["text"]) == (5, ("näh", ""))
        yes, no = True, False
        assert [one["uneven"] for one in found] == [[("a", yes), ("c", yes)], [("b", yes)]]
        assert [one["lockstep"] for one in found] == [
            [("a", yes), ("c", yes)], [("b", yes), ("c", no)]
        ]  # fmt: skip
        assert [one["even"] for one in found] == [[("a", yes)], [("b", yes)]]

    def test_one_alone_exchanges_nothing(self) -> None:
        ranks = Ranks(CPU)
        weight = nn.Parameter(torch.zeros(1))
        ranks.sum_gradients([weight])
        assert weight.grad is None
        assert (ranks.rank, ranks.size, ranks.is_first) == (0, 1, True)
        assert (ranks.sum(1.5), ranks.first_says(3), ranks.first_tells("x")) == ([1.5], 3, "x")
        assert ranks.share("ab") == [("a", True), ("b", True)]
