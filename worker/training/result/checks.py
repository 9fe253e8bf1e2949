"""What a finished folder must be, so that PEFT loads it and no server refuses it.

The rules are those of vLLM (``lora/peft_helper.py``, ``lora/lora_model.py``), SGLang and llama.cpp
(``convert_lora_to_gguf.py``), taken together. Some of them find out at the first request only.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from worker.training.config import TrainingJob
from worker.training.errors import PublishFailed
from worker.training.files import sha256_of
from worker.training.result.manifest import MANIFEST

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
NAME = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")
DTYPES = {torch.float32, torch.bfloat16, torch.float16}
NOT_ADAPTED = {"embed_tokens", "lm_head"}  # vLLM takes them for some models, llama.cpp for none
# Written by PEFT as it finds the model, of no weight for servers.
FREE = {"auto_mapping", "fan_in_fan_out", "peft_version", "target_modules"}


def check_folder(job: TrainingJob, adapter: Path) -> None:
    """That all files are there, whole, and plain LoRA of the promised shape.

    Args:
        job: What was promised.
        adapter: The finished folder.

    Raises:
        PublishFailed: With the first thing that is not so.
    """
    try:
        problem = next(_problems(job, adapter), None)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        problem = f"it cannot be read ({type(error).__name__}: {error})"
    if problem:
        raise PublishFailed(
            f"The saved adapter is not fit to be served: {problem}.",
            "Submit the job again; if it happens again, report it.",
        )


def _problems(job: TrainingJob, adapter: Path) -> Iterator[str]:
    yield from _of_files(adapter)
    config: dict[str, Any] = json.loads((adapter / CONFIG).read_text())
    yield from _of_config(config, job)
    tensors = load_file(adapter / WEIGHTS)
    yield from _of_names(tensors, config["target_modules"])
    yield from _of_tensors(tensors, job.lora.rank)


def _of_files(adapter: Path) -> Iterator[str]:
    """The files are those of the manifest, byte for byte."""
    hashes: dict[str, str] = json.loads((adapter / MANIFEST).read_text())["files"]
    found = {path.name for path in adapter.iterdir()} - {MANIFEST}
    for name in sorted(hashes.keys() | found | {CONFIG, WEIGHTS}):
        if name not in found:
            yield f"{name} is missing"
        elif name not in hashes:
            yield f"{name} is not in {MANIFEST}"
        elif sha256_of(adapter / name) != hashes[name]:
            yield f"{name} is not what was written"


def _of_config(config: Mapping[str, Any], job: TrainingJob) -> Iterator[str]:
    """Every field is what plain LoRA has there, whatever PEFT may learn to do besides."""
    expected = _plain(job)
    for key in sorted((expected.keys() | config.keys()) - FREE):
        if key not in expected:
            yield f"{CONFIG} has a field {key}, which plain LoRA has not"
        elif key not in config or config[key] != expected[key]:
            yield f"{CONFIG} has {key} = {config.get(key)!r}, expected {expected[key]!r}"
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not targets or targets != sorted(set(targets)):
        yield f"{CONFIG} has target_modules = {targets!r}, expected a sorted list of names"
    wanted = job.lora.target_modules
    if wanted != "all-linear" and set(wanted) != set(targets or []):
        yield f"{CONFIG} has target_modules = {targets!r}, expected {sorted(wanted)!r}"


def _plain(job: TrainingJob) -> dict[str, Any]:
    """``adapter_config.json`` of plain LoRA as the job asks for it."""
    config: Any = LoraConfig(
        task_type="CAUSAL_LM",
        r=job.lora.rank,
        lora_alpha=job.lora.alpha,  # type: ignore[arg-type] # PEFT scales by any number
        lora_dropout=job.lora.dropout,
        use_rslora=job.lora.rslora,
        inference_mode=True,
        base_model_name_or_path=job.base_model.reference,
        revision=job.base_model.revision,
    )
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return plain


def _of_names(tensors: Mapping[str, Tensor], targets: list[str]) -> Iterator[str]:
    """Pairs of ``lora_A`` and ``lora_B`` on the layers that the config names, and nothing else."""
    sides: dict[str, set[str]] = {}
    for name in sorted(tensors):
        if not (match := NAME.fullmatch(name)):
            yield f"{WEIGHTS} holds {name}, expected base_model.model.….lora_A.weight and lora_B"
            continue
        sides.setdefault(match["layer"], set()).add(match["side"])
    for layer, found in sides.items():
        if layer.rpartition(".")[2] in NOT_ADAPTED:
            yield f"{WEIGHTS} adapts {layer}: servers take no adapter of embeddings or of the head"
        if found != {"A", "B"}:
            yield f"{WEIGHTS} has only lora_{found.pop()} of {layer}"
        if not any(_is_named(layer, target) for target in targets):
            yield f"{WEIGHTS} adapts {layer}, which is not in target_modules"
    for target in targets:
        if not any(_is_named(layer, target) for layer in sides):
            yield f"{WEIGHTS} has no tensors of {target}, which is in target_modules"


def _is_named(layer: str, target: str) -> bool:
    return layer == target or layer.endswith(f".{target}")


def _of_tensors(tensors: Mapping[str, Tensor], rank: int) -> Iterator[str]:
    """All of one type, A rank × in and B out × rank, finite, and not without effect."""
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not dtypes <= DTYPES:
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        yield f"{WEIGHTS} holds {names}; expected one of float32, bfloat16 and float16"
    for name, tensor in sorted(tensors.items()):
        side = 1 if ".lora_B." in name else 0
        if tensor.ndim != 2 or tensor.shape[side] != rank:
            expected = f"out × {rank}" if side else f"{rank} × in"
            yield f"{name} has the shape {tuple(tensor.shape)}, expected {expected}"
        if not bool(tensor.isfinite().all()):
            yield f"{name} is not finite"
    if not any(bool(tensor.any()) for name, tensor in tensors.items() if ".lora_B." in name):
        yield "every lora_B is zero, so the adapter does nothing"
