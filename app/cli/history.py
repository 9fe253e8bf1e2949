"""``flatlora jobs events|metrics|logs|checkpoints|deliveries``: what a job has left behind it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import typer
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from app.cli.client import Json, connected
from app.cli.options import AsJson, JobId
from app.cli.output import INTERRUPTED, out, print_json, print_json_line
from flatlora_client import Attempt, Event, LogLine

Follow = Annotated[
    bool, typer.Option("--follow", "-f", help="Go on with what comes, until the job is over.")
]
AfterNumber = Annotated[int, typer.Option("--after", min=0, help="Number of the last one seen.")]

Entry = TypeVar("Entry", Event, LogLine)

CURVES = ("loss", "learning_rate", "sigma", "grad_norm", "tokens_per_second", "token_accuracy")
YES_OR_NO = {True: "yes", False: "no", None: ""}


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C is how one stops to follow."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def events(
    job_id: JobId, after: AfterNumber = 0, follow: Follow = False, as_json: AsJson = False
) -> None:
    """Show what happened to a job. With --follow, --json prints one event a line."""

    def line(event: Event) -> str:
        at = f"{event.at:%Y-%m-%d %H:%M:%S}" if event.at else ""
        return f"{event.seq:>4}  {at}  {event.type:<18} {event.message}"

    with connected(as_json=as_json) as client, interruptible():
        found = client.jobs.events(job_id, after=after, follow=follow)
        _show(found, line, follow=follow, as_json=as_json)


def logs(
    job_id: JobId, after: AfterNumber = 0, follow: Follow = False, as_json: AsJson = False
) -> None:
    """Show the trainer's log. With --follow, --json prints one entry a line."""
    with connected(as_json=as_json) as client, interruptible():
        found = client.jobs.logs(job_id, after=after, follow=follow)
        _show(found, lambda entry: entry.text, follow=follow, as_json=as_json)


def _show(
    found: Iterable[Entry], line: Callable[[Entry], str], *, follow: bool, as_json: bool
) -> None:
    """As they come, or as one JSON document of them all."""
    if as_json and not follow:
        print_json({"items": [entry.raw for entry in found]})
        return
    for entry in found:
        if as_json:
            print_json_line(entry.raw)
        else:
            out.print(line(entry), markup=False, highlight=False)


def metrics(
    job_id: JobId,
    series: Annotated[str | None, typer.Option(help="train, or held_out. Default: both.")] = None,
    since_step: Annotated[int, typer.Option(min=0, help="The first step to show.")] = 0,
    last: Annotated[
        int, typer.Option(min=0, help="Rows at most, the newest ones; 0: all. Not with --json.")
    ] = 20,
    as_json: AsJson = False,
) -> None:
    """Show a job's curves: loss, learning rate, σ and more, by step."""
    with connected(as_json=as_json) as client:
        points = client.jobs.metrics(job_id, since_step=since_step, series=series)
        found = deque((point.raw for point in points), maxlen=None if as_json else last or None)
    if as_json:
        print_json({"items": list(found)})
        return
    names = [name for name in CURVES if any(name in point["data"] for point in found)]
    table = Table("step", "series", *names, box=None)
    for point in found:
        values = [_number(point["data"].get(name)) for name in names]
        table.add_row(str(point["step"]), point["series"], *values)
    out.print(table if found else "no metrics yet")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value or "")


def checkpoints(job_id: JobId, as_json: AsJson = False) -> None:
    """Show the checkpoints from which a job can go on."""
    with connected(as_json=as_json) as client:
        found = client.jobs.checkpoints(job_id)
    if as_json:
        print_json({"items": [checkpoint.raw for checkpoint in found]})
        return
    table = Table("step", "loss", "held-out loss", "size", "verified", "kept", "created", box=None)
    for checkpoint in found:
        table.add_row(
            str(checkpoint.step),
            _number(checkpoint.loss),
            _number(checkpoint.held_out_loss),
            decimal(checkpoint.size) if checkpoint.size is not None else "",
            YES_OR_NO[checkpoint.verified],
            YES_OR_NO[checkpoint.kept],
            checkpoint.raw.get("created_at") or "",
        )
    out.print(table if found else "no checkpoints yet")


def deliveries(job_id: JobId, as_json: AsJson = False) -> None:
    """Show the webhook messages of a job, and how they fared."""
    with connected(as_json=as_json) as client:
        found = client.deliveries.list(job_id)
    if as_json:
        print_json({"items": [delivery.raw for delivery in found]})
        return
    table = Table("id", "event", "state", "attempts", "last answer", "next attempt", box=None)
    for delivery in found:
        table.add_row(
            delivery.id,
            str(delivery.event.get("type", "")),
            delivery.state,
            str(len(delivery.attempts)),
            Text(_answered(delivery.attempts[-1]) if delivery.attempts else ""),
            delivery.raw.get("next_attempt_at") or "",
        )
    out.print(table if found else "no messages were sent")


def _answered(attempt: Attempt) -> str:
    return attempt.error or str(attempt.status or "")


def show_table(rows: list[Json], nothing: str) -> None:
    """Each plain field that any of the rows has is a column."""
    if not rows:
        out.print(nothing)
        return
    names = [
        name
        for name in dict.fromkeys(name for row in rows for name in row)
        if not any(isinstance(row.get(name), dict | list) for row in rows)
    ]
    table = Table(*names, box=None)
    for row in rows:
        table.add_row(*(Text("" if row.get(name) is None else str(row[name])) for name in names))
    out.print(table)
