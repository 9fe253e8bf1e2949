"""The base model, frozen, with a LoRA adapter on it."""

import json
import logging
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from worker.training.config import BaseModel, Quantization, Training, TrainingJob
from worker.training.errors import BaseModelUnavailable, ConfigInvalid, OutOfGpuMemory
from worker.training.files import sha256_of
from worker.training.model.plain import check_plain, explained

log = logging.getLogger(__name__)


def load_tokenizer(base: BaseModel) -> PreTrainedTokenizerBase:
    """The base model's own tokenizer; nothing of it can run code.

    Raises:
        BaseModelUnavailable: If the folder holds none that can be loaded.
    """
    check_plain(base)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            base.path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises bare ones
        log.exception("tokenizer cannot be loaded")
        problem = BaseModelUnavailable(
            f"The tokenizer of {base.name} cannot be loaded.",
            "Expected a folder with tokenizer.json and tokenizer_config.json.",
        )
        raise explained(base, problem) from error
    return tokenizer


def max_positions(base: BaseModel) -> int | None:
    """The longest row that the model can read, in tokens, if its config says so."""
    try:
        config = json.loads((base.path / "config.json").read_text())
        config |= config.get("text_config") or {}  # of a model that also sees or hears
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BaseModelUnavailable(
            f"{base.name} has no readable config.json.", "Name the folder of a model."
        ) from error
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    return positions if isinstance(positions, int) else None


def choose_device() -> torch.device:
    """The first CUDA device that the process can see, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(training: Training, device: torch.device) -> torch.dtype:
    """The type that the base model computes in; adapters are float32 always."""
    match training.precision:
        case "bf16":
            return torch.bfloat16
        case "fp32":
            return torch.float32
    is_native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if is_native else torch.float32


def load_base(
    base: BaseModel,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """The base model from safetensors alone, frozen.

    Args:
        base: Its folder.
        device: Where it goes.
        dtype: What it computes in.
        quantization: How its linear layers are stored, but for the head.

    Raises:
        BaseModelUnavailable: If the folder holds no causal language model that can be loaded, or
            not all of its weights.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if (base.path / "adapter_config.json").exists():
        raise BaseModelUnavailable(
            f"{base.name} holds an adapter_config.json: it is an adapter, or has one in it.",
            "Name the folder of the base model itself, or of a merged one.",
        )
    check_plain(base)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base.path,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **_quantized(quantization, device, dtype),
        )
    except torch.OutOfMemoryError as error:
        raise _too_large(base) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        log.exception("base model cannot be loaded")
        problem = BaseModelUnavailable(
            f"{base.name} cannot be loaded as a causal language model.",
            "Expected config.json and whole *.safetensors, as save_pretrained() writes them.",
        )
        raise explained(base, problem) from error
    model: PreTrainedModel = loaded[0]
    _check_whole(base, loaded[1]["missing_keys"])
    model.config.use_cache = False
    model.requires_grad_(False)
    if quantization is None:  # else it was loaded where it stays
        try:
            model.to(device)  # type: ignore[arg-type] # transformers' signature has lost its self
        except torch.OutOfMemoryError as error:
            raise _too_large(base) from error
    return model


def _too_large(base: BaseModel) -> OutOfGpuMemory:
    return OutOfGpuMemory(
        f"The GPU's memory does not suffice for {base.name} alone.",
        "Set training.quantization to 4bit, or resources.gpus to more than one with strategy fsdp.",
    )


