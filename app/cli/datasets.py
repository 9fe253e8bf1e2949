"""``flatlora datasets …``"""

import re
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
from flatlora_client.operations.fetching import sha256_of

datasets = typer.Typer(no_args_is_help=True, help="Files of rows that the service keeps.")

DatasetId = Annotated[str, typer.Argument(metavar="DATASET", help="Id of the dataset, ds_…")]
UploadId = Annotated[
    str, typer.Argument(metavar="UPLOAD", help="The file that is uploaded, or its sha256.")
]


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
def list_datasets(
    name: Annotated[str | None, typer.Option("--name", help="As uploaded.")] = None,
    sha256: Annotated[str | None, typer.Option("--sha256", help="Of its bytes.")] = None,
    limit: PageSize = 20,
    after: After = None,
    as_json: AsJson = False,
) -> None:
    """List datasets, newest first."""
    with connected(as_json=as_json) as client:
        page = client.datasets.page(filename=name, sha256=sha256, limit=limit, after=after)
    if as_json:
        print_json(page.raw)
        return
    if not page.items:
        out.print("no datasets here" if after or name or sha256 else "no datasets yet")
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


@datasets.command("upload-state")
def upload_state(upload: UploadId, as_json: AsJson = False) -> None:
    """Show how far an upload in parts has come."""
    with connected(as_json=as_json) as client:
        found = client.datasets.upload_state(hash_of(upload))
    if as_json:
        print_json(found.raw)
        return
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("sha256", found.sha256),
        ("file", found.filename),
        ("arrived", f"{decimal(found.offset)} of {decimal(found.size)}"),
        ("dataset", found.dataset.uri if found.dataset else None),
        ("forgotten", found.raw.get("expires_at")),
    ):
        if value:
            table.add_row(f"[dim]{name}[/]", Text(value))
    out.print(table)


@datasets.command("forget-upload")
def forget_upload(upload: UploadId, as_json: AsJson = False) -> None:
    """Give up an upload that is not complete: what has arrived of it is removed."""
    sha256 = hash_of(upload)
    with connected(as_json=as_json) as client:
        client.datasets.forget_upload(sha256)
    if as_json:
        print_json({"forgotten": sha256})
    else:
        out.print(f"forgot the upload of {sha256}", highlight=False)


def hash_of(upload: str) -> str:
    """An upload's name is the hash of the whole file."""
    path = Path(upload).expanduser()
    if path.is_file():
        return sha256_of(path)
    if not re.fullmatch(r"[0-9a-f]{64}", upload):
        fail(f"{upload} is neither a file nor a sha256", code=USAGE)
    return upload


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
