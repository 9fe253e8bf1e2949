"""``flatlora models|quota|audit|webhooks|version``: what the service allows, and tells."""

from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from app import __version__
from app.cli.client import Json, connected
from app.cli.history import show_table
from app.cli.options import AsJson
from app.cli.output import out, print_json

models = typer.Typer(no_args_is_help=True, help="Base models that jobs may name.")
webhooks = typer.Typer(no_args_is_help=True, help="Messages to your own service.")


@models.command("list")
def list_models(as_json: AsJson = False) -> None:
    """Show which base models jobs may name, and the limits."""
    with connected(as_json=as_json) as client:
        found = client.models.list()
    if as_json:
        print_json(found.raw)
        return
    titles = ("base model", "architecture", "parameters", "size", "tokens", "chat template")
    table = Table(*titles, box=None)
    for model in found.items:
        table.add_row(
            Text(model.id),
            Text(model.architecture or ""),
            f"{model.parameters:,}" if model.parameters else "",
            decimal(model.size_bytes) if model.size_bytes else "",
            str((model.limits and model.limits.max_length) or ""),
            "yes" if model.has_chat_template else "no",
        )
    out.print(table if found.items else "no folders of base models")
    out.print(f"of the hub: {', '.join(found.hub) or 'none'}", markup=False, highlight=False)
    show_fields(found.limits)


def service_version(*, as_json: bool) -> None:
    """Which service answers, whether it is ready, and what it can do."""
    with connected(as_json=as_json) as client:
        found = {"url": client.url, **client.version().raw}
        if not as_json:
            show_fields({"service": found})
        ready = client.ready().raw
    if as_json:
        print_json({"version": __version__, "service": found | {"ready": ready}})
    else:
        show_fields({"ready": ready})


def quota(as_json: AsJson = False) -> None:
    """Show what this project may use, and what it has used."""
    with connected(as_json=as_json) as client:
        found = client.quota().raw
    show_answer(found, as_json=as_json)


def audit(
    action: Annotated[str | None, typer.Option(help="Such as create_job.")] = None,
    changed: Annotated[str | None, typer.Option("--object", help="Id of what was changed.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    before: Annotated[str | None, typer.Option(help="Cursor of the next page.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show who changed what, newest first. For admins."""
    with connected(as_json=as_json) as client:
        page = client.audit.page(action=action, object=changed, limit=limit, before=before)
    if as_json:
        print_json(page.raw)
        return
    show_table([event.raw for event in page.items], "nothing was changed yet")
    if page.next:
        out.print(f"more: flatlora audit --before {page.next}", highlight=False)


@webhooks.command("test")
def send_test(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where the message is sent.")],
    as_json: AsJson = False,
) -> None:
    """Have a test message sent, and show how it fared."""
    with connected(as_json=as_json) as client:
        found = client.webhooks.test(url).raw
    show_answer(found, as_json=as_json)


@webhooks.command()
def secret(
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Make another, and sign with it from now on.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the secret that messages are signed with. For admins."""
    with connected(as_json=as_json) as client:
        found = client.webhooks.rotate_secret() if rotate else client.webhooks.secret()
    show_answer(found.raw, as_json=as_json)


@webhooks.command()
def retry(
    delivery_id: Annotated[str, typer.Argument(metavar="DELIVERY", help="Id of the message.")],
    as_json: AsJson = False,
) -> None:
    """Send a message once more; `flatlora jobs deliveries` lists them."""
    with connected(as_json=as_json) as client:
        found = client.deliveries.retry(delivery_id).raw
    show_answer(found, as_json=as_json)


def show_answer(found: Json, *, as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        show_fields(found)


def show_fields(found: Json) -> None:
    """Every field, a line each; one of a group has the group's name before its own."""
    table = Table.grid(padding=(0, 2))
    for name, value in _flat(found):
        table.add_row(f"[dim]{name}[/]", Text("" if value is None else str(value)))
    out.print(table)


def _flat(found: Json, above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in found.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        elif isinstance(value, list):
            yield above + name, ", ".join(str(item) for item in value)
        else:
            yield above + name, value
