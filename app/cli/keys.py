"""``flatlora keys …``: on the database itself, for whoever runs the service."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.table import Table
from sqlalchemy.orm import Session

from app.access.keys import make_key
from app.access.principal import Role
from app.access.repository import add_key, all_keys, audit_by_operator, revoking
from app.access.schemas import Key, KeyCreate
from app.cli.database import our_database
from app.cli.output import USAGE, err, fail, out, print_json
from app.settings import get_settings
from app.tables import DEFAULT_PROJECT, ApiKeyRow

keys = typer.Typer(
    no_args_is_help=True,
    help="API keys, on the database itself: run it where the service's settings are.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]


@keys.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose it is, or what for.")],
    project: Annotated[str, typer.Option(help="The only one that it opens.")] = DEFAULT_PROJECT,
    role: Annotated[Role, typer.Option(help="viewer reads, submitter writes.")] = Role.SUBMITTER,
    expires_days: Annotated[
        float | None, typer.Option("--expires-days", help="Default: it does not expire.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, this once."""
    try:
        wanted = KeyCreate(name=name, project=project, role=role, expires_in_days=expires_days)
    except ValidationError as error:
        fault = error.errors()[0]
        fail(f"{fault['loc'][0]}: {fault['msg']}; found {fault['input']!r}", code=USAGE)
    new = make_key()
    with writing() as session:
        statement = add_key(
            new, name=name, role=role, lifetime=wanted.lifetime, by="operator", project=project
        )
        made = _shown(session.execute(statement).scalar_one())
        session.execute(audit_by_operator("create_key", new.id, project))
    if as_json:
        print_json(made | {"key": new.key})
        return
    out.print(new.key, markup=False, highlight=False)
    err.print(f"key {new.id}: a {role} of the project {project}. It is not shown again.")


@keys.command("list")
def list_(as_json: AsJson = False) -> None:
    """Show the keys of all projects; not the keys themselves, which nobody keeps."""
    with writing() as session:
        found = [_shown(row) for row in session.scalars(all_keys())]
    if as_json:
        print_json({"items": found})
        return
    table = Table("id", "name", "project", "role", "created", "last used", "state", box=None)
    for key in found:
        cells = (key["id"], key["name"], key["project"], key["role"], _day(key["created_at"]))
        table.add_row(*cells, _day(key["last_used_at"]), _state(key))
    out.print(table if found else "there are no keys beside the operator's")


@keys.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="Its id, as `flatlora keys list` shows it.")],
    as_json: AsJson = False,
) -> None:
    """Take a key back; it opens nothing more within five seconds."""
    with writing() as session:
        row: ApiKeyRow | None = session.execute(revoking(key_id)).scalar_one_or_none()
        if row is None:
            fail(f"there is no key {key_id!r}", "`flatlora keys list` shows them.")
        session.execute(audit_by_operator("revoke_key", key_id, row.project))
        revoked = _shown(row)
    if as_json:
        print_json(revoked)
    else:
        out.print(f"revoked {key_id} ({revoked['name']})", markup=False, highlight=False)


@contextmanager
def writing() -> Iterator[Session]:
    with our_database(get_settings()) as engine:
        writes = engine.execution_options(writes=True)
        with Session(writes) as session, session.begin():
            yield session


def _shown(row: ApiKeyRow) -> dict[str, Any]:
    return Key.model_validate(row, from_attributes=True).model_dump(mode="json")


def _day(moment: str | None) -> str:
    return moment[:16].replace("T", " ") if moment else "never"


def _state(key: dict[str, Any]) -> str:
    if key["revoked_at"]:
        return f"revoked {_day(key['revoked_at'])}"
    return f"until {_day(key['expires_at'])}" if key["expires_at"] else "valid"
