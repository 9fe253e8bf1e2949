"""Rows that share a sequence do not see each other, and a step's loss is the same packed or not."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from tests.worker.training.conftest import Recorder
from tests.worker.training.packed import ROWS, VOCABULARY, make_model, make_rows
from worker.training.batches import Batch
from worker.training.config import Training, TrainingJob
from worker.training.data.examples import Example
from worker.training.errors import ConfigInvalid
from worker.training.evaluation import evaluate
from worker.training.fit import largest_pass
from worker.training.model.attention import ISOLATES_ROWS
from worker.training.model.head import summed_loss
from worker.training.packing import best_fit, length, micro_batches
from worker.training.plan import Plan
from worker.training.run import run

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=sorted(ISOLATES_ROWS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


def loss_and_gradients(
    model: PreTrainedModel, passes: list[list[list[Example]]]
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    embedding = model.get_input_embeddings().weight
    embedding.requires_grad_(True)
    total = torch.zeros((), dtype=torch.float64)
    for sequences in passes:
        loss = summed_loss(model, Batch.of(sequences, CPU))
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total, {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and "lm_head" not in name and "embed" not in name
    }


class TestLaw:
    def test_a_packed_loss_is_that_of_the_rows_alone(self, model: PreTrainedModel) -> None:
        """And so are its gradients, in float64."""
        alone, gradients = loss_and_gradients(model, [[[row]] for row in ROWS])
        for capacity in (40, 64, 200):
            packed, found = loss_and_gradients(model, [best_fit(ROWS, capacity)])
            torch.testing.assert_close(packed, alone, rtol=1e-6, atol=0)
            torch.testing.assert_close(found, gradients, rtol=1e-5, atol=1e-7)  # norms are float32

    def test_what_stands_in_another_row_changes_nothing(self, model: PreTrainedModel) -> None:
        other = [replace(ROWS[2], ids=(ROWS[2].ids + 7) % VOCABULARY), *ROWS[:2]]
        batches = [Batch.of([rows], CPU) for rows in ([ROWS[2], *ROWS[:2]], other)]
        logits = [model(**batch.inputs, use_cache=False).logits[0, 40:] for batch in batches]
        assert not torch.equal(batches[0].inputs["input_ids"], batches[1].inputs["input_ids"])
        torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-12)

    def test_evaluation_is_the_same_packed_or_not(self, model: PreTrainedModel) -> None:
        plans = [
            Plan(max_length=40, micro_batch_size=size, packing=packing)
            for size in (1, 3)
            for packing in (False, True)
        ]
        found = [evaluate(model, ROWS, plan, CPU) for plan in plans]
        for other in found[1:]:
            assert other == pytest.approx(found[0], rel=1e-6)


class TestBatch:
    def test_only_real_tokens_count_and_no_first_token_is_a_target(self) -> None:
        batch = Batch.of(best_fit(ROWS, 64), CPU)
        assert batch.tokens == sum(len(row.ids) for row in ROWS)
        assert len(batch.targets) == sum(row.targets for row in ROWS)
        ids, positions = batch.inputs["input_ids"].flatten(), batch.inputs["position_ids"].flatten()
        assert torch.equal(ids[batch.places + 1], batch.targets)
        assert bool((positions[batch.places + 1] > 0).all())
        assert "attention_mask" not in batch.inputs

    def test_rows_end_to_end_have_no_padding_and_name_where_they_begin(self) -> None:
        sequences = best_fit(ROWS, 64)
        batch = Batch.of(sequences, CPU, end_to_end=True)
        starts = batch.inputs["cu_seq_lens_q"]
        assert batch.inputs["input_ids"].numel() == batch.tokens == int(starts[-1])
        assert torch.equal(torch.where(batch.inputs["position_ids"][0] == 0)[0].int(), starts[:-1])
        assert batch.inputs["max_length_q"] == 40

    def test_what_stands_in_the_padding_is_seen_by_nobody(self) -> None:
        model = make_model("llama")
        for sequences in ([[row] for row in ROWS], best_fit(ROWS, 50)):
            batch = Batch.of(sequences, CPU)
            ids = batch.inputs["input_ids"]
            real = torch.tensor(
                [[n < length(sequence) for n in range(ids.shape[1])] for sequence in sequences]
            )
            other = replace(batch, inputs={**batch.inputs, "input_ids": ids.where(real, 9)})
            assert not bool(real.all())
            with torch.no_grad():
                assert summed_loss(model, batch) == summed_loss(model, other)


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[Example], Plan]:
    longest = draw(st.integers(1, 50))
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=30))
    plan = Plan(
        max_length=longest,
        micro_batch_size=draw(st.integers(1, 5)),
        packing=draw(st.booleans()),
        varlen=draw(st.booleans()),
    )
    return make_rows(*lengths), plan


@given(steps())
def test_every_row_is_in_one_pass_once_and_no_pass_is_too_large(
    step: tuple[list[Example], Plan],
) -> None:
    rows, plan = step
    passes = micro_batches(rows, plan)
    found = [id(row) for sequences in passes for sequence in sequences for row in sequence]
    assert sorted(found) == sorted(map(id, rows))
    for sequences in passes:
        assert len(sequences) <= plan.sequences
        assert all(length(sequence) <= plan.capacity for sequence in sequences)
        assert sum(map(length, sequences)) <= plan.max_length * plan.micro_batch_size
    longest = [max(map(length, sequences)) for sequences in passes]
    assert longest == sorted(longest, reverse=True)
    assert micro_batches(rows, plan) == passes


@given(steps(), st.integers(1, 12), st.integers(1, 3))
def test_no_pass_is_larger_than_the_one_that_is_tried_first(
    step: tuple[list[Example], Plan], batch_size: int, ranks: int
) -> None:
    rows, plan = step
    tried = sum(map(length, largest_pass(rows, plan, Training(batch_size=batch_size))))
    longest = sorted(rows, key=lambda row: -len(row.ids))[:batch_size]
    for some in (rows[:batch_size], rows[-batch_size:], longest):
        found = [sum(map(length, sequences)) for sequences in micro_batches(some, plan, ranks)]
        assert max(found) <= tried
    assert tried <= sum(len(row.ids) for row in longest)


def test_ranks_have_as_many_passes_though_one_would_hold_all() -> None:
    plan = Plan(max_length=1000, micro_batch_size=4, packing=True, varlen=True)
    passes = micro_batches(make_rows(*[100] * 16), plan, ranks=4)
    assert [sum(map(length, sequences)) for sequences in passes] == [400] * 4


def test_best_fit_wastes_little() -> None:
    random = np.random.default_rng(3)
    rows = make_rows(*random.integers(20, 600, 400))
    tokens = sum(len(row.ids) for row in rows)
    assert len(best_fit(rows, 1024)) * 1024 < 1.01 * tokens + 1024


class TestWholeRuns:
    @pytest.fixture
    def losses(
        self, make_job: Callable[..., TrainingJob], tmp_path: Any
    ) -> Callable[..., list[float]]:
        def losses_of(**training: Any) -> list[float]:
            job = make_job(sigma=0.0, lora={"dropout": 0.0}, training=training)
            recorder = Recorder()
            run(job, tmp_path / str(training), recorder, recorder)
            return [step["loss"] for step in recorder.steps]

        return losses_of

    def test_packing_changes_no_loss_but_by_rounding(
        self, losses: Callable[..., list[float]]
    ) -> None:
        assert losses(packing=True) == pytest.approx(losses(packing=False), rel=1e-4)

    def test_a_family_that_is_not_known_to_keep_rows_apart_is_refused(
        self, make_job: Callable[..., TrainingJob], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import worker.training.first_plan as module

        monkeypatch.setattr(module, "ISOLATES_ROWS", frozenset({"qwen3"}))
        with pytest.raises(ConfigInvalid, match="family llama are not known"):
            run(make_job(training={"packing": True}), tmp_path, Recorder(), Recorder())
