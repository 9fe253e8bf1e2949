"""Rows are split, cut and counted before a model is loaded, and the report says so."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.worker.training.conftest import MARKED, ROWS, Recorder, chat, make_tokenizer
from worker.training.config import Data, DataFile, Evaluation, TrainingJob
from worker.training.data.conversations import Conversation
from worker.training.data.dataset import Prepared, describe_report, fingerprint, prepare
from worker.training.data.examples import Example
from worker.training.data.keys import as_keys, key_of, split
from worker.training.data.rendering import Renderer
from worker.training.errors import ConfigInvalid, DatasetInvalid
from worker.training.run import run

Make = Callable[..., TrainingJob]


def prepared(
    job: TrainingJob, max_positions: int | None = None, template: str = MARKED
) -> Prepared:
    return prepare(job, Renderer(make_tokenizer(template), job.data.loss_on), max_positions)


def talks(*names: str) -> list[Conversation]:
    return [Conversation(chat(name, name)["messages"]) for name in names]


def held_of(rows: list[Conversation], share: float, max_rows: int, seed: int) -> set[int]:
    """Indices of the rows that are held out."""
    keys = as_keys(b"".join(key_of(row, seed) for row in rows))
    return set(np.flatnonzero(split(keys, share, max_rows)).tolist())


class TestSplit:
    def test_equal_rows_never_sit_on_both_sides(self) -> None:
        rows = talks(*(str(n % 20) for n in range(200)))
        for seed in range(20):
            held = held_of(rows, 0.2, 500, seed)
            assert held
            names = {index % 20 for index in held}
            assert len(held) == 10 * len(names)

    def test_it_does_not_depend_on_the_order_of_the_rows(self) -> None:
        rows = talks(*map(str, range(50)))
        one, other = held_of(rows, 0.1, 500, 1), held_of(rows[::-1], 0.1, 500, 1)
        assert one == {49 - index for index in other}
        assert len(one) == 5

    def test_the_seed_chooses_and_the_limit_holds(self) -> None:
        rows = talks(*map(str, range(50)))
        assert held_of(rows, 0.1, 500, 1) != held_of(rows, 0.1, 500, 2)
        assert len(held_of(rows, 0.5, 3, 1)) == 3

    def test_one_row_is_held_out_at_least_and_one_left_to_train_on(self) -> None:
        assert len(held_of(talks("a", "b"), 0.01, 500, 1)) == 1
        assert len(held_of(talks("a", "b", "c"), 0.5, 500, 1)) == 2

    def test_copies_beyond_the_limit_are_passed_over(self) -> None:
        rows = talks(*["copy"] * 900, *map(str, range(100)))
        for seed in range(20):
            held = held_of(rows, 0.05, 500, seed)
            assert len(held) == 50
            assert min(held) >= 900

    def test_the_fewest_copies_are_held_out_where_none_fit(self) -> None:
        rows = talks(*["a"] * 900, *["b"] * 20, *["c"] * 800)
        for seed in range(20):
            assert held_of(rows, 0.001, 500, seed) == set(range(900, 920))

    def test_rows_that_are_all_the_same_cannot_be_split(self) -> None:
        with pytest.raises(DatasetInvalid, match="are the same: none can be held out"):
            held_of(talks("a", "a"), 0.5, 500, 1)

    def test_only_rows_that_survive_are_held_out(self, make_job: Make) -> None:
        unlearnable = [chat(f"{n}" * 500, "y") for n in range(100, 160)]
        found = prepared(make_job(rows=[chat("a", "b"), *unlearnable, chat("c", "d")]))
        assert (len(found.train), len(found.held_out)) == (1, 1)
        assert found.report["rows"]["dropped_without_targets"] == 60


class TestChecks:
    """What the chat template does not take is a bad row, like any other."""

    TWICE = {"messages": [{"role": "user", "content": "a"}, *chat("b", "c")["messages"]]}
    ALTERNATING = (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate.') }}{% endif %}{% endfor %}" + MARKED
    )
    ARGUMENTS = (
        "{% for m in messages %}{% for call in m.tool_calls or [] %}"
        "{% for name, value in call.function.arguments | items %}{{ name }}{% endfor %}"
        "{% endfor %}{% endfor %}" + MARKED
    )
    CALL = {
        "messages": [
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "content": "b",
                "tool_calls": [{"function": {"name": "f", "arguments": ["x"]}}],
            },
        ]
    }

    def test_a_row_that_the_template_refuses_is_named(self, make_job: Make) -> None:
        job = make_job(rows=[*ROWS, self.TWICE, {"messages": 1}])
        with pytest.raises(DatasetInvalid) as caught:
            prepared(job, template=self.ALTERNATING)
        assert caught.value.message == (
            "2 of 42 rows of file:rows.jsonl cannot be used: line 41: the chat template refuses a "
            "conversation of user, user, assistant: Roles must alternate.; line 42: messages: "
            "expected a list of messages, found the number 1."
        )

    @pytest.mark.parametrize(
        ("row", "template", "words"),
        [(TWICE, ALTERNATING, "Roles must alternate"), (CALL, ARGUMENTS, "TypeError: ")],
    )
    def test_such_rows_are_counted(
        self, make_job: Make, row: Any, template: str, words: str
    ) -> None:
        job = make_job(rows=[row, *ROWS], data={"max_bad_rows": 1})
        report = prepared(job, template=template).report
        assert report["rows"]["bad"] == 1
        assert report["bad_rows"][0]["place"] == "line 1"
        assert words in report["bad_rows"][0]["problem"]

    def test_rendering_ends_where_far_too_many_are_refused(self, make_job: Make) -> None:
        job = make_job(rows=[*ROWS, *[self.TWICE] * 1500])
        with pytest.raises(DatasetInvalid, match=r"^At least 1,001 rows of file:rows\.jsonl"):
            prepared(job, template=self.ALTERNATING)

    def test_a_template_that_takes_no_row_is_the_jobs_fault(self, make_job: Make) -> None:
        template = "{{ raise_exception('No roles at all.\n') }}"
        job = make_job(data={"max_bad_rows": 10**9})
        with pytest.raises(ConfigInvalid, match=r"can render no row of file:rows\.jsonl") as caught:
            prepared(job, template=template)
        assert "user, assistant: No roles at all." in caught.value.message
        assert caught.value.message.isprintable()

    def test_a_template_that_renders_no_assistant_turn_is_refused(self, make_job: Make) -> None:
        template = MARKED.replace("m['role'] == 'assistant'", "m['role'] == 'model'")
        with pytest.raises(ConfigInvalid, match="renders no assistant turn"):
            prepared(make_job(), template=template)


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
        assert all(example.targets for example in [*found.train, *found.held_out])
        assert found.report["length"]["max"] <= 128

    def test_the_first_example_shows_what_is_learnt(self, make_job: Make) -> None:
        segments = prepared(make_job()).report["first_example"]
        assert [segment["in_loss"] for segment in segments] == [False, True]
        assert segments[1]["text"].endswith("<|im_end|>")

    def test_rows_that_all_lose_their_targets_fail_the_job(self, make_job: Make) -> None:
        with pytest.raises(DatasetInvalid, match=r"nothing is left of file:rows\.jsonl"):
            prepared(make_job(data={"max_length": 12}))

    def test_such_a_job_fails_before_the_model_is_loaded(
        self, make_job: Make, base_folder: Path, tmp_path: Path
    ) -> None:
        no_weights = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(base_folder, tmp_path / "base", ignore=no_weights)
        job = make_job(data={"max_length": 12})
        job = replace(job, base_model=replace(job.base_model, path=tmp_path / "base"))
        reporter = Recorder()
        with pytest.raises(DatasetInvalid, match="nothing is left of"):
            run(job, tmp_path, reporter, reporter)
        assert reporter.phases == ["validating"]

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

    def test_the_rows_of_both_files_add_up(
        self, make_job: Make, data_file: Callable[..., DataFile]
    ) -> None:
        unlearnable = chat("x" * 500, "y")
        rows = [*ROWS[:9], {"messages": 2}, unlearnable, *ROWS[20:30]]
        validation = data_file(rows, "validation.jsonl")
        job = make_job(rows=[{"messages": 1}, *ROWS], data={"max_bad_rows": 1})
        job = replace(job, validation=validation, evaluation=Evaluation(max_rows=15))
        found = prepared(job)
        assert found.report["rows"] == {
            "read": 41,
            "used": 40,
            "held_out": 0,
            "bad": 1,
            "truncated": 0,
            "dropped_without_targets": 0,
            "duplicates": 0,
        }
        assert found.report["validation"]["rows"] == {
            "read": 21,
            "held_out": 15,
            "beyond_max_rows": 4,
            "bad": 1,
            "truncated": 1,
            "dropped_without_targets": 1,
        }
        assert len(found.held_out) == 15
        assert found.report["bad_rows"][0]["place"] == "line 1"
        assert found.report["validation"]["bad_rows"][0]["place"] == "line 10"
        warnings = found.report["warnings"]
        assert "1 bad rows of file:validation.jsonl were skipped" in " ".join(warnings)
        lines = dict(describe_report(found.report))
        assert lines["validation"] == "chat in jsonl, file:validation.jsonl"

    def test_a_bad_row_of_the_held_out_file_is_told_with_its_file(
        self, make_job: Make, data_file: Callable[..., DataFile]
    ) -> None:
        validation = data_file([{"messages": 2}], "validation.jsonl")
        with pytest.raises(DatasetInvalid, match=r"1 of 1 rows of file:validation\.jsonl"):
            prepared(replace(make_job(), validation=validation))
        validation = data_file([chat("x" * 500, "y")], "validation.jsonl")
        with pytest.raises(DatasetInvalid, match=r"nothing is left of file:validation\.jsonl"):
            prepared(replace(make_job(), validation=validation))

    @pytest.mark.parametrize("loss_on", ["assistant", "last_assistant", "all"])
    def test_a_turn_without_an_end_is_warned_of(self, make_job: Make, loss_on: str) -> None:
        job = make_job(data={"loss_on": loss_on})
        assert not prepared(job).report["warnings"]
        template = MARKED.replace("<|im_end|>", "").replace("<|im_start|>", "")
        (warning,) = prepared(job, template=template).report["warnings"]
        assert warning == (
            "No end-of-turn token is in the loss: the adapter will not learn to stop."
        )

    def test_a_cut_row_has_no_end_and_is_not_warned_of(self, make_job: Make) -> None:
        rows = [chat("x", f"{n}" * 500) for n in range(5)]
        (warning,) = prepared(make_job(rows=rows)).report["warnings"]
        assert warning == "5 rows were cut at 128 tokens."

    def test_steps_follow_from_epochs(self, make_job: Make) -> None:
        job = make_job(training={"epochs": 2.5, "max_steps": None})
        used = prepared(job).report["rows"]["used"]
        per_epoch = -(-used // 4)
        assert prepared(job).report["steps"] == -(-per_epoch * 5 // 2)


def test_data_options_default_to_the_contracts(make_job: Make) -> None:
    options: Any = Data()
    assert (options.format, options.max_bad_rows, options.loss_on) == ("auto", 0, "assistant")


class TestFingerprint:
    def test_it_is_the_same_for_the_same_rows(self, make_job: Make) -> None:
        assert fingerprint(prepared(make_job())) == fingerprint(prepared(make_job()))

    def test_it_tells_every_id_mask_and_side(self, make_job: Make) -> None:
        found = prepared(make_job())
        first, *rest = found.train
        other_id, other_mask = first.ids.copy(), first.in_loss.copy()
        other_id[0] ^= 1
        other_mask[-1] ^= True
        half = len(first.ids) // 2
        halves = [
            Example(first.ids[:half], first.in_loss[:half]),
            Example(first.ids[half:], first.in_loss[half:]),
        ]
        variants = [
            found,
            replace(found, train=[Example(other_id, first.in_loss), *rest]),
            replace(found, train=[Example(first.ids, other_mask), *rest]),
            replace(found, train=[*halves, *rest]),
            replace(found, train=[*rest, first]),
            replace(found, train=rest, held_out=[first, *found.held_out]),
            replace(found, train=[*found.train, *found.held_out], held_out=[]),
        ]
        assert len({fingerprint(variant) for variant in variants}) == len(variants)


@pytest.mark.parametrize(
    ("evaluation", "told"),
    [
        (
            {"patience": 2, "every_steps": 4},
            "patience is 2, and there are 2 evaluations",
        ),
        ({"patience": 1, "every_steps": 4}, None),
        ({"min_delta": 0.1, "every_steps": 4}, "evaluation.min_delta does nothing"),
        ({"min_delta": 0.1, "patience": 1, "every_steps": 4}, None),
    ],
)
def test_settings_that_have_nothing_to_do_are_told(
    make_job: Make, evaluation: dict[str, Any], told: str | None
) -> None:
    job = replace(make_job(), evaluation=Evaluation(max_rows=3, **evaluation))
    warnings = prepared(job).report["warnings"]
    assert (told in " ".join(warnings)) if told else warnings == []
