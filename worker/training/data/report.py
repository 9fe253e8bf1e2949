"""The preflight report: plain JSON, and in lines for a person."""

from collections.abc import Iterator, Mapping
from math import ceil
from typing import Any

import numpy as np

from worker.training.config import TrainingJob
from worker.training.data.examples import Examples
from worker.training.data.keys import copies, found_in
from worker.training.data.reading import Read
from worker.training.data.rendering import Renderer
from worker.training.data.usable import Usable
from worker.training.order import Lengths, RowOrder, evaluation_every, total_steps

BAD_ROWS_SHOWN = 20


def describe(
    job: TrainingJob,
    dataset: Usable,
    validation: Usable | None,
    train: Examples,
    renderer: Renderer,
    max_length: int,
) -> dict[str, Any]:
    """The report as plain JSON.

    Args:
        job: The job.
        dataset: Rows that are trained on or held out.
        validation: Rows of a file of their own that are held out.
        train: The examples that are trained on.
        renderer: Shows the first of them.
        max_length: Tokens that rows were cut at.
    """
    found = dataset.found
    lengths = train.lengths
    used = len(train)
    steps = total_steps(job.training, lengths, job.seed)
    report = {
        "format": _format(found),
        "rows": {
            "read": found.rows,
            "used": used,
            "held_out": len(dataset.examples) - used,
            "bad": found.bad,
            "truncated": dataset.truncated,
            "dropped_without_targets": dataset.without_targets,
            "duplicates": copies(dataset.keys_of_all),
        },
        "bad_rows": _bad_rows(found),
        "tokens": {
            "all": int(lengths.sum()),
            "in_loss": int(train.targets.sum()),
        },
        "length": {
            "p50": int(np.percentile(lengths, 50)),
            "p90": int(np.percentile(lengths, 90)),
            "p99": int(np.percentile(lengths, 99)),
            "max": int(lengths.max()),
            "limit": max_length,
        },
        "steps": steps,
        "tokens_per_step": _tokens_per_step(job, lengths),
        "first_example": renderer.segments(train[0]),
        "warnings": [
            *_warnings(job, dataset, validation, max_length),
            *_idle_settings(job, steps),
        ],
    }
    if validation:
        report["validation"] = _describe_validation(validation, job.evaluation.max_rows)
    return report


def _tokens_per_step(job: TrainingJob, lengths: Lengths) -> int:
    return round(int(np.sum(lengths)) / RowOrder(lengths, job.training, job.seed).steps(1))


def _describe_validation(usable: Usable, max_rows: int) -> dict[str, Any]:
    found, held_out = usable.found, min(len(usable.examples), max_rows)
    return {
        "uri": found.file.uri,
        "format": _format(found),
        "rows": {
            "read": found.rows,
            "held_out": held_out,
            "beyond_max_rows": len(usable.examples) - held_out,
            "bad": found.bad,
            "truncated": usable.truncated,
            "dropped_without_targets": usable.without_targets,
        },
        "bad_rows": _bad_rows(found),
    }


def _format(found: Read) -> dict[str, Any]:
    return {
        "name": found.format,
        "file": found.source.type,
        "compression": found.source.compression,
    }


def _bad_rows(found: Read) -> list[dict[str, str]]:
    return [{"place": row.place, "problem": row.problem} for row in found.bad_rows[:BAD_ROWS_SHOWN]]


def _warnings(
    job: TrainingJob,
    dataset: Usable,
    validation: Usable | None,
    max_length: int,
) -> Iterator[str]:
    if max_length < job.data.max_length:
        yield (
            f"data.max_length {job.data.max_length} is more than the {max_length} positions of the "
            f"base model: rows are cut at {max_length}."
        )
    if not dataset.learns_to_stop:
        yield "No end-of-turn token is in the loss: the adapter will not learn to stop."
    for usable in filter(None, (dataset, validation)):
        where = f" of {usable.found.file.uri}" if validation else ""
        if bad := usable.found.bad:
            yield f"{bad} bad rows{where} were skipped, as data.max_bad_rows allows."
        if usable.truncated:
            yield f"{usable.truncated} rows{where} were cut at {max_length} tokens."
        if usable.without_targets:
            yield (
                f"{usable.without_targets} rows{where} were dropped: no token in the loss was left "
                "in them."
            )
    if validation:
        held_out = validation.keys[: job.evaluation.max_rows]
        if both := found_in(held_out, dataset.keys):
            yield f"{both} held-out rows are also among the rows to train on."


def _idle_settings(job: TrainingJob, steps: int) -> Iterator[str]:
    """Settings that this job gives nothing to do."""
    settings = job.evaluation
    evaluations = ceil(steps / evaluation_every(job, steps))
    if settings.patience and settings.patience >= evaluations:
        yield (
            f"evaluation.patience is {settings.patience}, and there are {evaluations} evaluations: "
            "the run will not end early. Lower it, or evaluation.every_steps."
        )
    if settings.min_delta and settings.patience is None:
        yield "evaluation.min_delta does nothing without evaluation.patience."


def describe_report(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The report in lines of two, for a person."""
    rows, tokens, length = report["rows"], report["tokens"], report["length"]
    lines = [
        ("format", _kind(report["format"])),
        ("rows", f"{rows['read']} read, {rows['used']} to train on, {rows['held_out']} held out"),
        ("left out", f"{rows['bad']} bad, {rows['dropped_without_targets']} without targets"),
        ("truncated", f"{rows['truncated']} at {length['limit']} tokens"),
        ("duplicates", str(rows["duplicates"])),
        ("tokens", f"{tokens['all']:,}, of them {tokens['in_loss']:,} in the loss"),
        ("length", f"median {length['p50']}, p90 {length['p90']}, longest {length['max']}"),
        ("steps", f"{report['steps']} of about {report['tokens_per_step']:,} tokens"),
    ]
    if validation := report.get("validation"):
        held = validation["rows"]
        lines += [
            ("validation", f"{_kind(validation['format'])}, {validation['uri']}"),
            ("", f"{held['read']} read, {held['held_out']} held out, {held['bad']} bad"),
        ]
    return [*lines, *_describe_estimates(report)]


def _describe_estimates(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if plan := report.get("plan"):
        yield "each step", plan["in_words"]
    if memory := report.get("memory"):
        yield "memory", memory["in_words"]
        fits = "it fits" if memory["fits"] else "it does not fit"
        total = memory["device_total_bytes"] / 2**30
        yield "", f"{fits} the {total:.1f} GiB of {memory['device']}"
    if time := report.get("time"):
        rate = f"{time['tokens_per_second']:,.0f} tokens/s"
        yield "time", f"very roughly {_in_words(time['seconds'])} at {rate}"


def _in_words(seconds: float) -> str:
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _kind(found: Mapping[str, Any]) -> str:
    return f"{found['name']} in {' '.join(filter(None, (found['file'], found['compression'])))}"
