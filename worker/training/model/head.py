"""A causal language model that answers with the loss, and never makes all logits of a batch."""

import logging
from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from worker.training.model.base import set_mode
from worker.training.model.loss import (
    Scores,
    at_least_float32,
    linear_cross_entropy,
    score,
    score_logits,
)

log = logging.getLogger(__name__)


def answer_with_loss(model: PreTrainedModel) -> bool:
    """Let a model that is called with ``places`` and ``targets`` answer with the loss on them.

    Called otherwise it answers as ever. The loss is computed inside the model's own forward, so
    whatever prepares its weights for that (FSDP2) prepares those of the head too.

    Args:
        model: The base model, with or without an adapter inside.

    Returns:
        Whether the loss is computed from hidden states. Where the head does more than multiply,
        or is adapted itself, the model's own logits are taken at the places that predict.
    """
    if isinstance(model.forward, _LossForward):
        return model.forward.is_fused
    forward = _LossForward(model, is_fused=_has_plain_head(model))
    model.forward = forward  # for this model alone
    return forward.is_fused


class _LossForward:
    def __init__(self, model: PreTrainedModel, *, is_fused: bool) -> None:
        self._model: Any = model
        self._usual = model.forward
        self.is_fused = is_fused

    def __call__(
        self,
        *args: Any,
        places: Int64[Tensor, " targets"] | None = None,
        targets: Int64[Tensor, " targets"] | None = None,
        **inputs: Any,
    ) -> Any:
        if places is None or targets is None:
            return self._usual(*args, **inputs)
        head = self._model.get_output_embeddings()
        if not self.is_fused or type(head) is not nn.Linear:  # an adapter on the head counts
            logits = self._usual(**inputs, use_cache=False).logits
            chosen = at_least_float32(logits.flatten(0, -2).index_select(0, places))
            if not torch.is_grad_enabled():
                return score_logits(chosen, targets)
            return nn.functional.cross_entropy(chosen, targets, reduction="sum")
        hidden = self._model.get_decoder()(**inputs, use_cache=False).last_hidden_state
        chosen = hidden.flatten(0, -2).index_select(0, places)
        del hidden  # the pass is at its highest point now
        weight = head.weight
        if not torch.is_grad_enabled():
            return score(chosen, weight, targets)
        return linear_cross_entropy(chosen, weight, targets)


def summed_loss(model: nn.Module, batch: Any) -> Float[Tensor, ""]:
    """Cross-entropy summed over the batch's targets, in float32.

    Args:
        model: One that `answer_with_loss` has seen.
        batch: A ``Batch``.
    """
    return cast(Tensor, model(**batch.inputs, places=batch.places, targets=batch.targets))


@torch.no_grad()
def scores(model: nn.Module, batch: Any) -> Scores:
    """Summed loss and number of hits on the batch's targets, without gradients."""
    return cast(Scores, model(**batch.inputs, places=batch.places, targets=batch.targets))


@torch.no_grad()
def _has_plain_head(model: Any) -> bool:
    """Whether logits are the last hidden states times the head's frozen weight, tried on a few.

    A cap on the logits, a scale, or a model whose parts have other names is found by computing.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or getattr(head, "bias", None) is not None:
        return False  # an adapted head is one of PEFT's layers
    was_training = model.training
    set_mode(model, training=False)
    ids = torch.arange(8, device=head.weight.device)[None] % len(head.weight)
    try:
        model(input_ids=ids, use_cache=False)  # an 8-bit layer computes otherwise the first time
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        return torch.equal(model(input_ids=ids, use_cache=False).logits, head(hidden))
    except (AttributeError, TypeError, ValueError, NotImplementedError):
        log.info("the loss is computed from the model's own logits", exc_info=True)
        return False
    finally:
        set_mode(model, training=was_training)
