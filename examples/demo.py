"""The first run: fine-tune the tiny base model through a real service, and look at the difference.

Starts ``flatlora up`` on a free port, sends one job to ``POST /jobs``, follows it, downloads the
adapter, loads it with PEFT, and lets the base model and the adapter answer questions that
neither has seen. Needs no network and no GPU.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
FOLDER = ROOT / ".demo"
ADAPTER = FOLDER / "adapter"
SHOWN = 3

JOB = {
    "base_model": f"file:{EXAMPLES / 'tiny-base'}",
    "dataset_uri": f"file:{EXAMPLES / 'data' / 'train.jsonl'}",
    "rank": 16,
    "sigma": 0.05,
    "name": "first-run",
    "data": {"max_length": 256},
    "training": {"max_steps": 150, "batch_size": 16, "learning_rate": 3e-3},
    "evaluation": {"validation_uri": f"file:{EXAMPLES / 'data' / 'test.jsonl'}"},
}

console = Console(soft_wrap=True, highlight=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def service(port: int) -> Iterator[None]:
    """``flatlora up`` in a folder of its own, stopped at the end."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    os.environ.update(
        FLATLORA_DATA_DIR=str(FOLDER / "service"),
        FLATLORA_PORT=str(port),
        FLATLORA_DATASET_ROOTS=str(EXAMPLES),
        FLATLORA_MODEL_ROOTS=str(EXAMPLES),
    )
    with (FOLDER / "service.log").open("w") as log:
        up = subprocess.Popen([sys.executable, "-m", "app.cli.main", "up"], stdout=log, stderr=log)
    try:
        wait_until_ready(up, port)
        yield
    finally:
        up.send_signal(signal.SIGTERM)
        up.wait(60)


def wait_until_ready(up: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and up.poll() is None:
        try:
            if httpx2.get(f"http://127.0.0.1:{port}/readyz").is_success:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.1)
    sys.exit(f"The service did not start. Its log: {FOLDER / 'service.log'}")


def train() -> dict[str, Any]:
    """Send the job, follow it, fetch its adapter."""
    from app.cli.jobs import connect, unpack
    from app.cli.watch import watch

    client = connect()
    job = client.post("/jobs", JOB)
    console.print(f"POST /jobs → [bold]{job['id']}[/]")
    job = watch(client, job["id"])
    if job["status"] != "succeeded":
        sys.exit(f"The job ended as {job['status']}: {json.dumps(job['failure'])}")
    archive = FOLDER / "adapter.tar"
    client.download(f"/jobs/{job['id']}/adapter", archive)
    ADAPTER.mkdir()
    unpack(archive, ADAPTER)
    return job


def compare() -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """The test rows, and what the base model and the adapter answer to them."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from examples.score import answer, load_rows

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    rows = load_rows(EXAMPLES / "data" / "test.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tiny-base")
    base = AutoModelForCausalLM.from_pretrained(EXAMPLES / "tiny-base", dtype=torch.float32)
    before = answer(base, tokenizer, rows)
    after = answer(PeftModel.from_pretrained(base, ADAPTER), tokenizer, rows)
    return rows, before, after


def show(
    job: dict[str, Any], rows: list[dict[str, Any]], before: list[str], after: list[str]
) -> float:
    """Print the comparison; the share of test rows that the adapter answers exactly."""
    from examples.score import exact_match

    table = Table(title="Questions that neither has seen", show_lines=True)
    for title in ("question", "base model", "with the adapter", "expected"):
        table.add_column(title, ratio=1, overflow="fold")
    for row, base, tuned in list(zip(rows, before, after, strict=True))[:SHOWN]:
        question, expected = (message["content"] for message in row["messages"][-2:])
        table.add_row(*(text.replace("[", "\\[") for text in (question, base, tuned, expected)))
    console.print(table)

    references = [row["messages"][-1]["content"] for row in rows]
    matched = exact_match(before, references), exact_match(after, references)
    held_out = job["result"]["held_out"]
    result = Table(title=f"On {len(rows)} held-out rows")
    for title in ("", "base model", "with the adapter"):
        result.add_column(title, justify="right")
    losses = (held_out[when]["loss"] for when in ("before", "after"))
    result.add_row("held-out loss", *(f"{loss:.4f}" for loss in losses))
    result.add_row("exact match", *(f"{share:.0%}" for share in matched))
    console.print(result)
    return matched[1] - matched[0]


def main() -> int:
    console.print("[bold]Flat-LoRA on a tiny model[/]: starting the service …")
    with service(free_port()):
        started = time.monotonic()
        job = train()
        seconds = time.monotonic() - started
    gained = show(job, *compare())
    console.print(f"job {job['id']}: {seconds:.0f} s from POST to download")
    console.print(f"adapter: {ADAPTER.relative_to(ROOT)}, a plain PEFT folder")
    if gained <= 0:
        console.print("[red]The adapter answers no better than the base model.[/]")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
