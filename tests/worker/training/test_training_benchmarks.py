"""The benchmarks of training run to their end on tiny shapes, and refuse what differs."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import ladder, llama, loss, memory, parity, study, throughput
from benchmarks.ladder import Measured
from benchmarks.sequences import Data, from_file, packed_data
from benchmarks.study import Cell, Outcome
from tests.flatlora.trainers import shorten_collections
from tests.worker.training.conftest import chat
from worker.training.batches import Batch
from worker.training.config import DataFile
from worker.training.model.loss import liger_cross_entropy
from worker.training.packing import length

CPU = torch.device("cpu")


def results(path: Path) -> Any:
    return json.loads(path.read_text())["results"]


@pytest.fixture(autouse=True)
def _speed() -> None:
    shorten_collections()


@pytest.fixture
def job_arguments(base_folder: Path, data_file: Callable[..., DataFile]) -> list[str]:
    train = data_file([chat(f"Say {n} twice.", f"{n} {n}") for n in range(16)], "train.jsonl")
    held_out = data_file([chat(f"Say {n} twice.", f"{n} {n}") for n in (90, 91)], "held.jsonl")
    return [
        *("--base-model", str(base_folder), "--dataset", str(train.path)),
        *("--validation", str(held_out.path), "--batch-size", "4", "--rank", "4"),
    ]


class TestThroughput:
    def test_it_climbs_the_whole_ladder(self, tmp_path: Path) -> None:
        path = tmp_path / "throughput.json"
        assert throughput.main(["--layers", "1", "--steps", "1", "--json", str(path)]) == 0
        found = results(path)["rungs"]
        names = [rung["rung"]["name"] for rung in found]
        assert names == [
            rung.name for rung in throughput.rungs() if not rung.compiled and not rung.bits
        ]
        for rung in found:
            assert rung["refusal"] is None
            assert rung["tokens_per_second"] > 0
            assert rung["gradient_apart"] < 1e-5
            assert len(rung["losses"]) == throughput.WARM + 1
        noisy = [rung for rung in found if rung["rung"]["sigma"]]
        plain = [rung for rung in found if rung["rung"]["name"] == throughput.PLAIN]
        assert noisy[0]["losses"] == pytest.approx(noisy[1]["losses"], rel=1e-6)
        assert noisy[0]["losses"] != pytest.approx(plain[0]["losses"], rel=1e-5)

    @pytest.mark.parametrize("only", [throughput.PLAIN, "TRL, no checkpointing"])
    def test_rows_that_see_each_other_are_refused(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, only: str
    ) -> None:
        """The reference takes each row by itself; these see what stands before them."""
        of = Batch.of

        def blurred(sequences: Any, device: torch.device, **how: Any) -> Batch:
            batch = of(sequences, device, **how)
            if "attention_mask" not in batch.inputs:
                size = batch.inputs["input_ids"].shape[1]
                batch.inputs["position_ids"] = torch.arange(size)[None]
            return batch

        monkeypatch.setattr(Batch, "of", blurred)
        if only != throughput.PLAIN:
            monkeypatch.setattr(
                "trl.trainer.sft_trainer.DataCollatorForLanguageModeling"
                ".get_position_ids_from_packed_seq_lengths",
                staticmethod(lambda lengths: [torch.arange(sum(each)) for each in lengths]),
            )
        path = tmp_path / "throughput.json"
        arguments = ["--layers", "1", "--steps", "1", "--only", only, "--json", str(path)]
        assert throughput.main(arguments) == 1
        packed = [rung for rung in results(path)["rungs"] if rung["rung"]["data"] == "packed"]
        assert all("differ" in rung["refusal"] for rung in packed)
        assert all(rung["tokens_per_second"] is None for rung in packed)

    def test_noise_that_is_not_there_is_refused(self) -> None:
        noisy, plain = (Measured(gradient=torch.tensor(g)) for g in ([1.0, 0.1], [1.0, 0.0]))
        assert throughput.is_without(noisy, noisy, plain) is None
        assert throughput.is_without(plain, noisy, plain) is not None

    def test_where_memory_does_not_suffice_fewer_rows_are_tried(self) -> None:
        tried = []

        def measure(rows: int) -> Measured:
            tried.append(rows)
            if rows > 1:
                raise torch.OutOfMemoryError("no memory")
            return Measured(peak=rows)

        rows, found = ladder.with_what_fits(measure, 4)
        assert found is not None
        assert (rows, found.peak) == (1, 1)
        assert tried == [4, 2, 1]

        def never(rows: int) -> Measured:
            raise torch.OutOfMemoryError("no memory")

        assert ladder.with_what_fits(never, 2) == (0, None)

    def test_models_share_weights_and_nothing_else(self) -> None:
        base = ladder.Base(llama.TINY, CPU)
        one, other = base.fresh(), base.fresh()
        layer: Any = one.get_submodule("model.layers.0.self_attn")
        ids = torch.arange(8)[None]
        call: Any = other
        expected = call(input_ids=ids).logits
        ladder.adapted(one, CPU)
        one.config.use_cache = True
        assert torch.equal(call(input_ids=ids).logits, expected)
        assert not other.config.use_cache
        weights = dict(other.named_parameters())
        theirs = weights["model.layers.0.self_attn.q_proj.weight"]
        assert layer.q_proj.base_layer.weight.data_ptr() == theirs.data_ptr()


class TestData:
    def test_packed_steps_are_full_of_rows_of_varied_lengths(self) -> None:
        data = packed_data(4096, 4, 6, vocab=1000, seed=1)
        sequences = [sequence for step in data.steps for sequence in step]
        assert len(sequences) == 24
        assert all(length(sequence) <= 4096 for sequence in sequences)
        facts = throughput.facts(data)
        assert facts["filled"] > 0.95
        low, median, high = facts["percentiles"]
        assert low < median / 2
        assert high > 2 * median
        assert data.tokens(0) == sum(length(sequence) for sequence in data.steps[0])
        assert data.targets(0) == data.tokens(0) - sum(len(rows) for rows in data.steps[0])

    def test_only_the_end_of_a_row_is_learnt_if_asked_for(self) -> None:
        data = packed_data(256, 2, 1, vocab=1000, seed=1, learnt=0.25)
        for sequence in data.steps[0]:
            for row in sequence:
                assert row.in_loss.sum() == max(1, round(0.25 * len(row.ids)))
                assert row.in_loss[-1]

    def test_a_file_of_tokens_takes_the_place_of_drawn_ones(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        rows = [{"input_ids": list(range(3, 40)), "labels": [-100] * 30 + [5] * 7}] * 9
        path.write_text("\n".join(map(json.dumps, rows)))
        data = from_file(path, 100, 1, 2, seed=0)
        assert isinstance(data, Data)
        assert data.tokens(0) == 74
        assert data.targets(0) == 14
        assert np.array_equal(data.steps[0][0][0].ids, np.arange(3, 40))
        with pytest.raises(ValueError, match="9 rows fill 5 sequences"):
            from_file(path, 100, 4, 2, seed=0)


class TestStudy:
    def test_it_compares_strengths_seed_by_seed_and_keeps_what_is_done(
        self, job_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "study.json"
        arguments = [
            *job_arguments,
            *("--folder", str(tmp_path / "cells"), "--json", str(path), "--max-steps", "2"),
            *("--sigmas", "0", "0.2", "--seeds", "1", "2", "--learning-rates", "1e-2"),
            *("--processes", "0", "--sharpness-rows", "2"),
        ]
        assert study.main(arguments) == 0
        found = results(path)
        assert [(line["sigma"], line["seeds"]) for line in found["table"]] == [(0, 2), (0.2, 2)]
        assert len({cell["loss"] for cell in found["cells"]}) == 4
        assert all(cell["loss"] < cell["before"] for cell in found["cells"])
        assert all(cell["rise"] is not None for cell in found["cells"])
        assert "4/4" in capsys.readouterr().err

        assert study.main(arguments) == 0
        assert results(path)["cells"] == found["cells"]
        assert not capsys.readouterr().err
        with pytest.raises(SystemExit, match="another study"):
            study.main([*arguments, "--max-steps", "3"])

    def test_differences_are_of_equal_seeds(self) -> None:
        def outcome(loss: float) -> Outcome:
            return Outcome(3.0, loss, 0.5, loss, None, 1.0, 10)

        losses = {(0.0, 1): 1.0, (0.0, 2): 2.0, (0.1, 1): 0.9, (0.1, 2): 1.8}
        cells = {Cell(*key, 1e-3): outcome(loss) for key, loss in losses.items()}
        plain, flat = study.lines(cells)
        assert plain.difference is None
        assert flat.loss == pytest.approx((1.35, math.sqrt(0.405)))
        assert flat.difference == pytest.approx((-0.15, 0.05))
        assert [study._shown((-0.15, 0.05), seeds) for seeds in (2, 3, 4)] == ["no", "no", "no"]
        assert study._shown((-0.15, 0.05), 9) == "lower"


class TestParity:
    def test_it_trains_both_and_judges(self, job_arguments: list[str], tmp_path: Path) -> None:
        path = tmp_path / "parity.json"
        arguments = [*job_arguments, "--seeds", "1", "2", "--steps", "3", "--json", str(path)]
        code = parity.main([*arguments, "--learning-rate", "1e-2"])
        found = results(path)
        assert code == (0 if found["within_noise"] else 1)
        for losses in found["losses"].values():
            assert len(set(losses)) == 2
            assert all(loss < found["before"] for loss in losses)

    def test_what_chance_explains_is_within_noise_and_more_is_not(self) -> None:
        ours, theirs = [1.00, 1.02, 1.04], [1.01, 1.03, 1.05]
        assert parity.judge(ours, theirs).is_within_noise
        verdict = parity.judge(ours, [loss + 0.1 for loss in theirs])
        assert not verdict.is_within_noise
        # Student's t of 4 degrees of freedom, both with a standard deviation of 0.02
        assert verdict.allowed == pytest.approx(2.776 * 0.02 * math.sqrt(2 / 3))


class TestMemory:
    def test_every_case_has_an_estimate(self) -> None:
        base = ladder.Base(llama.TINY, CPU)
        sizes = {}
        for case in memory.cases():
            data = memory.data_of(case, llama.TINY.vocab)
            sizes[case.name] = memory.estimated(base, case, data).total
        assert len(sizes) == len(memory.cases())
        assert sizes["2 × 4096, packed, σ resident"] > sizes["2 × 4096, packed"]
        assert sizes["1 × 1024, packed"] < sizes["2 × 4096, packed"]

    def test_an_estimate_that_is_off_is_said_to_be(self) -> None:
        def compared(estimated: int, measured: int | None) -> memory.Compared:
            return memory.Compared("1B", "case", estimated, measured, {})

        assert compared(114, 100).is_near
        assert not compared(116, 100).is_near
        assert not compared(84, 100).is_near
        assert compared(116, None).is_near


class TestLoss:
    def test_both_divisions_are_timed(self, tmp_path: Path) -> None:
        path = tmp_path / "loss.json"
        assert loss.main(["--json", str(path)]) == 0
        (found,) = results(path)
        assert (found["itself"]["rows"], found["ours"]["rows"]) == (4, 50)
        assert found["itself"]["ms"] > 0
        assert found["ours"]["ms"] > 0

    def test_one_that_computes_something_else_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def wrong(states: Tensor, weight: Tensor, wanted: Tensor, budget: int) -> Tensor:
            return budget * liger_cross_entropy(states, weight, wanted, budget)

        monkeypatch.setattr(loss, "liger_cross_entropy", wrong)
        assert loss.main([]) == 1
        assert "disagree" in capsys.readouterr().err
