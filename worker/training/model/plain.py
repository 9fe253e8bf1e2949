"""What a base model's folder must not ask for: code of its own, pickles, files elsewhere.

transformers is told to run no code and to read safetensors alone. That covers the file that it
looks for first; an index of parts is believed whatever it names, and so is a kernel in a config.
"""

import json
from collections.abc import Iterator
from typing import Any

from worker.training.config import BaseModel
from worker.training.errors import BaseModelUnavailable

INDEX = "*.safetensors.index.json"
WEIGHTS = ".safetensors"
DESCRIBING = ("config.json", "tokenizer_config.json", "generation_config.json")
IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation")


def check_plain(base: BaseModel) -> None:
    """That a folder's weights are safetensors within it, and no kernel is to be fetched.

    Raises:
        BaseModelUnavailable: With the name that is not allowed.
    """
    for name in _named_weights(base):
        if not isinstance(name, str) or not name.endswith(WEIGHTS) or "/" in name or "\\" in name:
            raise BaseModelUnavailable(
                f"{base.name} names {str(name)[:200]!r} as a file of its weights.",
                "Expected *.safetensors in the folder itself: pickles are never opened, nor files "
                "elsewhere.",
            )
    for name in _implementations(_object(base, "config.json")):
        if "/" in str(name):
            raise BaseModelUnavailable(
                f"{base.name} asks for the code {str(name)[:200]!r} of the hub.",
                "Take it out of config.json: code of a model never runs.",
            )


def explained(base: BaseModel, otherwise: BaseModelUnavailable) -> BaseModelUnavailable:
    """Why a model cannot be loaded: for want of code that it brings along, or as given.

    Args:
        base: The base model.
        otherwise: What is said of one that brings none.
    """
    if not any("auto_map" in _object(base, name) for name in DESCRIBING):
        return otherwise
    return BaseModelUnavailable(
        f"{base.name} needs Python code of its own (auto_map), and transformers has none for it.",
        "Code of a model never runs here: name a model that transformers itself knows.",
    )


def _named_weights(base: BaseModel) -> Iterator[Any]:
    if explicit := _object(base, "config.json").get("transformers_weights"):
        yield str(explicit).removesuffix(".index.json")
    for path in sorted(base.path.glob(INDEX)):
        found = _object(base, path.name).get("weight_map")
        yield from found.values() if isinstance(found, dict) else ()


def _implementations(config: dict[str, Any]) -> Iterator[Any]:
    """Of a config and of those in it."""
    for name, value in config.items():
        if name in IMPLEMENTATIONS:
            yield from value.values() if isinstance(value, dict) else [value]
        elif isinstance(value, dict):
            yield from _implementations(value)


def _object(base: BaseModel, name: str) -> dict[str, Any]:
    try:
        found = json.loads((base.path / name).read_text())
    except (OSError, ValueError, RecursionError):  # whoever needs it says so
        return {}
    return found if isinstance(found, dict) else {}
