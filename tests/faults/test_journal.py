"""The oracle passes a right history and finds each wrong one by its rule."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.jobs.schemas import JobCreate
from tests.faults.journal import (
    RULES,
    Json,
    Story,
    Tolerance,
    check,
    expected_files,
    read_executions,
    repeated_steps,
)

DATASET = "d" * 64
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def history(**labels: str) -> Story:
    """A job of ten steps that was killed after step 7 and went on from its checkpoint 5."""
    body: Json = {
        "base_model": "org/model",
        "dataset_uri": "file:rows.jsonl",
        "labels": labels,
        "training": {"max_steps": 10, "checkpoint_steps": 5},
    }
    spec = JobCreate.model_validate(body).resolved().model_dump(mode="json")
    row: Json = {
        "status": "succeeded", "fence": 2, "spec": spec, "adapter": None,
        "finished_at": BEGAN + timedelta(seconds=100),
    }  # fmt: skip
    story = Story("job_1", row, DATASET)
    files = expected_files(story)
    row["adapter"] = {"files": [{"name": name, "sha256": files[name]} for name in files]}
    types = ["queued", "running", "preflight", "requeued", "running", "resumed", "succeeded"]
    events = [{"seq": seq, "type": f"job.{type_}"} for seq, type_ in enumerate(types, start=1)]
    return replace(story, executions=executions(story.states), events=events, stored=files)


def executions(states: list[str]) -> list[Json]:
    """One line a second."""
    first = [("start", 0), *(("step", step) for step in range(1, 8))]
    first.insert(6, ("checkpoint", 5))
    second = [("start", 0), ("resume", 5), *(("step", step) for step in range(6, 11))]
    second += [("checkpoint", 10), ("end", 10)]
    done = [(1, *what) for what in first] + [(2, *what) for what in second]
    return [
        {
            "job": "job_1", "fence": fence, "event": event, "step": step, "hash": states[step],
            "how": "done", "at": BEGAN.timestamp() + second,
        }
        for second, (fence, event, step) in enumerate(done)
    ]  # fmt: skip


def entry(story: Story, fence: int, event: str, step: int) -> Json:
    """One line of the log, to be changed."""
    (found,) = (
        entry
        for entry in story.executions
        if (entry["fence"], entry["event"], entry["step"]) == (fence, event, step)
    )
    return found


def without(story: Story, *what: tuple[int, str, int]) -> Story:
    gone = [entry(story, *one) for one in what]
    return replace(story, executions=[line for line in story.executions if line not in gone])


def with_row(story: Story, **values: object) -> Story:
    assert story.row
    return replace(story, row={**story.row, **values})


def with_events(story: Story, *types: str) -> Story:
    events = [{"seq": seq, "type": f"job.{type_}"} for seq, type_ in enumerate(types, start=1)]
    return replace(story, events=events)


def late(story: Story, seconds: float) -> Story:
    """The first attempt does one step more, so many seconds after the second has started."""
    started = entry(story, 2, "start", 0)["at"]
    zombie = {**entry(story, 1, "step", 7), "step": 8, "hash": story.states[8]}
    lines = [*story.executions, {**zombie, "at": started + seconds}]
    return replace(story, executions=sorted(lines, key=lambda line: line["at"]))


def edit(story: Story, fence: int, event: str, step: int, /, **values: object) -> Story:
    old = entry(story, fence, event, step)
    lines = [{**line, **values} if line is old else line for line in story.executions]
    return replace(story, executions=lines)


def other_adapter(story: Story) -> Story:
    files = expected_files(replace(story, dataset_sha256="e" * 64))
    adapter = {"files": [{"name": name, "sha256": files[name]} for name in files]}
    return with_row(replace(story, stored=files), adapter=adapter)


def again(story: Story, *what: object) -> list[Json]:
    """The log with one line doubled."""
    lines = []
    for line in story.executions:
        lines.append(line)
        if (line["fence"], line["event"], line["step"]) == what:
            lines.append(dict(line))
    return lines


WRONG: dict[str, tuple[str, Callable[[Story], Story]]] = {
    "a job that is gone": ("lost", lambda story: replace(story, row=None)),
    "one that hangs": (
        "end",
        lambda story: with_row(
            with_events(story, "queued", "running", "running"), status="running", adapter=None
        ),
    ),
    "two ends": (
        "end",
        lambda story: with_events(story, "queued", "running", "running", "failed", "succeeded"),
    ),
    "an end that is not its status": (
        "end", lambda story: with_events(story, "queued", "running", "running", "failed"),
    ),
    "no end in the events": ("end", lambda story: with_events(story, "running", "running")),
    "an event after the end": (
        "end",
        lambda story: with_events(story, "running", "running", "succeeded", "requeued"),
    ),
    "a gap in the events": (
        "events",
        lambda story: replace(story, events=[event for event in story.events if event["seq"] != 3]),
    ),
    "a number twice": (
        "events", lambda story: replace(story, events=[story.events[0], *story.events]),
    ),
    "a claim that no event tells": (
        "claims", lambda story: with_events(story, "queued", "running", "succeeded"),
    ),
    "no adapter": ("adapter", lambda story: with_row(story, adapter=None)),
    "an adapter of a job that failed": (
        "adapter",
        lambda story: with_row(
            with_events(story, "queued", "running", "running", "failed"), status="failed"
        ),
    ),
    "no manifest": ("adapter", lambda story: replace(story, stored=None)),
    "other bytes in the store": (
        "adapter", lambda story: replace(story, stored={**(story.stored or {}), "README.md": "0"}),
    ),
    "a file too many": (
        "adapter", lambda story: replace(story, stored={**(story.stored or {}), "more": "0"}),
    ),
    "the adapter of other rows": ("adapter", other_adapter),
    "a fence that the row does not know": (
        "fence", lambda story: with_events(with_row(story, fence=1), "running", "succeeded"),
    ),
    "an attempt that is run twice": (
        "fence", lambda story: replace(story, executions=again(story, 2, "start", 0)),
    ),
    "a step left out": ("steps", lambda story: without(story, (2, "step", 8))),
    "a step done again": (
        "steps", lambda story: replace(story, executions=again(story, 1, "step", 3)),
    ),
    "steps without a start": ("steps", lambda story: without(story, (1, "start", 0))),
    "a checkpoint of a step to come": (
        "steps", lambda story: edit(story, 2, "checkpoint", 10, step=9, hash=story.states[9]),
    ),
    "a resume that skips a step": (
        "steps", lambda story: without(story, (2, "step", 6)),
    ),
    "a resume without a checkpoint": ("resume", lambda story: without(story, (1, "checkpoint", 5))),
    "a checkpoint that was written later": (
        "resume",
        lambda story: replace(
            story,
            executions=[
                *without(story, (1, "checkpoint", 5)).executions, entry(story, 1, "checkpoint", 5),
            ],
        ),
    ),
    "a step on other rows": ("hash", lambda story: edit(story, 2, "step", 9, hash="0" * 64)),
    "a step too many": ("hash", lambda story: edit(story, 2, "step", 10, step=11)),
    "an end that nobody has reached": ("finish", lambda story: without(story, (2, "end", 10))),
    "a zombie": ("zombie", lambda story: late(story, 3.5)),
    "a step after the end": (
        "zombie", lambda story: edit(story, 2, "end", 10, at=BEGAN.timestamp() + 101),
    ),
}  # fmt: skip


class TestOracle:
    def test_it_passes_a_job_that_was_killed_and_went_on(self) -> None:
        assert check([history()]) == []

    @pytest.mark.parametrize("name", WRONG)
    def test_it_finds(self, name: str) -> None:
        rule, spoil = WRONG[name]
        good = history()
        found = check([good, replace(spoil(good), job_id="job_2")])
        assert rule in {violation.rule for violation in found}, found
        assert {violation.job for violation in found} == {"job_2"}

    def test_every_rule_is_among_them(self) -> None:
        assert {rule for rule, _ in WRONG.values()} == {*RULES, "lost", "zombie"}


class TestZombies:
    def test_one_is_allowed_for_a_moment(self) -> None:
        assert check([late(history(), 0.4)]) == []
        (found,) = check([late(history(), 0.6)])
        assert found.detail.startswith("fence 1 did step 8 0.60 s after fence 2")

    def test_and_for_a_moment_after_it_was_woken(self) -> None:
        story = late(history(), 3.5)
        woken = entry(story, 2, "start", 0)["at"] + 3.2
        assert check([story], Tolerance(thawed=[woken])) == []
        assert check([story], Tolerance(thawed=[woken - 1]))


class TestOtherJobs:
    def test_of_the_real_trainer_no_bytes_are_foretold(self) -> None:
        story = history(real="1")
        real = {"adapter_model.safetensors": "1" * 64}
        adapter = {"files": [{"name": name, "sha256": real[name]} for name in real]}
        story = with_row(replace(story, executions=[], stored=real), adapter=adapter)
        assert check([story]) == []

    def test_a_cancelled_job_needs_no_adapter(self) -> None:
        row = with_row(history(), status="cancelled", adapter=None)
        story = with_events(row, "running", "running", "cancelled")
        assert check([replace(story, stored=None)]) == []


def test_repeated_steps_are_those_between_the_checkpoint_and_the_death() -> None:
    assert repeated_steps(history().executions) == 2


def test_a_log_that_nobody_has_written_is_empty(tmp_path: Path) -> None:
    assert read_executions(tmp_path / "none.jsonl") == []
