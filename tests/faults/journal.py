"""The oracle: what the executions, the rows, the events and the store say, held against each other.

It knows the service's promises and nothing of its code. A history that breaks none gives an empty
list; what it finds otherwise says which job broke which rule by what.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.twin import adapter_files, chain, total_steps

Json = dict[str, Any]

TERMINAL = {"succeeded", "failed", "cancelled"}
TERMINAL_EVENTS = {f"job.{status}" for status in TERMINAL}


class Violation(NamedTuple):
    job: str
    rule: str
    detail: str


@dataclass(frozen=True)
class Story:
    """All that is known of one accepted job.

    Attributes:
        job_id: Its id, as the client was told it.
        row: Of the table ``jobs``: status, fence, spec, adapter, finished_at. None: it is gone.
        dataset_sha256: Of the rows that the client has submitted.
        executions: Its lines of the execution log, in order.
        events: Its rows of the table ``job_events``, in order.
        stored: Hashes of the bytes that the store gives for the names in the job's manifest; None
            where there is no manifest.
    """

    job_id: str
    row: Mapping[str, Any] | None
    dataset_sha256: str
    executions: Sequence[Json] = ()
    events: Sequence[Mapping[str, Any]] = ()
    stored: Mapping[str, str] | None = None

    @property
    def spec(self) -> Mapping[str, Any]:
        assert self.row is not None
        spec: Mapping[str, Any] = self.row["spec"]
        return spec

    @property
    def is_tiny(self) -> bool:
        """The tiny trainer has run it, or was to; of the real one no byte can be foretold."""
        return not self.spec["labels"].get("real") and not self.spec["dry_run"]

    @cached_property
    def states(self) -> list[str]:
        """What its unbroken twin goes through."""
        steps = total_steps(self.spec["training"])
        return chain(self.dataset_sha256, self.spec["seed"], self.spec["sigma"], steps)


@dataclass(frozen=True)
class Tolerance:
    """How long an attempt may run that has lost its job: the time between a fence and its effect.

    Attributes:
        seconds: After a higher fence has started, or the job has ended.
        thawed: Moments at which frozen workers were woken: each may go on for so long from there,
            until it looks at its clock.
    """

    seconds: float = 0.5
    thawed: Sequence[float] = field(default_factory=list)

    def allows(self, at: float, since: float) -> bool:
        return any(0 <= at - moment <= self.seconds for moment in (since, *self.thawed))


def check(stories: Sequence[Story], tolerance: Tolerance = Tolerance()) -> list[Violation]:
    """Every rule on every job."""
    found = []
    for story in stories:
        if story.row is None:
            found.append(Violation(story.job_id, "lost", "it was accepted and has no row"))
            continue
        for name, rule in RULES.items():
            found += [Violation(story.job_id, name, detail) for detail in rule(story)]
        found += [Violation(story.job_id, "zombie", it) for it in _zombies(story, tolerance)]
    return found


def expected_files(story: Story) -> dict[str, str]:
    """Hashes of the adapter that the unbroken twin publishes, by name."""
    files = adapter_files(
        story.states[-1], rank=story.spec["rank"], base_model=story.spec["base_model"]
    )
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def repeated_steps(executions: Sequence[Json]) -> int:
    """How many steps of one job were executed for nothing."""
    steps = [entry["step"] for entry in executions if entry["event"] == "step"]
    return len(steps) - len(set(steps))


def read_executions(path: Path) -> list[Json]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def _ends_once(story: Story) -> Iterator[str]:
    assert story.row is not None
    status, types = story.row["status"], [event["type"] for event in story.events]
    ends = [type_ for type_ in types if type_ in TERMINAL_EVENTS]
    if status not in TERMINAL:
        yield f"its status is {status}, which is no end"
    elif ends != [f"job.{status}"]:
        yield f"it is {status}, and its events say {', '.join(ends) or 'of no end'}"
    elif types[-1] != ends[0]:
        yield f"{types[-1]} comes after {ends[0]}"


def _events_are_contiguous(story: Story) -> Iterator[str]:
    numbers = [event["seq"] for event in story.events]
    if numbers != list(range(1, len(numbers) + 1)):
        yield f"its events are numbered {numbers}"


def _each_claim_is_told(story: Story) -> Iterator[str]:
    assert story.row is not None
    told = sum(event["type"] == "job.running" for event in story.events)
    if told != story.row["fence"]:
        yield f"its fence is {story.row['fence']}, and its events tell of {told} attempts"


def _has_its_adapter(story: Story) -> Iterator[str]:
    assert story.row is not None
    adapter = story.row["adapter"]
    is_due = story.row["status"] == "succeeded" and not story.spec["dry_run"]
    if not is_due or not adapter:
        if bool(adapter) != is_due:
            has = "an" if adapter else "no"
            yield f"it is {story.row['status']} and has {has} adapter"
        return
    named = {file["name"]: file["sha256"] for file in adapter["files"]}
    if story.stored is None:
        yield "the store has no manifest of it"
        return
    yield from _differences("the store has other bytes than the row says", named, story.stored)
    if story.is_tiny:
        twin = expected_files(story)
        yield from _differences("its adapter is not that of an unbroken run", twin, named)


def _differences(what: str, expected: Mapping[str, str], found: Mapping[str, str]) -> Iterator[str]:
    names = {*expected, *found}
    wrong = sorted(name for name in names if expected.get(name) != found.get(name))
    if wrong:
        yield f"{what}: {', '.join(wrong)}"


def _fences_are_known(story: Story) -> Iterator[str]:
    assert story.row is not None
    highest = max((entry["fence"] for entry in story.executions), default=0)
    if highest > story.row["fence"]:
        yield f"fence {highest} was executed, its row has {story.row['fence']}"
    starts = Counter(entry["fence"] for entry in story.executions if entry["event"] == "start")
    for fence, number in starts.items():
        if number > 1:
            yield f"fence {fence} was executed {number} times"


def _steps_are_contiguous(story: Story) -> Iterator[str]:
    done: dict[int, int] = {}
    for entry in story.executions:
        fence, step = entry["fence"], entry["step"]
        match entry["event"]:
            case "start" | "resume":
                done[fence] = step
            case "step":
                if step != done.get(fence, -1) + 1:
                    yield f"fence {fence} did step {step} after {done.get(fence, 'no start')}"
                done[fence] = step
            case "checkpoint" | "end":
                if step != done.get(fence):
                    yield f"fence {fence} has {entry['event']} {step} after step {done.get(fence)}"


def _resumes_from_checkpoints(story: Story) -> Iterator[str]:
    written: set[tuple[int, str]] = set()
    for entry in story.executions:
        place = (entry["step"], entry["hash"])
        if entry["event"] == "checkpoint":
            written.add(place)
        if entry["event"] == "resume" and place not in written:
            yield f"fence {entry['fence']} resumed after step {place[0]}, where no checkpoint was"


def _hashes_are_the_twins(story: Story) -> Iterator[str]:
    for entry in story.executions:
        step = entry["step"]
        if step >= len(story.states) or entry["hash"] != story.states[step]:
            yield f"fence {entry['fence']} was elsewhere than its twin at step {step}"
            return


def _succeeded_by_finishing(story: Story) -> Iterator[str]:
    assert story.row is not None
    if story.row["status"] != "succeeded" or not story.is_tiny:
        return
    last = len(story.states) - 1
    ends = [entry for entry in story.executions if entry["event"] == "end"]
    if not any(entry["how"] == "done" and entry["step"] == last for entry in ends):
        yield f"it succeeded, and nobody has done its last step {last}"


def _zombies(story: Story, tolerance: Tolerance) -> Iterator[str]:
    """What lower fences did although a higher one had begun, or the job was over."""
    assert story.row is not None
    newest, begun_at = 0, 0.0
    over_at = _timestamp(story.row["finished_at"])
    told: set[int] = set()
    for entry in story.executions:
        fence, at = entry["fence"], entry["at"]
        if fence > newest:
            newest, begun_at = fence, at
        elif fence < newest and fence not in told and not tolerance.allows(at, begun_at):
            told.add(fence)
            yield (
                f"fence {fence} did {entry['event']} {entry['step']} {at - begun_at:.2f} s after "
                f"fence {newest} had started"
            )
        if at > over_at and fence not in told and not tolerance.allows(at, over_at):
            told.add(fence)
            yield (
                f"fence {fence} did {entry['event']} {entry['step']} {at - over_at:.2f} s after "
                "the job was over"
            )


def _timestamp(moment: datetime | None) -> float:
    return moment.timestamp() if moment else float("inf")


RULES: dict[str, Callable[[Story], Iterator[str]]] = {
    "end": _ends_once,
    "events": _events_are_contiguous,
    "claims": _each_claim_is_told,
    "adapter": _has_its_adapter,
    "fence": _fences_are_known,
    "steps": _steps_are_contiguous,
    "resume": _resumes_from_checkpoints,
    "hash": _hashes_are_the_twins,
    "finish": _succeeded_by_finishing,
}