def _quantized(
    quantization: Quantization | None, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments that let bitsandbytes quantise the weights as they are loaded."""
    if quantization is None:
        return {}
    check_quantization(quantization)
    options: dict[str, Any] = {"load_in_8bit": True}
    if quantization == "4bit":
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }
    configuration = BitsAndBytesConfig(**options)  # type: ignore[no-untyped-call]
    return {"quantization_config": configuration, "device_map": {"": device}}


def check_quantization(quantization: Quantization | None) -> None:
    """That this machine can quantise.

    Raises:
        ConfigInvalid: If bitsandbytes is not installed.
    """
    if quantization and find_spec("bitsandbytes") is None:
        raise ConfigInvalid(
            f"training.quantization is {quantization}, and this worker has no bitsandbytes.",
            "Install flatlora-service[gpu] on the worker, or leave quantization out.",
        )


def set_mode(model: nn.Module, *, training: bool) -> None:
    """Put a model into training or evaluation mode, but for layers of bitsandbytes.

    They compute the same in both, and on a CPU pack their weight anew in evaluation mode, for good,
    in a way that cannot be trained with.
    """
    model.train(training)
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes."):
            module.training = True


def checkpoint_activations(model: nn.Module, *, on: bool) -> None:
    """Keep only what enters each decoder layer, and run its forward again in the backward pass.

    Args:
        model: The base model.
        on: Whether to, or to keep all activations.
    """
    # transformers 5.24 has renamed both
    verb = "enable" if on else "disable"
    new, old = f"activation_checkpointing_{verb}", f"gradient_checkpointing_{verb}"
    switch: Any = getattr(model, new, None) or getattr(model, old)
    if on and not getattr(model, "supports_gradient_checkpointing", True):
        raise ConfigInvalid(
            f"{type(model).__name__} cannot compute its activations again.",
            "Leave training.activation_checkpointing out.",
        )
    if on:
        switch({"use_reentrant": False})
    else:
        switch()


def _check_whole(base: BaseModel, missing: Collection[str]) -> None:
    """Transformers only warns of missing weights, and leaves random ones in their place."""
    if missing:
        shown = ", ".join(sorted(missing)[:5]) + (" and more" if len(missing) > 5 else "")
        raise BaseModelUnavailable(
            f"{base.name} lacks {len(missing)} weights that its config.json calls for: {shown}.",
            "Is the folder whole? Expected all files that save_pretrained() wrote.",
        )


def attach_adapter(model: PreTrainedModel, job: TrainingJob) -> PeftModel:
    """A new LoRA adapter, its initial weights drawn from the job's seed.

    Raises:
        ConfigInvalid: If a target module does not exist, or none of them can be adapted.
    """
    check_targets(model, job)
    torch.manual_seed(job.seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=job.lora.rank,
        lora_alpha=job.lora.alpha,  # type: ignore[arg-type] # PEFT scales by any number
        target_modules=_targets(model, job),
        lora_dropout=job.lora.dropout,
        use_rslora=job.lora.rslora,
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ConfigInvalid(
            f"PEFT cannot adapt {job.base_model.name}: {error}", "Name other lora.target_modules."
        ) from error
    assert isinstance(adapted, PeftModel)
    return adapted


def _targets(model: Any, job: TrainingJob) -> list[str] | str:
    """What PEFT adapts: of a model that also sees or hears, only what reads and writes text."""
    wanted = job.lora.target_modules
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if wanted != "all-linear" or decoder is None:
        return wanted
    inside = set(decoder.modules())
    head = model.get_output_embeddings()
    linear = {
        name: module in inside
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    if all(linear.values()):
        return wanted
    return sorted(name for name, is_inside in linear.items() if is_inside)


def check_targets(model: PreTrainedModel, job: TrainingJob) -> None:
    """That the layers which a job names are there, and may be adapted.

    Raises:
        ConfigInvalid: With those that are not, and the names that are.
    """
    wanted = job.lora.target_modules
    if wanted == "all-linear":
        return
    names = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    outputs = {name for name, module in model.named_modules() if module is head}
    if named := [w for w in wanted if any(n == w or n.endswith("." + w) for n in outputs)]:
        raise ConfigInvalid(
            f"lora.target_modules names {', '.join(named)}, the head of {job.base_model.name}.",
            "Leave it out: servers take no adapter of it, and where its weight is the embedding's "
            "too, merging would change both.",
        )
    names -= outputs
    missing = [w for w in wanted if not any(n == w or n.endswith("." + w) for n in names)]
    if missing:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
        raise ConfigInvalid(
            f"{job.base_model.name} has no linear layer named {', '.join(missing)}.",
            f"lora.target_modules may name {known}, or be all-linear.",
        )


def hash_folder(folder: Path) -> dict[str, str]:
    """SHA-256 of each file that decides what a base model computes."""
    suffixes = {".safetensors", ".json", ".jinja", ".model", ".txt"}
    return {
        path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.suffix in suffixes
    }
