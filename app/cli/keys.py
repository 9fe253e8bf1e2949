"""``flatlora keys …``: on the database itself, for whoever runs the service.

With ``--remote`` through the service, for the admins of a project, who may be anywhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.table import Table
from sqlalchemy.orm import Session

from app.access.keys import make_key
from app.access.principal import Role
from app.access.repository import add_key, all_keys, audit_by_operator, revoking
from app.access.schemas import Key, KeyCreate
from app.cli.client import Json, connected
from app.cli.database import our_database
from app.cli.output import USAGE, err, fail, out, print_json
from app.settings import get_settings
from app.tables import DEFAULT_PROJECT, ApiKeyRow

keys = typer.Typer(
    no_args_is_help=True,
    help="API keys, on the database itself: run it where the service's settings are. "
    "With --remote through the service, with FLATLORA_URL and an admin's FLATLORA_API_KEY.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]
Remote = Annotated[
    bool,
    typer.Option("--remote", help="Through the service, as an admin, for the project of that key."),
]


@keys.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose it is, or what for.")],
    project: Annotated[
        str | None,
        typer.Option(
            help=f"The only one that it opens. Default: {DEFAULT_PROJECT}; with --remote your own."
        ),
    ] = None,
    role: Annotated[Role, typer.Option(help="viewer reads, submitter writes.")] = Role.SUBMITTER,
    expires_days: Annotated[
        float | None, typer.Option("--expires-days", help="Default: it does not expire.")
    ] = None,
    remote: Remote = False,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, this once."""
    if remote:
        with connected(as_json=as_json) as client:
            made = client.keys.create(
                name=name, role=role.value, expires_in_days=expires_days, project=project
            ).raw
    else:
        made = _make_here(name, project or DEFAULT_PROJECT, role, expires_days)
    if as_json:
        print_json(made)
        return
    out.print(made["key"], markup=False, highlight=False)
    place = f"a {made['role']} of the project {made['project']}"
    err.print(f"key {made['id']}: {place}. It is not shown again.")


def _make_here(name: str, project: str, role: Role, expires_days: float | None) -> Json:
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
    return made | {"key": new.key}


@keys.command("list")
def list_(remote: Remote = False, as_json: AsJson = False) -> None:
    """Show the keys of all projects; not the keys themselves, which nobody keeps.

    With --remote those of your own project.
    """
    if remote:
        with connected(as_json=as_json) as client:
            found = [key.raw for key in client.keys.list()]
    else:
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
    remote: Remote = False,
    as_json: AsJson = False,
) -> None:
    """Take a key back; it opens nothing more within five seconds."""
    if remote:
        with connected(as_json=as_json) as client:
            revoked = client.keys.revoke(key_id).raw
    else:
        revoked = _revoke_here(key_id)
    if as_json:
        print_json(revoked)
    else:
        out.print(f"revoked {key_id} ({revoked['name']})", markup=False, highlight=False)


def _revoke_here(key_id: str) -> Json:
    with writing() as session:
        row: ApiKeyRow | None = session.execute(revoking(key_id)).scalar_one_or_none()
        if row is None:
            fail(f"there is no key {key_id!r}", "`flatlora keys list` shows them.")
        session.execute(audit_by_operator("revoke_key", key_id, row.project))
        return _shown(row)


@contextmanager
def writing() -> Iterator[Session]:
    with our_database(get_settings()) as engine:
        writes = engine.execution_options(writes=True)
        with Session(writes) as session, session.begin():
            yield session


def _shown(row: ApiKeyRow) -> Json:
    return Key.model_validate(row, from_attributes=True).model_dump(mode="json")


def _day(moment: str | None) -> str:
    return moment[:16].replace("T", " ") if moment else "never"


def _state(key: Json) -> str:
    if key["revoked_at"]:
        return f"revoked {_day(key['revoked_at'])}"
    return f"until {_day(key['expires_at'])}" if key["expires_at"] else "valid"
