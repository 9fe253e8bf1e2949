"""The first run: fine-tune the tiny base model through a real service, and look at the difference.

Starts ``flatlora up`` on a free port, sends one job to ``POST /jobs``, follows it, downloads the
adapter, loads it with PEFT, and lets the base model and the adapter answer questions that
neither has seen. Needs no network and no GPU.

    python -m examples.demo [--svg FILE]    with FILE, the output is also drawn there
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from app.uris import file_uri
from examples.score import Row, answer, exact_match, load_rows, reference
from examples.throwaway import Json, run_job, throwaway_service
from flatlora_client import JobFields

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
FOLDER = ROOT / ".demo"
ADAPTER = FOLDER / "adapter"
SHOWN = 3

JOB: JobFields = {
    "base_model": file_uri(EXAMPLES / "tiny-base"),
    "dataset_uri": file_uri(EXAMPLES / "data" / "train.jsonl"),
    "rank": 16,
    "sigma": 0.05,
    "name": "first-run",
    "data": {"max_length": 256},
    "training": {"max_steps": 150, "batch_size": 16, "learning_rate": 3e-3},
    "evaluation": {"validation_uri": file_uri(EXAMPLES / "data" / "test.jsonl")},
}

console = Console(soft_wrap=True, highlight=False, record=True)


def train() -> Json:
    """Send the job, follow it, fetch its adapter."""
    with throwaway_service(FOLDER, [EXAMPLES]) as client:
        started = time.monotonic()
        submitted = client.jobs.create(**JOB)
        console.print(f"POST /jobs → [bold]{submitted.id}[/]")
        job = run_job(client, submitted.id, ADAPTER)
        console.print(f"succeeded after {time.monotonic() - started:.0f} s, download included")
    return job


def compare() -> tuple[list[Row], list[str], list[str]]:
    """The test rows, and what the base model and the adapter answer to them."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # PEFT asks by the old name
    rows = load_rows(EXAMPLES / "data" / "test.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tiny-base")
    base = AutoModelForCausalLM.from_pretrained(EXAMPLES / "tiny-base", dtype=torch.float32)
    before = answer(base, tokenizer, rows)
    after = answer(PeftModel.from_pretrained(base, ADAPTER), tokenizer, rows)
    return rows, before, after


def show_answers(rows: list[Row], before: list[str], after: list[str]) -> None:
    table = Table(title="Questions that neither has seen", show_lines=True)
    for title in ("question", "base model", "with the adapter", "expected"):
        table.add_column(title, ratio=1, overflow="fold")
    for row, base, tuned in list(zip(rows, before, after, strict=True))[:SHOWN]:
        cells = (row["messages"][-2]["content"], base, tuned, reference(row))
        table.add_row(*map(escape, cells))
    console.print(table)


def show_scores(job: Json, before: float, after: float) -> None:
    held_out = job["result"]["held_out"]
    table = Table(title=f"On {held_out['rows']} held-out rows")
    for title in ("", "base model", "with the adapter"):
        table.add_column(title, justify="right")
    losses = (held_out[when]["loss"] for when in ("before", "after"))
    table.add_row("held-out loss", *(f"{loss:.4f}" for loss in losses))
    table.add_row("exact match", f"{before:.0%}", f"{after:.0%}")
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="The first run: see the README.")
    parser.add_argument("--svg", type=Path, help="draw the output there too")
    picture = parser.parse_args().svg
    console.print("[bold]Flat-LoRA on a tiny model[/]: starting the service …")
    job = train()
    rows, before, after = compare()
    show_answers(rows, before, after)
    references = [reference(row) for row in rows]
    matched = exact_match(before, references), exact_match(after, references)
    show_scores(job, *matched)
    console.print(f"adapter: {ADAPTER.relative_to(ROOT)}, a plain PEFT folder")
    if picture:
        console.save_svg(str(picture), title="make demo")
    if matched[1] <= matched[0]:
        console.print("[red]The adapter answers no better than the base model.[/]")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
