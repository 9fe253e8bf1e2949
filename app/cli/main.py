"""The ``flatlora`` command."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from app import __version__
from app.cli.account import audit, models, quota, service_version, webhooks
from app.cli.adapters import adapters
from app.cli.datasets import datasets
from app.cli.doctor import doctor
from app.cli.gc import gc
from app.cli.jobs import jobs
from app.cli.keys import keys
from app.cli.output import USAGE, fail, print_json
from app.cli.projects import projects
from app.cli.up import explained, run_api, run_up
from app.cli.workers import worker, workers
from app.jobs.schemas import RowFormat
from app.logs import blot
from app.migrate import head, upgrade
from app.settings import get_settings

cli = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune language models with Flat-LoRA, on your own machine.",
)
cli.add_typer(jobs, name="jobs")
cli.add_typer(datasets, name="datasets")
cli.add_typer(adapters, name="adapters")
cli.add_typer(models, name="models")
cli.add_typer(workers, name="workers")
cli.add_typer(keys, name="keys")
cli.add_typer(webhooks, name="webhooks")
cli.command()(quota)
cli.command()(audit)
cli.add_typer(projects, name="projects")
cli.command()(worker)
cli.command()(gc)
cli.command()(doctor)


@cli.command()
def up() -> None:
    """Start the whole service here: SQLite, local files, one worker. Ctrl-C stops it."""
    if find_spec("torch") is None:
        fail(
            "this environment has no torch, so no job could be trained here",
            "Install flatlora-service[worker], or start the API alone with `flatlora api`.",
            code=USAGE,
        )
    raise typer.Exit(run_up(get_settings()))


@cli.command()
def api() -> None:
    """Start the HTTP API alone; jobs wait for a worker on the same database."""
    raise typer.Exit(run_api(get_settings()))


@cli.command()
def migrate() -> None:
    """Bring the database to the schema of this version; in a cluster, once before an upgrade."""
    with explained("FLATLORA_DATABASE_URL"):
        upgrade(get_settings().database)
    typer.echo(f"the database is at migration {head()}")


@cli.command()
def validate(
    dataset: Annotated[Path, typer.Argument(help="A file of rows.")],
    model: Annotated[
        Path | None,
        typer.Option("--base-model", "-m", help="Folder of a base model: its tokenizer"),
    ] = None,
    format_: Annotated[RowFormat, typer.Option("--format", help="How rows are read.")] = "auto",
    max_length: Annotated[int, typer.Option(min=8, help="Tokens per row.")] = 1024,
    max_bad_rows: Annotated[int, typer.Option(min=0, help="Unreadable rows to allow.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a dataset here, without a service: every row, and how it renders for a model."""
    if find_spec("transformers") is None:
        fail(
            "this environment has no transformers, which reads rows and templates",
            "Install flatlora-service[worker], or submit the job with --dry-run.",
            code=USAGE,
        )
    options = {
        "dataset": str(dataset), "base_model": str(model) if model else None, "format": format_,
        "max_length": max_length, "max_bad_rows": max_bad_rows, "json": as_json,
    }  # fmt: skip
    # The API's package may not import the worker's; a process of its own may.
    done = subprocess.run(  # noqa: S603 - our own module
        [sys.executable, "-P", "-m", "worker.validate", json.dumps(options)], check=False
    )
    raise typer.Exit(done.returncode)


@cli.command()
def version(
    service: Annotated[
        bool, typer.Option("--service", help="Also the service's: is it ready, what can it do?")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the version."""
    if service:
        if not as_json:
            typer.echo(f"flatlora {__version__}")
        service_version(as_json=as_json)
    elif as_json:
        print_json({"version": __version__})
    else:
        typer.echo(f"flatlora {__version__}")


def main() -> None:
    try:
        cli()
    except ValidationError as error:
        faults = "; ".join(
            f"FLATLORA_{str(fault['loc'][0]).upper()}: {fault['msg']}; found {fault['input']!r}"
            for fault in error.errors()
        )
        sys.stderr.write(f"error: the settings are wrong: {blot(faults)}\n")
        sys.exit(USAGE)
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # odd names, odd numbers
        sys.stderr.write(f"error: {type(error).__name__}: {str(error)!a}\n")
        sys.exit(USAGE)


if __name__ == "__main__":
    main()
