"""The finished adapter: a PEFT folder with its card, its manifest, and nothing that varies.

The same job gives the same bytes, on whichever attempt and in whichever work folder: no file holds
a time or a host name, and the only path is that of a base model that the job named by its folder.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from worker.training.config import TrainingJob
from worker.training.errors import ConfigInvalid
from worker.training.result.card import write_card
from worker.training.state import State

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MANIFEST = "training_manifest.json"


def save_adapter(
    folder: Path,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    job: TrainingJob,
    inputs: dict[str, Any],
    result: dict[str, Any],
    state: State,
) -> None:
    """Write the adapter's folder anew.

    Args:
        folder: Where; what an earlier attempt left there is removed.
        model: The trained model.
        tokenizer: Of the base model; saved with its chat template, for whoever serves the adapter.
        job: Gives the base model's name.
        inputs: Hashes of all that went in (``describe_inputs``).
        result: What the job reports.
        state: Gives the curves.

    Raises:
        ConfigInvalid: If training has left no trace in the adapter.
    """
    _check_trained(model, result["steps"])
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    _settle_config(folder / CONFIG, job)
    tokenizer.save_pretrained(str(folder))
    manifest = {
        **inputs,
        "result": result,
        "held_out": state.held_out,
        "train_loss": state.losses,
        "versions": {
            "peft": peft.__version__,
            "torch": torch.__version__.partition("+")[0],
            "transformers": transformers.__version__,
        },
    }
    text = json.dumps(manifest, indent=2, sort_keys=True, allow_nan=False)
    (folder / MANIFEST).write_text(text + "\n")
    write_card(folder / "README.md", job, result, state)


def _settle_config(path: Path, job: TrainingJob) -> None:
    """Name the base model by where it can be loaded from, and order what PEFT keeps in sets."""
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = job.base_model.reference
    config["revision"] = job.base_model.revision
    for key, value in config.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            config[key] = sorted(value)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _check_trained(model: PeftModel, steps: int) -> None:
    updates = [weight for name, weight in model.named_parameters() if ".lora_B." in name]
    if steps and not any(bool(weight.any()) for weight in updates):
        raise ConfigInvalid(
            "The adapter is untrained: every lora_B is zero.",
            "Raise training.learning_rate or training.max_steps.",
        )
