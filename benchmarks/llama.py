"""Models of a known shape with random weights, made on the device: nothing is downloaded."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

RANK = 16
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama.

    Attributes:
        layers: Number of decoder layers.
        hidden: Width of the residual stream.
        kv: Width of keys and of values, all heads together.
        ffn: Inner width of the MLP.
        heads: Query heads.
        vocab: Rows of the embedding, and of the head.
    """

    layers: int
    hidden: int
    kv: int
    ffn: int
    heads: int
    vocab: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """``(out, in)`` of the seven linear layers of a decoder layer."""
        h, kv, ffn = self.hidden, self.kv, self.ffn
        sizes = [(h, h), (kv, h), (kv, h), (h, h), (ffn, h), (ffn, h), (h, ffn)]
        return dict(zip(LINEARS, sizes, strict=True))


EIGHT_B = Shape(layers=32, hidden=4096, kv=1024, ffn=14336, heads=32, vocab=128_256)
TINY = Shape(layers=2, hidden=64, kv=32, ffn=160, heads=4, vocab=256)


def bare_linears(
    shape: Shape, device: torch.device, dtype: torch.dtype
) -> tuple[PeftModel, Tensor]:
    """All adapted linear layers of a model, and nothing else of it; it has no forward.

    Returns:
        The PEFT model, and the one buffer that all its base weights are views of.
    """
    sizes = list(shape.linears().items()) * shape.layers
    flat = torch.empty(sum(o * i for _, (o, i) in sizes), dtype=dtype, device=device)
    flat.normal_(std=0.02)
    layers, start = nn.ModuleList(), 0
    for number, (name, (out_features, in_features)) in enumerate(sizes):
        if number % len(LINEARS) == 0:
            layers.append(nn.Module())
        linear = nn.Linear(in_features, out_features, bias=False, device="meta")
        stop = start + out_features * in_features
        linear.weight = nn.Parameter(flat[start:stop].view(out_features, in_features))
        layers[-1].add_module(name, linear)
        start = stop
    root = nn.Module()
    root.add_module("layers", layers)
    return adapted(root), flat


def language_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> PeftModel:
    """A whole causal language model with an adapter on its linear layers, in training mode."""
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv * shape.heads // shape.hidden,
        max_position_embeddings=8192,
        use_cache=False,
    )
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype, attn_implementation="sdpa"
        )
    return adapted(base).train()


def adapted(base: nn.Module, targets: str | tuple[str, ...] = LINEARS) -> PeftModel:
    """LoRA of rank 16 whose update is not zero, as in the middle of a training."""
    names = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # PEFT's, by an old name
        model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=1e-3)
    return model


def from_folder(folder: Path, device: torch.device, dtype: torch.dtype) -> PeftModel:
    """A base model of one's own with an adapter on all its linear layers, in training mode."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    base: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    base.to(device)
    return adapted(base, targets="all-linear").train()


def checkpoint_activations(model: PeftModel) -> None:
    """Keep no activations within a decoder layer; the backward pass runs its forward again."""
    model.enable_input_require_grads()
    # transformers 5.24 has renamed it
    old = "gradient_checkpointing_enable"
    enable = getattr(model, "activation_checkpointing_enable", None) or getattr(model, old)
    enable({"use_reentrant": False})
