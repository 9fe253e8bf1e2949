"""What the perturbation costs: an optimizer step of Flat-LoRA over one of plain LoRA.

    python -m benchmarks.step_time --base-model FOLDER [--rows 16] [--length 200] [--steps 5]

A step is forward and backward passes over one batch of random tokens, and AdamW's update; medians,
the three kinds taking turns. Ends with 1, and without ratios, if resident and streamed mode do not
give the same loss.
"""

import argparse
import statistics
import sys
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from flatlora import FlatLora, FlatLoraConfig
from flatlora.memory import MemoryMode

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
TOTAL_STEPS = 1000


def load(folder: Path) -> nn.Module:
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # PEFT asks by the old name
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE)
    base.to(DEVICE)  # type: ignore[arg-type] # transformers' own signature has lost its self
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    return get_peft_model(base, config).train()


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ids: Tensor,
    noise: AbstractContextManager[None],
) -> tuple[float, float]:
    """Seconds of one step, and its loss."""
    _synchronise()
    started = time.perf_counter()
    with noise:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    _synchronise()
    return time.perf_counter() - started, float(loss.detach())


def _synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description="Step time of Flat-LoRA over that of plain LoRA.")
    parser.add_argument("--base-model", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    model = load(options.base_model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)  # every step of a kind meets the same weights
    ids = torch.randint(4, 1000, (options.rows, options.length), device=DEVICE)
    modes: list[MemoryMode] = ["resident", "streamed"]
    engines = {
        mode: FlatLora(model, FlatLoraConfig(sigma=0.05, memory=mode), TOTAL_STEPS)
        for mode in modes
    }
    seconds: dict[str, list[float]] = {"plain LoRA": [], **{mode: [] for mode in modes}}
    for _ in range(options.steps + 1):
        seconds["plain LoRA"].append(step(model, optimizer, ids, nullcontext())[0])
        losses = []
        for mode, engine in engines.items():
            taken, loss = step(model, optimizer, ids, engine.perturbed(TOTAL_STEPS - 1))
            seconds[mode].append(taken)
            losses.append(loss)
        if losses[0] != losses[1]:
            sys.stderr.write(f"resident and streamed mode differ: {losses}\n")
            return 1
    show({name: statistics.median(taken[1:]) for name, taken in seconds.items()}, options)
    return 0


def show(medians: dict[str, float], options: argparse.Namespace) -> None:
    name = (
        torch.cuda.get_device_name()
        if DEVICE.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    table = Table(title=f"{options.rows} × {options.length} tokens a step, {name}, {DTYPE}")
    for column in ("", "seconds a step", "÷ plain LoRA"):
        table.add_column(column, justify="right")
    for kind, taken in medians.items():
        table.add_row(kind, f"{taken:.3f}", f"{taken / medians['plain LoRA']:.3f}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
