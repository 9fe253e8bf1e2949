"""``flatlora jobs …``"""

from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import typer
from rich.table import Table
from rich.text import Text

from app.cli.client import Json, connected
from app.cli.download import fetch_adapter
from app.cli.history import checkpoints, deliveries, events, logs, metrics
from app.cli.options import (
    After,
    AsJson,
    AsTar,
    IdempotencyKey,
    JobId,
    Labels,
    PageSize,
    Target,
)
from app.cli.output import INTERRUPTED, err, out, print_json
from app.cli.submit import (
    apply_settings,
    base_model,
    dataset_uri,
    parse_labels,
    read_body,
    set_path,
)
from app.cli.watch import describe_progress, describe_status, exit_code, print_outcome, watch
from flatlora_client import FlatLora, JobFields

jobs = typer.Typer(no_args_is_help=True, help="Submit jobs, follow them, fetch what they made.")

jobs.command()(events)
jobs.command()(metrics)
jobs.command()(logs)
jobs.command()(checkpoints)
jobs.command()(deliveries)


@jobs.command()
def submit(
    model: Annotated[
        str | None, typer.Option("--base-model", "-m", help="Hub id or folder.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="Dataset URI, or a file to upload.")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="LoRA rank.")] = None,
    sigma: Annotated[
        float | None, typer.Option("--sigma", "-s", help="Perturbation strength; 0 is plain LoRA.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the rows.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per optimizer step.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens per row.")] = None,
    validation: Annotated[str | None, typer.Option(help="Held-out rows: URI, or a file.")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    name: Annotated[str | None, typer.Option()] = None,
    label: Labels = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any field, such as training.schedule=linear; may be repeated."),
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Body as a JSON file.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check the data.")] = False,
    idempotency_key: IdempotencyKey = None,
    follow: Annotated[bool, typer.Option("--watch", "-w", help="Follow it to its end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a job. What the options do not say comes from --file, then from the defaults."""
    body = read_body(file)
    with connected(as_json=as_json) as client:
        given: dict[str, Any] = {
            "base_model": base_model(model) if model else None,
            "dataset_uri": dataset_uri(client, dataset) if dataset else None,
            "rank": rank,
            "sigma": sigma,
            "training.max_steps": max_steps,
            "training.epochs": epochs,
            "training.batch_size": batch_size,
            "training.learning_rate": learning_rate,
            "data.max_length": max_length,
            "evaluation.validation_uri": dataset_uri(client, validation) if validation else None,
            "seed": seed,
            "name": name,
            "labels": parse_labels(label) if label else None,
            "dry_run": dry_run or None,
        }
        for path, value in given.items():
            if value is not None:
                set_path(body, path, value)
        apply_settings(body, settings or [])
        # All of it is for the service to judge, also what is missing.
        fields: dict[str, Any] = {"extra_fields": body, "idempotency_key": idempotency_key}
        job = client.jobs.create(**cast("JobFields", fields))
        if follow:
            if not as_json:
                out.print(f"submitted {job.id}", highlight=False)
            follow_job(client, job.id, as_json=as_json, events_after=0)
    show_job(job.raw, as_json=as_json)


@jobs.command("list")
def list_jobs(
    status: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    label: Labels = None,
    model: Annotated[str | None, typer.Option("--base-model", "-m", help="As submitted.")] = None,
    created_after: Annotated[
        str | None, typer.Option(help="RFC 3339, with its zone: 2026-11-27T10:00:00Z")
    ] = None,
    limit: PageSize = 20,
    after: After = None,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    labels = parse_labels(label or [])
    with connected(as_json=as_json) as client:
        page = client.jobs.page(
            status=status,
            base_model=model,
            labels=labels,
            created_after=created_after,
            limit=limit,
            after=after,
        ).raw
    if as_json:
        print_json(page)
        return
    if not page["items"]:
        is_some = after or status or label or model or created_after
        out.print("no jobs here" if is_some else "no jobs yet")
        return
    table = Table(box=None)
    for title in ("job", "name", "base model", "σ", "rank", "status", "step", "progress"):
        table.add_column(title, no_wrap=title == "job", overflow="fold")
    for job in page["items"]:
        steps = f"{job['step']}/{job['total_steps']}" if job["total_steps"] else ""
        progress = describe_progress(job["progress"]) if job["status"] == "running" else ""
        spec = job["spec"]
        table.add_row(
            job["id"], Text(job["name"] or ""), Text(spec["base_model"]), str(spec["sigma"]),
            str(spec["rank"]), describe_status(job), steps, progress,
        )  # fmt: skip
    out.print(table)
    if page["next"]:
        out.print(f"more: flatlora jobs list --after {page['next']}", highlight=False)


@jobs.command()
def show(job_id: JobId, as_json: AsJson = False) -> None:
    """Show one job: its settings, its state, its results."""
    with connected(as_json=as_json) as client:
        job = client.jobs.get(job_id)
    show_job(job.raw, as_json=as_json)


@jobs.command("watch")
def watch_job(job_id: JobId, as_json: AsJson = False) -> None:
    """Follow a job to its end: step, loss, σ, the time that is left, and what happens."""
    with connected(as_json=as_json) as client:
        follow_job(client, job_id, as_json=as_json)


@jobs.command()
def cancel(job_id: JobId, as_json: AsJson = False) -> None:
    """Ask for a job to be stopped. Asking twice does no harm."""
    with connected(as_json=as_json) as client:
        job = client.jobs.cancel(job_id)
    show_job(job.raw, as_json=as_json)


@jobs.command()
def pause(job_id: JobId, as_json: AsJson = False) -> None:
    """Ask for a job to write a checkpoint and free its GPU, until it is resumed."""
    with connected(as_json=as_json) as client:
        job = client.jobs.pause(job_id)
    show_job(job.raw, as_json=as_json)


@jobs.command()
def resume(job_id: JobId, as_json: AsJson = False) -> None:
    """Let a paused job go on from its checkpoint."""
    with connected(as_json=as_json) as client:
        job = client.jobs.resume(job_id)
    show_job(job.raw, as_json=as_json)


@jobs.command()
def retry(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--watch", "-w", help="Follow it to its end.")] = False,
    idempotency_key: IdempotencyKey = None,
    as_json: AsJson = False,
) -> None:
    """Submit a job that is over once more, as a new job."""
    with connected(as_json=as_json) as client:
        job = client.jobs.retry(job_id, idempotency_key=idempotency_key)
        if follow:
            if not as_json:
                out.print(f"submitted {job.id}", highlight=False)
            follow_job(client, job.id, as_json=as_json, events_after=0)
    show_job(job.raw, as_json=as_json)


@jobs.command()
def delete(job_id: JobId, as_json: AsJson = False) -> None:
    """Remove a job that is over, with its adapter and all that it has written."""
    with connected(as_json=as_json) as client:
        client.jobs.delete(job_id)
    if as_json:
        print_json({"deleted": job_id})
    else:
        out.print(f"deleted {job_id}", markup=False, highlight=False)


@jobs.command()
def download(
    job_id: JobId, target: Target = None, tar: AsTar = False, as_json: AsJson = False
) -> None:
    """Download the adapter of a finished job into a folder that PEFT can load.

    One that was interrupted goes on where it was.
    """
    fetch_adapter(job_id, target, as_tar=tar, as_json=as_json)


def follow_job(
    client: FlatLora, job_id: str, *, as_json: bool, events_after: int | None = None
) -> NoReturn:
    """Follow a job, print how it ended, and end the command likewise."""
    try:
        job = watch(client, job_id, events_after=events_after)
    except KeyboardInterrupt:
        err.print(f"The job goes on. See it again with: flatlora jobs watch {job_id}")
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print_json(job)
    else:
        print_outcome(job)
    raise typer.Exit(exit_code(job))


def show_job(job: Json, *, as_json: bool) -> None:
    if as_json:
        print_json(job)
        return
    spec = job["spec"]
    table = Table.grid(padding=(0, 2))
    rows = [
        ("job", job["id"]),
        ("name", job["name"]),
        ("status", describe_status(job)),
        ("base model", spec["base_model"]),
        ("dataset", spec["dataset_uri"]),
        ("rank · σ", f"{spec['rank']} · {spec['sigma']}"),
        ("step", f"{job['step']}/{job['total_steps']}" if job["total_steps"] else None),
        ("progress", describe_progress(job["progress"]) if job["status"] == "running" else None),
        ("created", job["created_at"]),
        ("finished", job["finished_at"]),
    ]
    for name, value in rows:
        if value:
            table.add_row(f"[dim]{name}[/]", Text(str(value)))
    out.print(table)
    if job["status"] in {"succeeded", "failed"}:
        print_outcome(job)
