"""The model card of a finished adapter."""

import json
from pathlib import Path
from typing import Any

from worker.training.config import TrainingJob
from worker.training.state import State

FLAT = (
    "Trained with [Flat-LoRA](https://arxiv.org/abs/2409.14396): LoRA under small random "
    "perturbations of the full merged weight, so that it lies in a flat region of the loss. "
    "The finished adapter is plain LoRA; nothing of the method is needed to use it."
)


def write_card(path: Path, job: TrainingJob, result: dict[str, Any], state: State) -> None:
    """Write the card: what was trained on what, how it went, and how to load it."""
    base = job.base_model.reference
    path.write_text(
        "\n\n".join(
            [
                _front_matter(base),
                f"# LoRA adapter for {base}",
                FLAT if job.sigma else "Trained as plain LoRA (σ = 0).",
                _settings(job, result),
                _evaluation(result),
                _curves(state),
                _usage(base, result["precision"]),
            ]
        )
        + "\n"
    )


def _front_matter(base: str) -> str:
    quoted = json.dumps(base, ensure_ascii=False)
    return f"---\nlibrary_name: peft\nbase_model: {quoted}\ntags: [lora, flat-lora]\n---"


def _settings(job: TrainingJob, result: dict[str, Any]) -> str:
    training = job.training
    rows = [
        ("base model", job.base_model.name),
        ("revision", job.base_model.revision or "–"),
        ("dataset", f"{job.dataset.uri} (sha256 {job.dataset.sha256[:16]}…)"),
        ("rank, alpha", f"{job.lora.rank}, {job.lora.alpha:g}"),
        ("target modules", _joined(job.lora.target_modules)),
        ("σ", f"{job.sigma:g}"),
        ("steps × rows", f"{result['steps']} × {training.batch_size}"),
        ("tokens seen", f"{result['train_tokens']:,}"),
        ("learning rate", f"{training.learning_rate:g}, {training.schedule}"),
        ("compute type", result["precision"]),
        ("seed", str(job.seed)),
    ]
    return "## Settings\n\n| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in rows)


def _joined(names: Any) -> str:
    return names if isinstance(names, str) else ", ".join(names)


def _evaluation(result: dict[str, Any]) -> str:
    held_out = result["held_out"]
    before, after = held_out["before"], held_out["after"]
    return (
        f"## Evaluation\n\nOn {held_out['rows']} held-out rows ({held_out['tokens']:,} tokens in "
        f"the loss), computed in {held_out['dtype']}, without noise:\n\n"
        "| | base model | with the adapter |\n|---|---:|---:|\n"
        f"| loss | {before['loss']:.4f} | {after['loss']:.4f} |\n"
        f"| token accuracy | {before['accuracy']:.1%} | {after['accuracy']:.1%} |"
    )


def _curves(state: State) -> str:
    """Both losses by step; the training loss is of the step itself, under noise."""
    held_out = {int(point["step"]): point["loss"] for point in state.held_out}
    train = {int(step): loss for step, loss in state.losses}
    rows = []
    for step in sorted(held_out | train):
        cells = (f"{curve[step]:.4f}" if step in curve else "" for curve in (train, held_out))
        rows.append(f"| {step} | {' | '.join(cells)} |")
    head = "| step | training loss | held-out loss |\n|---:|---:|---:|\n"
    return "## Curves\n\n" + head + "\n".join(rows)


def _usage(base: str, precision: str) -> str:
    return f"""## Use

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base!r}, dtype=torch.{precision})
model = PeftModel.from_pretrained(base, "folder-of-this-adapter")
tokenizer = AutoTokenizer.from_pretrained("folder-of-this-adapter")
```"""
