"""The base model, frozen, with a LoRA adapter on it."""

import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from worker.training.config import BaseModel, Training, TrainingJob
from worker.training.errors import BaseModelUnavailable, ConfigInvalid
from worker.training.files import sha256_of

log = logging.getLogger(__name__)


def load_tokenizer(base: BaseModel) -> PreTrainedTokenizerBase:
    """The base model's own tokenizer; nothing of it can run code.

    Raises:
        BaseModelUnavailable: If the folder holds none that can be loaded.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            base.path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises bare ones
        log.exception("tokenizer cannot be loaded")
        raise BaseModelUnavailable(
            f"The tokenizer of {base.name} cannot be loaded.",
            "Expected a folder with tokenizer.json and tokenizer_config.json.",
        ) from error
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


def load_base(base: BaseModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The base model from safetensors alone, frozen.

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
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base.path,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        log.exception("base model cannot be loaded")
        raise BaseModelUnavailable(
            f"{base.name} cannot be loaded as a causal language model.",
            "Expected config.json and whole *.safetensors, as save_pretrained() writes them.",
        ) from error
    model: PreTrainedModel = loaded[0]
    _check_whole(base, loaded[1]["missing_keys"])
    model.config.use_cache = False
    model.requires_grad_(False)
    model.to(device)  # type: ignore[arg-type] # transformers' own signature has lost its self
    return model


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
    _check_targets(model, job)
    torch.manual_seed(job.seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=job.lora.rank,
        lora_alpha=job.lora.alpha,  # type: ignore[arg-type] # PEFT scales by any number
        target_modules=job.lora.target_modules,
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


def _check_targets(model: nn.Module, job: TrainingJob) -> None:
    wanted = job.lora.target_modules
    if wanted == "all-linear":
        return
    names = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
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
