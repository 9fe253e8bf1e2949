"""Following a job: a progress bar on a terminal, a line per change elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from threading import Thread
from types import TracebackType
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

from app.cli.client import Json, status_line
from app.cli.output import CANCELLED, FAILED, OK, err, out
from flatlora_client import (
    APIError,
    ConnectionFailed,
    Event,
    FlatLora,
    FlatLoraError,
    RateLimited,
    ServerError,
)

Show = Callable[[Json], None]

PATIENCE_SECONDS = 60
POLL_SECONDS = 0.5
LAST_EVENTS_SECONDS = 1.5
BAR_WIDTH = 20
TOLD_BY_STATUS = {
    "job.queued", "job.running", "job.cancelling", "job.succeeded", "job.failed", "job.cancelled",
}  # fmt: skip


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


def watch(client: FlatLora, job_id: str, *, events_after: int | None = None) -> Json:
    """Follow a job to its end and return it.

    What happens to it is shown from the event after that number on, else from now on.
    """
    job = client.jobs.get(job_id)
    if job.is_over:
        return job.raw
    with progress_of(job.raw) as show, Happenings(client, job_id, events_after):
        return until_over(client, job_id, show)


def until_over(
    client: FlatLora, job_id: str, show: Show, *, patience: float = PATIENCE_SECONDS
) -> Json:
    def note(failure: FlatLoraError) -> None:
        err.print(
            f"no answer from {client.url}: {trouble_of(failure)}; trying again for {patience:g} s",
            markup=False,
            highlight=False,
        )

    try:
        return client.jobs.wait(
            job_id,
            progress=lambda job: show(job.raw),
            raise_on_failure=False,
            poll_seconds=POLL_SECONDS,
            patience=patience,
            on_outage=note,
        ).raw
    except (ServerError, RateLimited) as error:
        raise ConnectionFailed(client.url, status_line(error)) from None


def trouble_of(failure: FlatLoraError) -> str:
    match failure:
        case ConnectionFailed():
            return failure.trouble
        case APIError():
            return status_line(failure)
        case _:
            return str(failure)


class Happenings:
    """What happens to a job, printed by a thread as it is streamed: a line per event."""

    def __init__(self, client: FlatLora, job_id: str, after: int | None) -> None:
        self._client = client
        self._job_id = job_id
        self._after = after
        # It may wait in a read when the command has come to its end.
        self._thread = Thread(target=self._print, daemon=True)
        self._is_wanted = True

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if kind is None:  # those that came with the end are still shown
            self._thread.join(LAST_EVENTS_SECONDS)
        self._is_wanted = False

    def _print(self) -> None:
        # Outages are told by whoever asks for the job: two would say the same.
        with suppress(FlatLoraError, OSError, RuntimeError):
            after = self._newest() if self._after is None else self._after
            for event in self._client.jobs.events(
                self._job_id, after=after, follow=True, poll_seconds=POLL_SECONDS
            ):
                if not self._is_wanted:
                    return
                if event.type not in TOLD_BY_STATUS:
                    err.print(describe_event(event), markup=False, highlight=False)

    def _newest(self) -> int:
        return max((event.seq for event in self._client.jobs.events(self._job_id)), default=0)


def describe_event(event: Event) -> str:
    return f"{event.type.removeprefix('job.'):<10} {event.message}"


def progress_of(job: Json) -> AbstractContextManager[Show]:
    return _drawn(job) if err.is_terminal else nullcontext(Lines().show)


@contextmanager
def _drawn(job: Json) -> Iterator[Show]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=BAR_WIDTH),
        MofNCompleteColumn(),
        MetricsColumn(),
    )
    with Progress(*columns, console=err) as bar:
        task = bar.add_task(describe_status(job), total=None, progress=None)

        def show(job: Json) -> None:
            bar.update(
                task,
                description=describe_status(job),
                completed=job["step"],
                total=job["total_steps"],
                progress=job["progress"],
            )

        yield show


class Lines:
    """For logs and pipes: a line per phase and per tenth of the run."""

    def __init__(self) -> None:
        self._last: tuple[Any, ...] = ()

    def show(self, job: Json) -> None:
        total = job["total_steps"]
        tenth = job["step"] * 10 // total if total else 0
        if (job["status"], job["phase"], tenth) == self._last:
            return
        self._last = (job["status"], job["phase"], tenth)
        steps = f"{bar(job['step'], total)} {job['step']}/{total} " if total else ""
        line = f"{describe_status(job):<10} {steps}{describe_progress(job['progress'])}"
        err.print(line.rstrip(), highlight=False)


def bar(step: int, total: int) -> str:
    """``━━━━━━━━━━──────────``"""
    filled = BAR_WIDTH * step // total
    return "━" * filled + "─" * (BAR_WIDTH - filled)


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
