"""``flatlora projects …``: on the database itself, for whoever runs the service."""

import re
from contextlib import suppress
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from app.access.repository import audit_by_operator
from app.cli.keys import AsJson, writing
from app.cli.output import USAGE, fail, out, print_json
from app.quotas.limits import limits_of
from app.quotas.repository import add_project, all_projects, limiting
from app.settings import PROJECT_NAME, get_settings
from app.tables import NO_LIMIT, ProjectRow

KEEP = object()
WORDS = {"default": None, "none": NO_LIMIT}
LATER = ("gpu_minutes", "max_stored_bytes", "requests_per_minute")  # of the columns of the list
MOST = 2**31 - 1
MOST_BYTES = 2**63 - 1

projects = typer.Typer(
    no_args_is_help=True,
    help="What projects may use, on the database itself: run it where the service's settings are.",
)


Number = Annotated[str | None, typer.Option(help="A number, none, or default: the settings'.")]


@projects.command("list")
def list_(as_json: AsJson = False) -> None:
    """Show every project with what it may use, and its jobs that wait and run."""
    settings = get_settings()
    with writing() as session:
        found = [
            {"project": name, "queued": queued, "running": running}
            | {"limits": asdict(limits_of(row, settings))}
            for name, row, queued, running in session.execute(all_projects())
        ]
    if as_json:
        print_json({"items": found})
        return
    columns = ("project", "queued", "running", "GPU-minutes", "bytes stored", "requests a minute")
    table = Table(*columns, box=None)
    for project in found:
        most = project["limits"]
        table.add_row(
            project["project"],
            f"{project['queued']} of {_told(most['max_queued'])}",
            f"{project['running']} of {_told(most['max_running'])}",
            *(_told(most[name]) for name in LATER),
        )
    out.print(table if found else "there are no projects yet")


@projects.command("set")
def set_(
    name: Annotated[str, typer.Argument(help="Of the project; it need not have a key yet.")],
    max_queued: Number = None,
    max_running: Number = None,
    gpu_minutes: Number = None,
    max_stored_bytes: Number = None,
    requests_per_minute: Number = None,
    as_json: AsJson = False,
) -> None:
    """Say what a project may use; the service goes by it within five seconds."""
    if not re.fullmatch(PROJECT_NAME, name):
        fail(f"{name!r} is no name of a project", "Lower-case letters, digits, _ . -", code=USAGE)
    given = {
        "max_queued": _limit(max_queued, int, MOST),
        "max_running": _limit(max_running, int, MOST),
        "gpu_minutes": _limit(gpu_minutes, float, MOST),
        "max_stored_bytes": _limit(max_stored_bytes, int, MOST_BYTES),
        "requests_per_minute": _limit(requests_per_minute, int, MOST),
    }
    changed = {limit: value for limit, value in given.items() if value is not KEEP}
    if not changed:
        fail("nothing to set", "Such as --max-queued 100; --help lists all.", code=USAGE)
    with writing() as session:
        session.execute(add_project(session.get_bind().dialect.name, project=name))
        row: ProjectRow = session.execute(limiting(name, changed)).scalar_one()
        session.execute(audit_by_operator("set_project", name, name))
        limits = asdict(limits_of(row, get_settings()))
    if as_json:
        print_json({"project": name, "limits": limits})
        return
    out.print(f"{name}:", ", ".join(f"{k} {_told(v)}" for k, v in limits.items()), markup=False)


def _limit(given: str | None, kind: type[int] | type[float], most: int) -> Any:
    """What to write: a number, ``NO_LIMIT``, None for the default, or to keep what is there."""
    if given is None:
        return KEEP
    if given in WORDS:
        return WORDS[given]
    with suppress(ValueError):
        value = kind(given)
        if 0 <= value <= most:
            return value
    return fail(f"expected a number from 0, none, or default; found {given!r}", code=USAGE)


def _told(limit: Any) -> str:
    return "any" if limit is None else f"{limit:g}" if isinstance(limit, float) else str(limit)
