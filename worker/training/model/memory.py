"""How much memory a run needs at its peak, said before any of it is taken.

What autograd keeps is counted tensor by tensor, as the layers in `worker.training.model` keep it:
every norm its input, attention what it reads and writes, an adapter its layer's input once for all
layers that share it, an activation what enters it. What is there for a moment only is counted for
the three moments of a pass that can be the highest: the loss, and the backward passes of an MLP and
of attention in the last layer, when all that was kept is still there.
"""

from dataclasses import dataclass
from typing import Any

import torch

from worker.training.model.loss import chunk_rows, liger_chunk
from worker.training.model.shape import DecoderLayer, Linear, ModelShape, Norm, Reads
from worker.training.plan import Plan

MOMENTS = 16
"""Bytes per parameter of the adapter in float32: weight, gradient and two moments of AdamW."""

STORED = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}
"""Bytes per weight: codes, and the scales of blocks of 64, which are codes of blocks of 256."""

LIBRARIES = 64 << 20
"""What cuBLAS works in, and what is too small to be counted here."""

MULTIPROCESSORS = 132
"""Of a large GPU: a repeatable backward pass of attention has a buffer for each that it keeps busy,
and heads of rows are what it divides among them."""

FLOAT = 4


@dataclass(frozen=True)
class Estimate:
    """Bytes at the highest point of a run.

    Attributes:
        weights: The base model's.
        adapter: Its weights, their gradients and the optimizer's moments.
        noise: Noisy weights, and what their strength is computed from.
        activations: What the backward pass needs of the forward pass, and makes of it.
        loss: What is there beside it for the head and the loss, or beside the last layer.
        libraries: What the libraries take for themselves.
        is_rough: Whether it rests on parts that were not recognised, or on a CPU.
    """

    weights: int
    adapter: int
    noise: int
    activations: int
    loss: int
    libraries: int
    is_rough: bool = False

    @property
    def total(self) -> int:
        """All of it."""
        parts = self.weights, self.adapter, self.noise, self.activations, self.loss, self.libraries
        return sum(parts)

    def to_json(self) -> dict[str, Any]:
        """As the report has it."""
        return {
            "weights_bytes": self.weights,
            "adapter_bytes": self.adapter,
            "noise_bytes": self.noise,
            "activations_bytes": self.activations,
            "loss_bytes": self.loss,
            "libraries_bytes": self.libraries,
            "total_bytes": self.total,
            "is_rough": self.is_rough,
        }

    def in_words(self) -> str:
        """For a person."""
        parts = {
            "weights": self.weights,
            "adapter": self.adapter,
            "noise": self.noise,
            "activations": self.activations + self.loss,
        }
        named = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
        return f"{'roughly' if self.is_rough else 'about'} {gib(self.total)}: {named}"


