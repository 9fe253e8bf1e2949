"""Following a job: a progress bar on a terminal, a line per change elsewhere."""

import time
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
)
from rich.text import Text

from app.cli.client import Client, Json
from app.cli.output import CANCELLED, FAILED, OK, err, out

POLL_SECONDS = 0.5
BAR_WIDTH = 20
TERMINAL = {"succeeded", "failed", "cancelled"}


class MetricsColumn(ProgressColumn):
    """``loss 1.2345 · σ 0.0312 · 0:42 left``"""

    def render(self, task: Task) -> Text:
        return Text(describe_progress(task.fields["progress"]), style="cyan")


def describe_progress(progress: Json | None) -> str:
    if not progress:
        return ""
    parts = []
    if progress.get("loss") is not None:
        parts.append(f"loss {progress['loss']:.4f}")
    if progress.get("sigma") is not None:
        parts.append(f"σ {progress['sigma']:.4f}")
    if progress.get("eta_seconds") is not None:
        minutes, seconds = divmod(round(progress["eta_seconds"]), 60)
        parts.append(f"{minutes}:{seconds:02d} left")
    return " · ".join(parts)


def describe_status(job: Json) -> str:
    if job["status"] == "queued" and job["queue_position"]:
        return f"queued ({job['queue_position']} before it)"
    return str(job["phase"] or job["status"])


def watch(client: Client, job_id: str) -> Json:
    """Follow a job to its end and return it."""
    job = client.get(f"/jobs/{job_id}")
    if job["status"] in TERMINAL:
        return job
    return _draw(client, job) if err.is_terminal else _print_changes(client, job)


def _draw(client: Client, job: Json) -> Json:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=BAR_WIDTH),
        MofNCompleteColumn(),
        MetricsColumn(),
    )
    with Progress(*columns, console=err) as bar:
        task = bar.add_task(describe_status(job), total=None, progress=None)
        for seen in _until_over(client, job):
            job = seen
            bar.update(
                task,
                description=describe_status(job),
                completed=job["step"],
                total=job["total_steps"],
                progress=job["progress"],
            )
    return job


def _print_changes(client: Client, job: Json) -> Json:
    """For logs and pipes: a line per phase and per tenth of the run."""
    last: tuple[Any, ...] = ()
    for seen in _until_over(client, job):
        job = seen
        total = job["total_steps"]
        tenth = job["step"] * 10 // total if total else 0
        if (job["status"], job["phase"], tenth) != last:
            last = (job["status"], job["phase"], tenth)
            steps = f"{bar(job['step'], total)} {job['step']}/{total} " if total else ""
            line = f"{describe_status(job):<10} {steps}{describe_progress(job['progress'])}"
            err.print(line.rstrip(), highlight=False)
    return job


def bar(step: int, total: int) -> str:
    """``━━━━━━━━━━──────────``"""
    filled = BAR_WIDTH * step // total
    return "━" * filled + "─" * (BAR_WIDTH - filled)


def _until_over(client: Client, job: Json) -> Any:
    while True:
        yield job
        if job["status"] in TERMINAL:
            return
        time.sleep(POLL_SECONDS)
        job = client.poll(f"/jobs/{job['id']}")


def exit_code(job: Json) -> int:
    return {"failed": FAILED, "cancelled": CANCELLED}.get(job["status"], OK)


def print_outcome(job: Json) -> None:
    """The last lines of a followed job."""
    match job["status"]:
        case "succeeded":
            out.print(f"[green]succeeded[/] {job['id']}", highlight=False)
            _print_losses(job["result"] or {})
            if job["adapter"]:
                size = job["adapter"]["size"] / 1e6
                out.print(
                    f"adapter: {size:.2f} MB, get it with: flatlora jobs download {job['id']}",
                    highlight=False,
                )
        case "failed":
            failure = job["failure"]
            out.print(f"[red]failed[/] {job['id']} ({failure['reason']})", highlight=False)
            out.print(failure["message"], markup=False, highlight=False)
            if failure["hint"]:
                out.print(f"hint: {failure['hint']}", markup=False, highlight=False)
        case status:
            out.print(f"{status} {job['id']}", highlight=False)


def _print_losses(result: Json) -> None:
    held_out = result.get("held_out")
    if held_out and held_out.get("after"):
        before, after = held_out["before"]["loss"], held_out["after"]["loss"]
        out.print(
            f"held-out loss: {before:.4f} → {after:.4f} on {held_out['rows']} rows",
            highlight=False,
        )
