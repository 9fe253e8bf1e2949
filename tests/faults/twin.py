"""What an unbroken run of the tiny trainer gives, computed without running it."""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from typing import Any

WEIGHTS = "adapter_model.safetensors"
WIDTH = 8  # of the layer that the adapter pretends to adapt

Json = dict[str, Any]


def first_state(dataset_sha256: str, seed: int, sigma: float) -> str:
    return hash_of(f"{dataset_sha256} {seed} {float(sigma)!r}")


def next_state(state: str, step: int) -> str:
    """After step ``step``, counted from 1."""
    return hash_of(f"{state} {step}")


def chain(dataset_sha256: str, seed: int, sigma: float, steps: int) -> list[str]:
    """The states of an unbroken run: before the first step, and after each."""
    states = [first_state(dataset_sha256, seed, sigma)]
    for step in range(1, steps + 1):
        states.append(next_state(states[-1], step))
    return states


def total_steps(training: Mapping[str, Any]) -> int:
    """Of a job's ``spec.training``. There is no epoch here: one is taken for ten steps."""
    steps: int | None = training["max_steps"]
    return steps or math.ceil(10 * training["epochs"])


def adapter_files(state: str, *, rank: int, base_model: str) -> dict[str, bytes]:
    """The finished adapter after a final state."""
    config = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "peft_type": "LORA",
        "r": rank,
        "target_modules": ["q_proj"],
    }
    return {
        WEIGHTS: weights(state, rank),
        "adapter_config.json": (json.dumps(config, indent=2) + "\n").encode(),
        "README.md": f"# LoRA adapter for {base_model}\n\n{state}\n".encode(),
    }


def weights(state: str, rank: int) -> bytes:
    """Two matrices in the format of safetensors: its header's length, its header, its numbers."""
    layer, size = "base_model.model.q_proj", rank * WIDTH
    header = {
        f"{layer}.lora_A.weight": _tensor([rank, WIDTH], 0, 4 * size),
        f"{layer}.lora_B.weight": _tensor([WIDTH, rank], 4 * size, 8 * size),
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    source = bytes.fromhex(state)
    numbers = [source[index % len(source)] / 256 for index in range(2 * size)]
    return struct.pack("<Q", len(text)) + text + struct.pack(f"<{2 * size}f", *numbers)


def _tensor(shape: list[int], start: int, end: int) -> Json:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
