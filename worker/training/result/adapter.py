"""The finished adapter: a PEFT folder with its card, its manifest, and nothing that varies.

    adapter/
        adapter_config.json         plain LoRA, as PEFT and servers read it
        adapter_model.safetensors   A and B of each layer, float32
        tokenizer.json, …           the base model's, with its chat template
        README.md                   the model card
        training_curves.svg         the picture in it
        training_manifest.json      what went in, and the hash of each file above

The same job gives the same bytes, on whichever attempt and in whichever work folder: no file holds
a time or a host name, and the only path is that of a base model that the job named by its folder.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from worker.training.config import TrainingJob
from worker.training.errors import ConfigInvalid
from worker.training.result.card import write_card
from worker.training.result.checks import CONFIG
from worker.training.result.curves import curves_of, draw
from worker.training.result.facts import Facts
from worker.training.result.manifest import write_manifest
from worker.training.state import State

CURVES = "training_curves.svg"


def save_adapter(
    folder: Path,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    job: TrainingJob,
    inputs: Mapping[str, Any],
    result: Mapping[str, Any],
    state: State,
    report: Mapping[str, Any],
) -> None:
    """Write the adapter's folder anew.

    Args:
        folder: Where; what an earlier attempt left there is removed.
        model: The trained model.
        tokenizer: Of the base model; saved with its chat template, for whoever serves the adapter.
        job: Gives the base model's name and the settings.
        inputs: Hashes of all that went in (``describe_inputs``).
        result: What the job reports.
        state: Gives the curves.
        report: The preflight report: what the rows were.

    Raises:
        ConfigInvalid: If training has left no trace in the adapter.
    """
    _check_trained(model, result["steps"])
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    _settle_config(folder / CONFIG, job)
    tokenizer.save_pretrained(str(folder))
    curves = curves_of(job, state, report["steps"])
    (folder / CURVES).write_text(draw(curves), encoding="utf-8")
    facts = Facts(job, result, state, report, _quantization(model, job))
    write_card(folder / "README.md", facts, curves, CURVES)
    write_manifest(folder, inputs, result, state, report)


def _settle_config(path: Path, job: TrainingJob) -> None:
    """Name the base model by where it can be loaded from, and order what PEFT keeps in sets."""
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = job.base_model.reference
    config["revision"] = job.base_model.revision
    if float(config["lora_alpha"]).is_integer():  # some servers read a whole number only
        config["lora_alpha"] = int(config["lora_alpha"])
    for key, value in config.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            config[key] = sorted(value)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _quantization(model: PeftModel, job: TrainingJob) -> dict[str, Any] | None:
    """Arguments of the ``BitsAndBytesConfig`` that the base was loaded with, if it was."""
    config = getattr(model.config, "quantization_config", None)
    if job.training.quantization is None or config is None:
        return None
    return {key: value for key, value in config.to_diff_dict().items() if key[0] != "_"}


def _check_trained(model: PeftModel, steps: int) -> None:
    updates = [weight for name, weight in model.named_parameters() if ".lora_B." in name]
    if steps and not any(bool(weight.any()) for weight in updates):
        raise ConfigInvalid(
            "The adapter is untrained: every lora_B is zero.",
            "Raise training.learning_rate or training.max_steps.",
        )