def gib(size: float) -> str:
    """Bytes for a person."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.0f} MiB"


def estimate(
    shape: ModelShape,
    plan: Plan,
    *,
    dtype: torch.dtype,
    tokens_in_loss_per_pass: int | None = None,
    on_gpu: bool,
    tokens_per_pass: int | None = None,
    is_perturbed: bool = True,
    shards: int = 1,
) -> Estimate:
    """What a run needs at its peak.

    Args:
        shape: The model with its adapter.
        plan: How a step is computed.
        dtype: What the base model computes in.
        tokens_in_loss_per_pass: Targets of the largest pass. None: all of its tokens.
        on_gpu: Whether fused kernels compute; else what transformers does on a CPU.
        tokens_per_pass: Tokens of the largest pass, padding included. None: as many as the plan
            allows.
        is_perturbed: Whether there is noise: sigma is above 0.
        shards: Ranks that the base's weights are divided among.
    """
    tokens = tokens_per_pass or plan.max_length * plan.micro_batch_size
    targets = tokens if tokens_in_loss_per_pass is None else min(tokens, tokens_in_loss_per_pass)
    item = dtype.itemsize
    kept = _Kept(shape, plan, item, tokens, on_gpu=on_gpu)
    activations, beside = kept.peak(_loss(shape, item, tokens, targets, on_gpu=on_gpu))
    return Estimate(
        weights=_weights(shape, item, shards),
        adapter=shape.adapter * MOMENTS,
        noise=_noise(shape, plan, item) if is_perturbed else _dequantised(shape, item),
        activations=activations,
        loss=beside,
        libraries=LIBRARIES if on_gpu else 0,
        is_rough=not (shape.is_known and on_gpu and plan.varlen and shape.is_fused),
    )


def _weights(shape: ModelShape, item: int, shards: int) -> int:
    stored = item * shape.parameters
    if shape.quantization:
        codes = sum(_stored(shape, linear) for linear in shape.linears)
        stored += codes - item * sum(linear.size for linear in shape.linears)
    if shards == 1:
        return stored
    # whole at a time: the layer that computes, the one that is fetched meanwhile, and the head
    inside = sum(linear.size for layer in shape.layers for linear in layer.linears)
    head = item * (shape.parameters - inside)
    return stored // shards + 2 * (stored - head) // max(1, len(shape.layers)) + head


def _stored(shape: ModelShape, linear: Linear) -> int:
    assert shape.quantization
    scales = FLOAT * linear.outputs if shape.quantization == "8bit" else 0
    return round(linear.size * STORED[shape.quantization]) + scales


def _noise(shape: ModelShape, plan: Plan, item: int) -> int:
    """Noisy weights, the squared norms of clean rows and the strength of each row's noise."""
    sizes = [item * linear.size for linear in shape.targets]
    rows = sum(linear.outputs for linear in shape.targets)
    workspace = max(sizes, default=0)
    if plan.perturbation_memory == "streamed":
        kept = workspace
    else:  # of a quantised weight the strength is computed from a dense one
        kept = sum(sizes) + (workspace if shape.quantization else 0)
    return kept + 2 * FLOAT * rows


def _dequantised(shape: ModelShape, item: int) -> int:
    """The largest weight, as it is for a product with it."""
    if not shape.quantization:
        return 0
    return item * max((linear.size for linear in shape.linears), default=0)


def _loss(shape: ModelShape, item: int, tokens: int, targets: int, *, on_gpu: bool) -> int:
    """The last norm's output, hidden states at targets with their gradient, and some logits."""
    vocabulary, hidden = shape.vocabulary, shape.hidden
    if shape.logits:  # those of all tokens, and in float32 those of targets with two gradients
        logits = vocabulary * (shape.logits * tokens * item + 3 * FLOAT * targets)
    elif on_gpu:
        logits = liger_chunk(targets, vocabulary, hidden).rows * vocabulary * item
    else:
        logits = min(targets, chunk_rows(vocabulary)) * vocabulary * (item + 2 * FLOAT)
    return item * hidden * (tokens + 2 * targets) + logits


