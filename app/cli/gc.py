"""``flatlora gc``"""

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table
from sqlalchemy import Engine, inspect, make_url, text
from sqlalchemy.exc import SQLAlchemyError

from app.cli.output import FAILED, fail, out, print_json
from app.cli.up import explained
from app.db import make_engine
from app.logs import configure_logs
from app.migrate import head
from app.retention import Cleaned, Retention
from app.settings import Settings, get_settings
from app.storage import Outage, open_store


def gc(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be removed.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")] = False,
) -> None:
    """Remove what is not kept: old jobs and keys, and stored files that nothing needs."""
    settings = get_settings()
    configure_logs(settings)  # not on standard output
    with explained("FLATLORA_STORE_URL and the variables of its provider"):
        store = open_store(settings)
    engine = _engine(settings)
    try:
        cleaned = Retention(engine, store, settings).clean(dry_run=dry_run)
    except Outage as error:
        fail(f"the store does not answer: {error}", "Check FLATLORA_STORE_URL.", code=FAILED)
    except SQLAlchemyError as error:
        fail(f"the database does not answer: {str(error).splitlines()[0]}", code=FAILED)
    finally:
        engine.dispose()
    if as_json:
        print_json(cleaned.as_dict())
    else:
        _show(cleaned)


def _engine(settings: Settings) -> Engine:
    """That of a database of ours: none is made here."""
    url = make_url(settings.database)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        fail(
            f"there is no database at {url.database}",
            "Set FLATLORA_DATA_DIR or FLATLORA_DATABASE_URL to those of the service.",
        )
    with explained("FLATLORA_DATABASE_URL"):
        engine = make_engine(settings.database)
        with engine.connect() as connection:
            is_ours = inspect(connection).has_table("alembic_version")
            query = text("SELECT version_num FROM alembic_version")
            found = connection.scalar(query) if is_ours else None
    if found != head():
        fail(
            f"the database is at migration {found or 'none'}, this program expects {head()}",
            "Run `flatlora migrate`.",
        )
    return engine


def _show(cleaned: Cleaned) -> None:
    if cleaned.busy:
        out.print("another process is cleaning; nothing was done here")
        return
    table = Table("would remove" if cleaned.dry_run else "removed", "", "", box=None)
    table.add_row("jobs", str(cleaned.jobs))
    table.add_row("idempotency keys", str(cleaned.idempotency_keys))
    table.add_row("uploads that did not end", str(cleaned.uploads))
    for name, found in (
        ("checkpoints and manifests", cleaned.job_files),
        ("unreferenced files", cleaned.blobs),
        ("parts of uploads", cleaned.parts),
        ("unfinished writes", cleaned.unfinished),
    ):
        table.add_row(name, str(found.files), decimal(found.bytes))
    out.print(table)
