"""Tiny models without a trained weight, and what tests compare of a model."""

import hashlib
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCAB = 61


def llama(**sizes: Any) -> nn.Module:
    """A Llama; sizes that are not given are as small as they can be."""
    tiny = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
    }
    return LlamaForCausalLM(LlamaConfig(**(tiny | sizes)))


def wide_llama() -> nn.Module:
    """A Llama with long rows, some of whose layers one launch can serve together."""
    return llama(hidden_size=2048, intermediate_size=40, num_hidden_layers=1, head_dim=16)


def gpt2(**sizes: Any) -> nn.Module:
    """A GPT-2 without dropout."""
    tiny = {
        "vocab_size": VOCAB,
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 32,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPT2LMHeadModel(GPT2Config(**(tiny | sizes)))


def base_hash(model: nn.Module) -> str:
    """A hash of every byte of the frozen weights, and of their names."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