class _Kept:
    """What a pass keeps, and what is there beside it, all in bytes.

    Args:
        shape: The model.
        plan: How a step is computed.
        item: Bytes of a number.
        tokens: Of the pass.
        on_gpu: Whether fused kernels compute.
    """

    def __init__(
        self, shape: ModelShape, plan: Plan, item: int, tokens: int, *, on_gpu: bool
    ) -> None:
        self._shape, self._plan, self._item, self._tokens = shape, plan, item, tokens
        self._on_gpu = on_gpu
        self._is_fused = on_gpu and shape.is_fused

    def in_layers(self) -> int:
        """What all layers keep."""
        return sum(sum(self._layer(layer)) for layer in self._shape.layers)

    def peak(self, loss: int) -> tuple[int, int]:
        """What is kept at the highest moment, and what is there beside it.

        Args:
            loss: Bytes that the head and the loss need for a moment.
        """
        layers = [self._layer(layer) for layer in self._shape.layers]
        stream = self._tokens * self._shape.hidden * self._item
        last = self._norm(Norm(self._shape.hidden, 1, is_rms=True)) * self._tokens
        if self._plan.activation_checkpointing:
            kept, computed = stream * len(layers), max((sum(layer) for layer in layers), default=0)
        else:
            kept, computed = self.in_layers(), 0
        # freed one half of the layer after the other
        of_mlp = max((mlp for _, mlp in layers), default=0)
        mlp = computed + stream + self._largest_mlp_gradient()
        attention = computed - of_mlp + stream + self._attention_gradient()
        highest = max(last + loss, mlp, attention)
        beside = max(0, highest - computed)
        return kept + computed, beside

    def _layer(self, layer: DecoderLayer) -> tuple[int, int]:
        """Bytes that attention and the MLP of a layer keep, with half of its norms each."""
        norms = sum(map(self._norm, layer.norms)) / 2
        attention = norms + self._attention() + self._adapters(layer, ("attention", "heads"))
        inputs = self._adapters(layer, ("mlp", "product", "own"))
        mlp = norms + layer.experts * (inputs + self._mlp(layer))
        return round(attention * self._tokens) + self._mask(), round(mlp * self._tokens)

    def _norm(self, norm: Norm) -> int:
        """Its input, per token; in float32 where it is computed in plain PyTorch."""
        is_cast = norm.is_rms and not self._is_fused
        return norm.features * (FLOAT if is_cast else self._item) + FLOAT * norm.rows

    def _attention(self) -> int:
        """Queries, keys, values and output per token, and a sum for each head."""
        shape = self._shape
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        if not self._plan.varlen:  # with a mask, keys and values are repeated for each query head
            keys = queries
        return (2 * queries + 2 * keys) * self._item + FLOAT * shape.heads

    def _mask(self) -> int:
        """Scores that are added, once for all heads; where attention keeps its own, all of them."""
        if self._plan.varlen:
            return 0
        scores = self._tokens * self._plan.max_length
        kept = 2 * FLOAT * self._shape.heads if self._shape.keeps_scores else 0
        return scores * (self._item + kept)

    def _adapters(self, layer: DecoderLayer, read: tuple[Reads, ...]) -> float:
        """Inputs of adapted layers per token, each once, and what they are reduced to."""
        adapted = [linear for linear in layer.linears if linear.rank and linear.reads in read]
        reduced = sum(linear.rank for linear in adapted) * self._item
        if self._shape.dropout:  # each has an input of its own, and what was dropped of it
            mask = 1 if self._on_gpu else self._item
            return reduced + sum(linear.inputs for linear in adapted) * (self._item + mask)
        shared = {linear.reads: linear.inputs for linear in adapted if linear.reads != "own"}
        shared.pop("heads", None)  # attention keeps what it has written
        own = sum(linear.inputs + linear.outputs for linear in adapted if linear.reads == "own")
        return reduced + (sum(shared.values()) + own) * self._item

    def _mlp(self, layer: DecoderLayer) -> int:
        """What its activation keeps per token: what it multiplies."""
        factors = min(2, layer.factors) if self._is_fused else layer.factors
        return factors * layer.inner * self._item

    def _largest_mlp_gradient(self) -> int:
        return (
            self._item * self._tokens * max((each.inner for each in self._shape.layers), default=0)
        )

    def _attention_gradient(self) -> int:
        """Of queries in float32, of keys and values for each query head, and of all three."""
        shape = self._shape
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        copied = self._tokens
        if self._on_gpu:
            copied += self._plan.max_length * MULTIPROCESSORS // shape.heads
        of_all = self._tokens * self._item * (3 * queries + 2 * keys)
        return FLOAT * queries * copied + of_all


def kept_per_token(shape: ModelShape, plan: Plan, *, dtype: torch.dtype, on_gpu: bool) -> float:
    """Bytes that a token's forward pass writes for its backward pass, checkpointing or not."""
    tokens = plan.max_length * plan.micro_batch_size
    return _Kept(shape, plan, dtype.itemsize, tokens, on_gpu=on_gpu).in_layers() / tokens
