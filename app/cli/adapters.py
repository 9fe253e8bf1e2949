"""``flatlora adapters …``"""

from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from app.cli.client import connected
from app.cli.download import fetch_adapter
from app.cli.options import After, AsJson, AsTar, JobId, Labels, PageSize, Target
from app.cli.output import out, print_json
from app.cli.submit import parse_labels

adapters = typer.Typer(no_args_is_help=True, help="What finished jobs have made.")


@adapters.command("list")
def list_adapters(
    model: Annotated[str | None, typer.Option("--base-model", "-m", help="As submitted.")] = None,
    label: Labels = None,
    limit: PageSize = 20,
    after: After = None,
    as_json: AsJson = False,
) -> None:
    """List finished adapters, newest first."""
    labels = parse_labels(label or [])
    with connected(as_json=as_json) as client:
        page = client.adapters.page(base_model=model, labels=labels, limit=limit, after=after)
    if as_json:
        print_json(page.raw)
        return
    if not page.items:
        out.print("no adapters here" if after or label or model else "no adapters yet")
        return
    table = Table(box=None)
    for title in ("job", "name", "base model", "σ", "rank", "size"):
        table.add_column(title, no_wrap=title == "job", overflow="fold")
    for found in page.items:
        size = "" if found.size is None else decimal(found.size)
        sigma, rank = _shown(found.sigma), _shown(found.rank)
        name, base = Text(found.name or ""), Text(found.base_model)
        table.add_row(found.job_id, name, base, sigma, rank, size)
    out.print(table)
    if page.next:
        out.print(f"more: flatlora adapters list --after {page.next}", highlight=False)


def _shown(value: float | None) -> str:
    return "" if value is None else str(value)


@adapters.command()
def show(job_id: JobId, as_json: AsJson = False) -> None:
    """Show the adapter of a job: its base model, its settings and its files."""
    with connected(as_json=as_json) as client:
        found = client.adapters.get(job_id)
    if as_json:
        print_json(found.raw)
        return
    table = Table.grid(padding=(0, 2))
    revision = f" @ {found.base_model_revision}" if found.base_model_revision else ""
    for name, value in (
        ("job", found.job_id),
        ("name", found.name),
        ("base model", found.base_model + revision),
        ("rank · σ", f"{_shown(found.rank)} · {_shown(found.sigma)}"),
        ("created", found.raw.get("created_at")),
        ("tar", found.url),
    ):
        if value:
            table.add_row(f"[dim]{name}[/]", Text(value))
    for file in found.files:
        table.add_row(Text(file.name), Text(f"{decimal(file.size):>10}  sha256 {file.sha256}"))
    out.print(table)


@adapters.command()
def download(
    job_id: JobId, target: Target = None, tar: AsTar = False, as_json: AsJson = False
) -> None:
    """Download an adapter into a folder that PEFT can load: as `flatlora jobs download`."""
    fetch_adapter(job_id, target, as_tar=tar, as_json=as_json)
