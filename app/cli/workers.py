"""``flatlora worker`` and ``flatlora workers …``"""

import os
import sys
import time
from datetime import UTC, datetime
from importlib.util import find_spec
from typing import Annotated

import typer
from rich.table import Table

from app.cli.client import connected
from app.cli.options import AsJson
from app.cli.output import FAILED, USAGE, fail, out, print_json
from app.cli.up import check_cluster
from app.settings import Settings, get_settings

workers = typer.Typer(no_args_is_help=True, help="The workers of a cluster.")

ALIVE_SECONDS = 30


def worker(
    check: Annotated[
        bool, typer.Option("--check", help="Only say by the exit code whether one works here.")
    ] = False,
) -> None:
    """Start the worker of this machine: one slot for each GPU. SIGTERM drains it."""
    settings = get_settings()
    if check:
        _check(settings)
        return
    if not settings.is_cluster:
        fail(
            "a worker needs a broker, and FLATLORA_BROKER_URL is not set",
            "Set FLATLORA_BROKER_URL=redis://… and FLATLORA_DATABASE_URL=postgresql://…, or run "
            "the whole service on this machine with `flatlora up`.",
            code=USAGE,
        )
    check_cluster(settings)
    missing = [name for name in ("torch", "celery", "psycopg") if find_spec(name) is None]
    if missing:
        fail(
            f"this environment has no {', '.join(missing)}",
            "Install flatlora-service[worker,cluster].",
            code=USAGE,
        )
    # In place of this process: a service manager's signals reach the worker itself.
    # -P: a folder called `worker` where it is started must not shadow ours.
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-m", "worker.main"])  # noqa: S606


def _check(settings: Settings) -> None:
    try:
        age = time.time() - settings.alive_file.stat().st_mtime
    except FileNotFoundError:
        fail(f"no worker works in {settings.data_dir}")
    if age > ALIVE_SECONDS:
        fail(f"the worker in {settings.data_dir} was last seen {age:.0f} s ago", code=FAILED)


@workers.command("list")
def list_(as_json: AsJson = False) -> None:
    """Show who trains, on what, and which job."""
    with connected(as_json=as_json) as client:
        found = {"items": [worker.raw for worker in client.workers.list()]}
    if as_json:
        print_json(found)
        return
    table = Table("worker", "state", "slot", "device", "job", "heartbeat", "version", box=None)
    for row in found["items"]:
        heard = datetime.now(UTC) - datetime.fromisoformat(row["heartbeat_at"])
        for slot in row["slots"]:
            table.add_row(
                row["host"],
                row["state"],
                slot["name"],
                slot["device"] or "",
                slot["job_id"] or "idle",
                f"{heard.total_seconds():.0f} s ago",
                row["version"],
            )
    out.print(table if found["items"] else "no worker is registered")
