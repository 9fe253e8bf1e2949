"""Attention over sequences of several rows that do not see each other.

On a GPU one kernel takes all rows of a batch end to end, with the places where they begin: no mask
is made and no padding computed. Elsewhere transformers makes a block-diagonal mask from positions
that begin anew with each row.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

VARLEN = "flatlora_varlen"


def use_varlen_attention(model: PreTrainedModel, device: torch.device) -> bool:
    """Let a model on a GPU attend over rows end to end, if all of its attention can.

    Batches then must name where rows begin (``cu_seq_lens_q``, ``max_length_q``), and hold no
    padding.

    Args:
        model: The base model.
        device: Where it is going to compute.

    Returns:
        Whether it does now. Not on a CPU, not where the type is float32, nor where the model caps
        its attention scores, or adds to them.
    """
    if not can_use_varlen(model, device):
        return False
    AttentionInterface.register(VARLEN, _attend)
    AttentionMaskInterface.register(VARLEN, _no_mask)
    try:
        model.set_attn_implementation(VARLEN)
    except ValueError:  # a model with attention of its own
        return False
    return True


def can_use_varlen(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether `use_varlen_attention` serves a model."""
    if device.type != "cuda" or model.dtype not in (torch.bfloat16, torch.float16):
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    config: Any = model.config.get_text_config()
    if config.model_type not in ISOLATES_ROWS or getattr(config, "attn_logit_softcapping", None):
        return False
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return bool(head % 8 == 0 and head <= 256)


ISOLATES_ROWS = frozenset(
    {
        "gemma", "gemma3_text", "granite", "llama", "ministral", "mistral", "olmo2", "olmo3",
        "phi3", "qwen2", "qwen3", "smollm3",
    }
)  # fmt: skip
"""Models whose layers mix tokens in attention alone, which is given each row's positions."""


def _attend(
    _module: nn.Module,
    query: Float[Tensor, "rows heads length dim"],
    key: Float[Tensor, "rows kv_heads length dim"],
    value: Float[Tensor, "rows kv_heads length dim"],
    _attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "rows length heads dim"], None]:
    """Attention as transformers calls it; each sequence is a row where nobody says otherwise."""
    rows, _, length, _ = query.shape
    longest = kwargs.get("max_length_q", length)
    starts = kwargs.get("cu_seq_lens_q")
    if starts is None:
        ends = (rows + 1) * length
        starts = torch.arange(0, ends, length, dtype=torch.int32, device=query.device)
    # a selection's backward pass would fill and copy, a view's does not
    q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
    # sees itself and the window - 1 tokens before it
    left = -1 if sliding_window is None else sliding_window - 1
    out = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, longest, longest, dropout, True, False,
        scale=scaling, window_size_left=left, window_size_right=0 if left >= 0 else -1,
    )[0]  # fmt: skip
    return out.view(rows, length, *out.shape[1:]), None


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """Rows are kept apart by where they begin."""
