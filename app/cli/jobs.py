"""``flatlora jobs …``"""

import tarfile
import tempfile
import uuid
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.table import Table
from rich.text import Text

from app.cli.client import Client, Json
from app.cli.output import INTERRUPTED, USAGE, err, fail, out, print_json
from app.cli.profile import Profile
from app.cli.submit import (
    apply_settings,
    base_model,
    dataset_uri,
    parse_labels,
    read_body,
    set_path,
)
from app.cli.watch import describe_progress, describe_status, exit_code, print_outcome, watch
from app.settings import get_settings

jobs = typer.Typer(no_args_is_help=True, help="Submit jobs, follow them, fetch what they made.")

JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job, job_…")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]


def connect(*, as_json: bool = False) -> Client:
    return Client(Profile.load(get_settings()), as_json=as_json)


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
    label: Annotated[list[str] | None, typer.Option(help="KEY=VALUE; may be repeated.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any field, such as training.schedule=linear; may be repeated."),
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Body as a JSON file.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check the data.")] = False,
    follow: Annotated[bool, typer.Option("--watch", "-w", help="Follow it to its end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a job. What the options do not say comes from --file, then from the defaults."""
    client, body = connect(as_json=as_json), read_body(file)
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
    job = client.post("/jobs", body, **{"Idempotency-Key": uuid.uuid4().hex})
    if follow:
        if not as_json:
            out.print(f"submitted {job['id']}", highlight=False)
        follow_job(client, job["id"], as_json=as_json)
    show_job(job, as_json=as_json)


@jobs.command("list")
def list_jobs(
    status: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="KEY=VALUE; may be repeated.")] = None,
    model: Annotated[str | None, typer.Option("--base-model", "-m", help="As submitted.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    after: Annotated[str | None, typer.Option(help="Cursor of the next page.")] = None,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    labels = {f"label.{name}": value for name, value in parse_labels(label or []).items()}
    page = connect(as_json=as_json).get(
        "/jobs", status=status, base_model=model, limit=limit, after=after, **labels
    )
    if as_json:
        print_json(page)
        return
    if not page["items"]:
        out.print("no jobs here" if after or status or label or model else "no jobs yet")
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
    show_job(connect(as_json=as_json).get(f"/jobs/{job_id}"), as_json=as_json)


@jobs.command("watch")
def watch_job(job_id: JobId, as_json: AsJson = False) -> None:
    """Follow a job to its end: step, loss, σ and the time that is left."""
    follow_job(connect(as_json=as_json), job_id, as_json=as_json)


@jobs.command()
def cancel(job_id: JobId, as_json: AsJson = False) -> None:
    """Ask for a job to be stopped. Asking twice does no harm."""
    show_job(connect(as_json=as_json).post(f"/jobs/{job_id}/cancel"), as_json=as_json)


@jobs.command()
def download(
    job_id: JobId,
    target: Annotated[
        Path | None, typer.Option("--to", help="Folder for the adapter. Default: ./<job id>")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Download the adapter of a finished job into a folder that PEFT can load."""
    folder = target or Path(job_id)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        fail(
            f"{folder} exists already and is not an empty folder",
            "Name another with --to.",
            code=USAGE,
        )
    folder.mkdir(parents=True, exist_ok=True)  # before, not after, what may be a long download
    client = connect(as_json=as_json)
    with tempfile.TemporaryDirectory() as temporary:
        archive = Path(temporary) / "adapter.tar"
        client.download(f"/jobs/{job_id}/adapter", archive)
        unpack(archive, folder)
    if as_json:
        print_json({"job_id": job_id, "folder": str(folder.resolve())})
    else:
        out.print(f"adapter in {folder}", markup=False, highlight=False)


def unpack(archive: Path, folder: Path) -> None:
    """Write the archive's plain files into a folder, without the archive's own folder."""
    with tarfile.open(archive) as tar:
        for member in tar:
            source = tar.extractfile(member) if member.isfile() else None
            if source:
                (folder / Path(member.name).name).write_bytes(source.read())


def follow_job(client: Client, job_id: str, *, as_json: bool) -> NoReturn:
    """Follow a job, print how it ended, and end the command likewise."""
    try:
        job = watch(client, job_id)
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
