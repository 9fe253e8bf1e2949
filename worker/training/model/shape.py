"""What a base model with its adapter is made of, found without any of its weights.

Its config alone builds it on the meta device, where tensors have a shape and no memory, and PEFT
attaches the adapter there. So every count is that of the model which is going to be loaded.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from worker.training.config import BaseModel, Lora, Quantization
from worker.training.model.kernels import has_fused_kernels

log = logging.getLogger(__name__)

Reads = Literal["attention", "heads", "mlp", "product", "own"]
"""What enters a linear layer. Layers of a decoder layer that read the same share one tensor."""

READS: Mapping[str, Reads] = {
    **dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn"), "attention"
    ),
    **dict.fromkeys(("o_proj", "out_proj", "dense"), "heads"),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj"), "mlp"),
    **dict.fromkeys(("fc1", "dense_h_to_4h", "c_fc"), "mlp"),
    **dict.fromkeys(("down_proj", "fc2", "dense_4h_to_h"), "product"),
}


@dataclass(frozen=True)
class Linear:
    """A linear layer.

    Attributes:
        name: Its last name, as ``q_proj``.
        inputs: Features of its input.
        outputs: Features of its output.
        rank: Of its adapter; 0 without one.
        reads: What its input is.
    """

    name: str
    inputs: int
    outputs: int
    rank: int
    reads: Reads

    @property
    def size(self) -> int:
        """Number of weights, without a bias."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Norm:
    """A norm, whose weights are not counted here.

    Attributes:
        features: Of a token that it reads, all heads together where each is normed by itself.
        rows: Norms that it takes of each token.
        is_rms: Whether it is one of those that are computed in float32, and can be fused.
    """

    features: int
    rows: int
    is_rms: bool


@dataclass(frozen=True)
class DecoderLayer:
    """One layer of the decoder, its tensors per token.

    Attributes:
        linears: Its linear layers.
        norms: Its norms.
        inner: Width between the two halves of the MLP.
        factors: Tensors of that width that its activation keeps in plain PyTorch.
        experts: How many of its MLPs a token passes through.
    """

    linears: tuple[Linear, ...]
    norms: tuple[Norm, ...]
    inner: int
    factors: int
    experts: int = 1


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a base model and its adapter.

    Attributes:
        family: The config's ``model_type``; that of the language model, where it also sees.
        hidden: Width of the residual stream.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Features of a head.
        vocabulary: Rows of the head.
        layers: The decoder's.
        others: Linear layers elsewhere, as of a part that sees; not the head.
        parameters: Of the base model, a tied head counted once.
        adapter: Parameters of the adapter.
        dropout: Whether the adapter drops some of its input out.
        quantization: How the linear layers are stored.
        keeps_scores: Whether attention keeps its scores: it caps them, or drops some out.
        logits: How often all logits are there. 0: never, as the head does nothing but multiply.
        is_known: Whether all parts of a decoder layer were recognised.
    """

    family: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    layers: tuple[DecoderLayer, ...]
    others: tuple[Linear, ...]
    parameters: int
    adapter: int
    dropout: bool
    quantization: Quantization | None
    keeps_scores: bool
    logits: int
    is_known: bool

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """All linear layers, the head not counted."""
        return (*(linear for layer in self.layers for linear in layer.linears), *self.others)

    @cached_property
    def targets(self) -> tuple[Linear, ...]:
        """Those with an adapter."""
        return tuple(linear for linear in self.linears if linear.rank)

    @cached_property
    def is_fused(self) -> bool:
        """Whether norms, rotations and activations are fused on a GPU of this machine."""
        return has_fused_kernels(self.family)


def describe_model(
    base: BaseModel,
    lora: Lora,
    quantization: Quantization | None = None,
    model: PreTrainedModel | None = None,
) -> ModelShape | None:
    """The sizes of a base model with its adapter, from its ``config.json`` alone.

    Args:
        base: A folder; its weights need not be there.
        lora: The adapter.
        quantization: How the linear layers are going to be stored.
        model: The same on the meta device, where it is made already; it gets the adapter.

    Returns:
        None, and a line in the log, for a model that this does not work for: an estimate is no
        reason to fail a job.
    """
    try:
        config: Any = read_config(base) if model is None else model.config
        return shape_of(config, lora, quantization, model)
    except Exception:  # whatever code of transformers or PEFT runs for this architecture
        log.warning("the sizes of %s are not known", base.name, exc_info=True)
        return None


def shape_of(
    config: Any,
    lora: Lora,
    quantization: Quantization | None = None,
    built: PreTrainedModel | None = None,
) -> ModelShape:
    """As `describe_model`, of a config of transformers.

    Raises:
        Exception: Whatever transformers or PEFT raise for a model that cannot be built.
    """
    model: Any = without_weights(config) if built is None else built
    parameters = sum(parameter.numel() for parameter in model.parameters())
    head = model.get_output_embeddings()
    decoder = _decoder_layers(model)
    options = LoraConfig(
        task_type="CAUSAL_LM", r=lora.rank, target_modules=lora.target_modules, lora_dropout=0.0
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are given where the adapter is really attached
        adapted = get_peft_model(model, options)
    text = config.get_text_config()
    hidden, heads = text.hidden_size, text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    widths = {"q_norm": heads * head_dim, "k_norm": kv_heads * head_dim}
    inside = {module for layer in decoder for module in layer.modules()}
    return ModelShape(
        family=text.model_type,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=head.weight.shape[0],
        layers=tuple(_describe_layer(layer, text, widths) for layer in decoder),
        others=tuple(
            linear
            for _, module, linear in _linears(adapted)
            if module not in inside and (module is not head or linear.rank)
        ),
        parameters=parameters,
        adapter=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        dropout=lora.dropout > 0,
        quantization=quantization,
        keeps_scores=bool(
            _first_of(text, "attn_logit_softcapping", "attention_dropout", "attn_pdrop")
        ),
        logits=_logits(head, text),
        is_known=bool(decoder) and all(map(_is_known, decoder)),
    )


def read_config(base: BaseModel) -> Any:
    """The config of transformers in a base model's folder.

    Raises:
        Exception: Whatever transformers raise where there is none, or of no known kind.
    """
    return AutoConfig.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)


def without_weights(config: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model on the meta device: for whatever asks only for its config, type and layers.

    Args:
        config: Of transformers.
        dtype: What it is going to compute in. None: as the config says.

    Raises:
        Exception: Whatever transformers raise for a model that cannot be built.
    """
    kind = {} if dtype is None else {"dtype": dtype}
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=False, **kind
        )
    return model


