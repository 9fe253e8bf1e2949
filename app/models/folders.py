"""Finding base models in folders, without loading them."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from app.models.schemas import BaseModelInfo
from app.uris import UriError, file_uri, is_closed, resolve_model_folder

MAX_DEPTH = 3
MAX_FOLDERS = 2000  # looked into per root, so that a root such as a home folder stays quick
MAX_HEADER_BYTES = 64 << 20
SKIPPED = {"node_modules", "site-packages", "__pycache__"}


def find_models(roots: Sequence[Path]) -> list[BaseModelInfo]:
    found = {model.id: model for root in roots for model in _below(root, roots)}
    return [found[name] for name in sorted(found)]


def _below(root: Path, roots: Sequence[Path]) -> Iterator[BaseModelInfo]:
    waiting = [(root, 0)]
    for _ in range(MAX_FOLDERS):
        if not waiting:
            return
        folder, depth = waiting.pop(0)
        with suppress(OSError, ValueError, TypeError, UriError):  # no model, or a broken one
            uri = file_uri(folder)
            yield _describe(uri, resolve_model_folder(uri, roots))
            continue
        if depth < MAX_DEPTH and not is_closed(folder, roots):
            waiting += [(child, depth + 1) for child in _folders_in(folder)]


def _folders_in(folder: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(
            child
            for child in folder.iterdir()
            if child.is_dir()
            and not child.is_symlink()
            and not child.name.startswith(".")
            and child.name not in SKIPPED
        )
    return []


def _describe(uri: str, folder: Path) -> BaseModelInfo:
    config = _read_object(folder / "config.json")
    text = config.get("text_config")
    if isinstance(text, dict):  # of a model that also sees or hears
        config = text | config
    weights = sorted(folder.glob("*.safetensors"))
    return BaseModelInfo(
        id=uri,
        source="folder",
        architecture=next(iter(config.get("architectures") or []), None),
        parameters=_parameters(weights),
        size_bytes=sum(path.stat().st_size for path in weights),
        max_positions=config.get("max_position_embeddings") or config.get("n_positions"),
        dtype=config.get("dtype") or config.get("torch_dtype"),
        has_chat_template=_has_chat_template(folder),
        vocabulary=config.get("vocab_size"),
    )


def _parameters(weights: Sequence[Path]) -> int | None:
    """Numbers in the weights, by the shapes in the files' headers."""
    total = 0
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        for path in weights:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > MAX_HEADER_BYTES:
                    return None
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            total += sum(math.prod(tensor["shape"]) for tensor in header.values())
        return total
    return None


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    with suppress(OSError, ValueError):
        return "chat_template" in _read_object(folder / "tokenizer_config.json")
    return False


def _read_object(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no object")
    return found
