"""``flatlora gc``"""

from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from app.cli.database import our_database
from app.cli.output import FAILED, fail, out, print_json
from app.cli.up import explained
from app.logs import configure_logs
from app.retention import Cleaned, Retention
from app.settings import get_settings
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
    with our_database(settings) as engine:
        try:
            cleaned = Retention(engine, store, settings).clean(dry_run=dry_run)
        except Outage as error:
            fail(f"the store does not answer: {error}", "Check FLATLORA_STORE_URL.", code=FAILED)
    if as_json:
        print_json(cleaned.as_dict())
    else:
        _show(cleaned)


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
