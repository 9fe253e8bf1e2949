"""One job on real data, from ``POST /jobs`` to a check of what the service claims about it.

    python -m benchmarks.real_data --base-model FOLDER --dataset ROWS --validation ROWS

Prints the job's held-out loss before and after, whether a byte of the base model's folder has
changed, and how far the loss that PEFT computes from the downloaded adapter, row by row and with
nothing of ours but the rows, is from the loss that the job has reported. Ends with 1 if the base
has changed or the losses are more than 1e-4 apart.
"""

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from app.uris import file_uri
from examples.score import load_rows
from examples.throwaway import Json, run_job, throwaway_service
from flatlora_client import JobFields

TOLERANCE = 1e-4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-model", type=Path, required=True, help="folder")
    parser.add_argument("--dataset", type=Path, required=True, help="chat JSONL")
    parser.add_argument("--validation", type=Path, required=True, help="held-out rows, chat JSONL")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--sigma", type=float, default=0.05)
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    return parser.parse_args()


def job_of(options: argparse.Namespace) -> JobFields:
    return {
        "base_model": file_uri(options.base_model.resolve()),
        "dataset_uri": file_uri(options.dataset.resolve()),
        "rank": 16,
        "sigma": options.sigma,
        "training": {"max_steps": options.steps, "batch_size": 16, "learning_rate": 1e-3},
        "evaluation": {"validation_uri": file_uri(options.validation.resolve())},
    }


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def used_rows(validation: Path, report: Json) -> list[Any]:
    """The held-out rows that the job has used: all, or the first where there are very many.

    The report counts the rows that were left out and does not name them.
    """
    counts = report["validation"]["rows"]
    left_out = counts["bad"] + counts["dropped_without_targets"]
    if left_out:
        sys.exit(
            f"{left_out} held-out rows were left out ({counts['bad']} bad, "
            f"{counts['dropped_without_targets']} without a token to learn within "
            f"{report['length']['limit']}): which ones the job has used is not known. "
            "Give a file of which every row can be used."
        )
    return load_rows(validation)[: counts["held_out"]]


@torch.inference_mode()
def held_out_loss(base_model: Path, adapter: Path, rows: list[Any], max_length: int) -> float:
    """Mean cross-entropy over the assistant's tokens: transformers, PEFT and torch alone."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # PEFT asks by the old name
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
    total, count = 0.0, 0
    for row in rows:
        rendered: Any = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids = torch.tensor(rendered["input_ids"][:max_length])
        mask = torch.tensor(rendered["assistant_masks"][:max_length], dtype=torch.bool)[1:]
        logits = model(input_ids=ids[None]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        total, count = total + losses[mask].double().sum().item(), count + int(mask.sum())
    if not count:
        sys.exit(
            "The base model's chat template has no {% generation %} marks: without them nothing "
            "says which tokens are the assistant's. Name a model whose template has them."
        )
    return total / count


def measure(options: argparse.Namespace) -> Json:
    before = hashes(options.base_model)
    roots = [options.base_model.resolve(), *(
        path.resolve().parent for path in (options.dataset, options.validation)
    )]  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        started = time.monotonic()
        with throwaway_service(folder, roots) as client:
            submitted = client.jobs.create(**job_of(options))
            job = run_job(client, submitted.id, folder / "adapter")
        seconds = time.monotonic() - started
        rows = used_rows(options.validation, job["report"])
        limit = job["report"]["length"]["limit"]
        reproduced = held_out_loss(options.base_model, folder / "adapter", rows, limit)
    reported = job["result"]["held_out"]
    return {
        "job seconds": round(seconds, 1),
        "steps": job["result"]["steps"],
        "sigma": job["result"]["sigma"],
        "compute type": job["result"]["precision"],
        "held-out rows": reported["rows"],
        "held-out loss before": reported["before"]["loss"],
        "held-out loss after": reported["after"]["loss"],
        "the same by PEFT": reproduced,
        "difference": abs(reproduced - reported["after"]["loss"]),
        "base files changed": sum(
            before.get(name) != found for name, found in hashes(options.base_model).items()
        ),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }


def main() -> int:
    options = arguments()
    found = measure(options)
    table = Table(show_header=False)
    for name, value in found.items():
        table.add_row(name, f"{value:.6g}" if isinstance(value, float) else str(value))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    is_right = found["difference"] <= TOLERANCE and not found["base files changed"]
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
