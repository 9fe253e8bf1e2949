"""Rows of several lengths, and small models of the families whose rows can share a sequence."""

from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from worker.training.data.examples import Example
from worker.training.model.head import answer_with_loss

VOCABULARY = 64


def make_rows(*lengths: int) -> list[Example]:
    random = np.random.default_rng(0)
    return [
        Example(random.integers(3, VOCABULARY, n).astype(np.int32), np.arange(n) >= n // 2)
        for n in lengths
    ]


ROWS = make_rows(3, 17, 40, 8, 8, 1, 25)


def make_model(family: str) -> PreTrainedModel:
    """A few thousand weights in float64, with a window shorter than the rows where it has one."""
    kind: Any = CONFIG_MAPPING[family]
    config = kind(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=6,
        pad_token_id=0,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float64
        )
    answer_with_loss(model)
    model.train(mode=False)
    return model