def _decoder_layers(model: Any) -> list[nn.Module]:
    """The longest list of modules within the part that reads text."""
    decoder = model.get_decoder()
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def _linears(root: nn.Module) -> Iterator[tuple[str, nn.Module, Linear]]:
    """Name, base and description of each linear layer."""
    for name, module in root.named_modules():
        parent, _, last = name.rpartition(".")
        is_adapted = isinstance(module, LoraLayer)
        if not is_adapted and (last == "base_layer" or ".lora_" in name):
            continue
        plain: Any = module.get_base_layer() if is_adapted else module
        weight = getattr(plain, "weight", None)
        is_conv1d = type(plain).__name__ == "Conv1D"
        if (not isinstance(plain, nn.Linear) and not is_conv1d) or weight is None:
            continue
        outputs, inputs = reversed(weight.shape) if is_conv1d else weight.shape
        rank = next(iter(module.r.values()), 0) if isinstance(module, LoraLayer) else 0
        reads = _reads(parent, last)
        yield name, plain, Linear(last, inputs, outputs, rank, reads)


def _reads(parent: str, name: str) -> Reads:
    if name == "c_proj":  # GPT-2 names both halves' last layer so
        return "product" if parent.endswith("mlp") else "heads"
    return READS.get(name, "own")


def _describe_layer(layer: nn.Module, text: Any, widths: Mapping[str, int]) -> DecoderLayer:
    linears = tuple(linear for _, _, linear in _linears(layer))
    inner = [linear.inputs for linear in linears if linear.reads == "product"]
    experts = 1
    if not inner or _has_stacks(layer):
        size = _first_of(text, "moe_intermediate_size", "intermediate_size")
        inner = [size or 4 * text.hidden_size]
        experts = _first_of(text, "num_experts_per_tok") or 1
    is_gated = any("gate" in linear.name for linear in linears) or _has_stacks(layer)
    return DecoderLayer(
        linears=linears,
        norms=tuple(_norms(layer, widths)),
        inner=inner[0],
        factors=3 if is_gated else _factors(text),
        experts=experts,
    )


def _factors(text: Any) -> int:
    """Of an activation without a gate: itself, or what it is composed of."""
    name = str(_first_of(text, "hidden_act", "activation_function", "hidden_activation"))
    return 4 if name in COMPOSED else 1


COMPOSED = frozenset({"gelu_new", "gelu_fast", "quick_gelu", "gelu_python", "relu2"})
"""Activations that transformers writes out in several products."""


def _logits(head: Any, text: Any) -> int:
    if _first_of(text, "final_logit_softcapping"):
        return 3
    scales = (getattr(text, name, None) for name in ("logits_scaling", "logit_scale"))
    is_plain = type(head) is nn.Linear and head.bias is None
    return 0 if is_plain and all(scale in (None, 1) for scale in scales) else 1


def _first_of(config: Any, *names: str) -> Any:
    """The first of some settings that a config has, and that is not 0."""
    return next((value for name in names if (value := getattr(config, name, None))), None)


def _norms(layer: nn.Module, widths: Mapping[str, int]) -> Iterator[Norm]:
    for name, module in layer.named_modules():
        kind, weight = type(module).__name__, getattr(module, "weight", None)
        if not kind.endswith("Norm") or weight is None:
            continue
        width = weight.numel()
        features = widths.get(name.rpartition(".")[2], width)
        yield Norm(features, max(1, features // width), is_rms=kind.endswith("RMSNorm"))


def _is_known(layer: nn.Module) -> bool:
    found = {linear.reads for _, _, linear in _linears(layer)}
    names = {linear.name for _, _, linear in _linears(layer)}
    is_gated = not names.isdisjoint({"gate_proj", "gate_up_proj"})
    return found == set(READS.values()) and is_gated and not _has_stacks(layer)


def _has_stacks(layer: nn.Module) -> bool:
    """Whether weights of several experts are one tensor."""
    return any(parameter.dim() > 2 for parameter in layer.parameters())
