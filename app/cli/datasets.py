"""``flatlora datasets …``"""

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from app.cli.client import connected
from app.cli.options import After, AsJson, PageSize
from app.cli.output import USAGE, fail, out, print_json
from app.cli.transfer import transfer
from flatlora_client import Dataset

datasets = typer.Typer(no_args_is_help=True, help="Files of rows that the service keeps.")

DatasetId = Annotated[str, typer.Argument(metavar="DATASET", help="Id of the dataset, ds_…")]


@datasets.command()
def upload(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A file of rows.")],
    filename: Annotated[
        str | None, typer.Option("--name", help="Its suffix tells the format. Default: the file's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Upload a file. One that was interrupted goes on where it was."""
    path = path.expanduser()
    if not path.is_file():
        fail(f"{path} is no file", code=USAGE)
    with connected(as_json=as_json) as client, transfer(path.name) as progress:
        found = client.datasets.upload(path, filename=filename, progress=progress)
    show_dataset(found, as_json=as_json)


@datasets.command("list")
def list_datasets(limit: PageSize = 20, after: After = None, as_json: AsJson = False) -> None:
    """List datasets, newest first."""
    with connected(as_json=as_json) as client:
        page = client.datasets.page(limit=limit, after=after)
    if as_json:
        print_json(page.raw)
        return
    if not page.items:
        out.print("no datasets here" if after else "no datasets yet")
        return
    table = Table("dataset", "file", "size", "created", box=None)
    for found in page.items:
        created = found.raw.get("created_at") or ""
        table.add_row(found.uri, Text(found.filename), decimal(found.size), created)
    out.print(table)
    if page.next:
        out.print(f"more: flatlora datasets list --after {page.next}", highlight=False)


@datasets.command()
def show(dataset_id: DatasetId, as_json: AsJson = False) -> None:
    """Show one dataset."""
    with connected(as_json=as_json) as client:
        found = client.datasets.get(dataset_id.removeprefix("dataset:"))
    show_dataset(found, as_json=as_json)


@datasets.command()
def delete(dataset_id: DatasetId, as_json: AsJson = False) -> None:
    """Remove a dataset that no job is going to read."""
    with connected(as_json=as_json) as client:
        client.datasets.delete(dataset_id.removeprefix("dataset:"))
    if as_json:
        print_json({"deleted": dataset_id})
    else:
        out.print(f"deleted {dataset_id}", markup=False, highlight=False)


def show_dataset(found: Dataset, *, as_json: bool) -> None:
    if as_json:
        print_json(found.raw)
        return
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("dataset", found.uri),
        ("file", found.filename),
        ("size", decimal(found.size)),
        ("sha256", found.sha256),
        ("created", found.raw.get("created_at")),
    ):
        if value:
            table.add_row(f"[dim]{name}[/]", Text(value))
    out.print(table)
