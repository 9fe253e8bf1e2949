"""Models of real and of small sizes, described without weights."""

from functools import cache
from typing import Any

from worker.training.config import Lora
from worker.training.model.shape import ModelShape, shape_of

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EIGHT_B = {
    **SIZES,
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
THREE_B = {**EIGHT_B, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28}
THREE_B |= {"num_attention_heads": 24, "tie_word_embeddings": True}
ONE_B = {**THREE_B, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32}
FOUR_B = {**THREE_B, "vocab_size": 151_936, "hidden_size": 2560, "intermediate_size": 9728}
FOUR_B |= {"num_hidden_layers": 36, "num_attention_heads": 32, "head_dim": 128}
LORA = Lora(rank=4, alpha=8.0)


def rank_16(config: Any, sizes: dict[str, Any]) -> ModelShape:
    return _rank_16(config, tuple(sizes.items()))


@cache
def _rank_16(config: Any, sizes: tuple[tuple[str, Any], ...]) -> ModelShape:
    return shape_of(config(**dict(sizes)), Lora(rank=16, alpha=32.0))
