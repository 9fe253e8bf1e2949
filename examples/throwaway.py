"""A service for one run: ``flatlora up`` in a folder of its own, stopped at the end."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from app.cli.client import connect, explained
from app.cli.output import INTERRUPTED
from app.cli.profile import Profile
from app.cli.watch import watch
from app.settings import Settings
from flatlora_client import FlatLora

Json = dict[str, Any]

STOP_SECONDS = 150  # a running job may take two minutes for its last checkpoint


@contextmanager
def throwaway_service(folder: Path, roots: Sequence[Path]) -> Iterator[FlatLora]:
    """A client of a service that may read what lies below ``roots``; ``folder`` is made anew.

    What the environment says of another service is forgotten, here and in the service.
    """
    for name in [name for name in os.environ if name.upper().startswith("FLATLORA_")]:
        del os.environ[name]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    port, readable = _free_port(), ",".join(map(str, roots))
    os.environ.update(
        FLATLORA_DATA_DIR=str(folder / "service"),
        FLATLORA_PORT=str(port),
        FLATLORA_DATASET_ROOTS=readable,
        FLATLORA_MODEL_ROOTS=readable,
    )
    log = folder / "service.log"
    with log.open("w") as output:
        up = subprocess.Popen(
            [sys.executable, "-m", "app.cli.main", "up"], stdout=output, stderr=output
        )
    try:
        _wait_until_ready(up, port, log)
        with explained(as_json=False), connect(Profile.load(Settings())) as client:
            yield client
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        up.send_signal(signal.SIGTERM)
        try:
            up.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            up.kill()


def run_job(client: FlatLora, job_id: str, adapter: Path) -> Json:
    """Follow a job to its end, and download its adapter into a folder."""
    job = watch(client, job_id)
    if job["status"] != "succeeded":
        sys.exit(f"The job is {job['status']}: {job['failure']}")
    client.jobs.download(job_id, adapter)
    return job


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(up: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and up.poll() is None:
        try:
            if httpx2.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).is_success:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.1)
    sys.exit(f"The service did not start. Its log: {log}")
