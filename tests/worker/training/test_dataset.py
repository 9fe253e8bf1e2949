"""Rows are split, cut and counted before a model is loaded, and the report says so."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.worker.training.conftest import ROWS, chat, make_tokenizer
from worker.training.config import Data, DataFile, Evaluation, TrainingJob
from worker.training.conversations import Conversation
from worker.training.dataset import Prepared, prepare, split
from worker.training.errors import DatasetInvalid
from worker.training.rendering import Renderer

Make = Callable[..., TrainingJob]


def prepared(job: TrainingJob, max_positions: int | None = None) -> Prepared:
    return prepare(job, Renderer(make_tokenizer(), job.data.loss_on), max_positions)


def talks(*names: str) -> list[Conversation]:
    return [Conversation(chat(name, name)["messages"]) for name in names]


class TestSplit:
    def test_equal_rows_never_sit_on_both_sides(self) -> None:
        rows = talks(*(str(n % 20) for n in range(200)))
        for seed in range(20):
            train, held_out = split(rows, 0.2, 500, seed)
            assert len(train) + len(held_out) == 200
            assert held_out
            seen = {row.canonical() for row in train}
            assert not seen & {row.canonical() for row in held_out}

    def test_it_does_not_depend_on_the_order_of_the_rows(self) -> None:
        rows = talks(*map(str, range(50)))
        one, other = split(rows, 0.1, 500, 1)[1], split(rows[::-1], 0.1, 500, 1)[1]
        assert {row.canonical() for row in one} == {row.canonical() for row in other}
        assert len(one) == 5

    def test_the_seed_chooses_and_the_limit_holds(self) -> None:
        rows = talks(*map(str, range(50)))
        assert split(rows, 0.1, 500, 1) != split(rows, 0.1, 500, 2)
        assert len(split(rows, 0.5, 3, 1)[1]) == 3

    def test_one_row_is_held_out_at_least_and_one_left_to_train_on(self) -> None:
        train, held_out = split(talks("a", "b"), 0.01, 500, 1)
        assert (len(train), len(held_out)) == (1, 1)

    def test_rows_that_are_all_the_same_cannot_be_split(self) -> None:
        with pytest.raises(DatasetInvalid, match="All rows are the same"):
            split(talks("a", "a"), 0.5, 500, 1)


class TestReport:
    def test_every_row_is_accounted_for(self, make_job: Make) -> None:
        long, unlearnable = chat("x", "y" * 500), chat("x" * 500, "y")
        rows = [*ROWS, ROWS[0], long, unlearnable, {"messages": 1}]
        job = make_job(rows=rows, data={"max_bad_rows": 1})
        found = prepared(job)
        rows_report = found.report["rows"]
        assert rows_report["read"] == len(rows)
        assert rows_report["bad"] == 1
        assert rows_report["truncated"] == 2
        assert rows_report["dropped_without_targets"] == 1
        assert rows_report["duplicates"] == 1
        total = sum(rows_report[n] for n in ("used", "held_out", "bad", "dropped_without_targets"))
        assert total == len(rows)
        assert found.report["bad_rows"][0]["place"] == f"line {len(rows)}"
        assert all(example.targets for example in found.train + found.held_out)
        assert found.report["length"]["max"] <= 128

    def test_the_first_example_shows_what_is_learnt(self, make_job: Make) -> None:
        segments = prepared(make_job()).report["first_example"]
        assert [segment["in_loss"] for segment in segments] == [False, True]
        assert segments[1]["text"].endswith("<|im_end|>")

    def test_rows_that_all_lose_their_targets_fail_the_job(self, make_job: Make) -> None:
        with pytest.raises(DatasetInvalid, match="nothing is left to train on"):
            prepared(make_job(data={"max_length": 12}))

    def test_a_length_beyond_the_model_is_lowered_and_said(self, make_job: Make) -> None:
        report = prepared(make_job(), max_positions=64).report
        assert report["length"]["limit"] == 64
        assert "64 positions" in report["warnings"][0]

    def test_held_out_rows_of_their_own_are_used_and_compared(
        self, make_job: Make, data_file: Callable[..., DataFile]
    ) -> None:
        validation = data_file([ROWS[0], chat("new", "row")], "validation.jsonl")
        job = replace(make_job(), validation=validation, evaluation=Evaluation())
        found = prepared(job)
        assert (len(found.train), len(found.held_out)) == (len(ROWS), 2)
        assert any("1 held-out rows are also among" in text for text in found.report["warnings"])

    def test_steps_follow_from_epochs(self, make_job: Make) -> None:
        job = make_job(training={"epochs": 2.5, "max_steps": None})
        used = prepared(job).report["rows"]["used"]
        per_epoch = -(-used // 4)
        assert prepared(job).report["steps"] == -(-per_epoch * 5 // 2)


def test_data_options_default_to_the_contracts(make_job: Make) -> None:
    options: Any = Data()
    assert (options.format, options.max_bad_rows, options.loss_on) == ("auto", 0, "assistant")
