"""Finding base models in folders, without loading them."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from app.models.schemas import BaseModelInfo, ModelLimits
from app.uris import UriError, file_uri, is_closed, resolve_model_folder

MAX_DEPTH = 3
MAX_FOLDERS = 2000  # looked into per root, so that a root such as a home folder stays quick
MAX_HEADER_BYTES = 64 << 20
READ = {"config.json", "tokenizer_config.json", "chat_template.jinja"}
SKIPPED = {"node_modules", "site-packages", "__pycache__"}


Signature = tuple[tuple[str, int, int], ...]
"""Names, sizes and times of a folder's files: while it stays, so does what they say."""
Described = dict[str, tuple[Signature, BaseModelInfo]]
"""What was found of each model, by its URI."""


def find_models(roots: Sequence[Path], described: Described) -> list[BaseModelInfo]:
    """Those below the roots; ``described``, from the last time, spares reading, and is renewed."""
    found: Described = {}
    for root in roots:
        found |= {entry[1].id: entry for entry in _below(root, roots, described)}
    described.clear()
    described.update(found)
    return [found[name][1] for name in sorted(found)]


def _below(
    root: Path, roots: Sequence[Path], described: Described
) -> Iterator[tuple[Signature, BaseModelInfo]]:
    waiting = [(root, 0)]
    for _ in range(MAX_FOLDERS):
        if not waiting:
            return
        folder, depth = waiting.pop(0)
        with suppress(OSError, ValueError, TypeError, UriError):  # no model, or a broken one
            uri = file_uri(folder)
            target = resolve_model_folder(uri, roots)
            known, signature = described.get(uri), _signature(target)
            if known and known[0] == signature:
                yield known
            else:
                yield signature, _describe(uri, target)
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


def _signature(folder: Path) -> Signature:
    with os.scandir(folder) as entries:
        files = [(entry.name, entry.stat()) for entry in entries if entry.name in READ
                 or entry.name.endswith(".safetensors")]  # fmt: skip
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files))


def _describe(uri: str, folder: Path) -> BaseModelInfo:
    config = _read_object(folder / "config.json")
    text = config.get("text_config")
    if isinstance(text, dict):  # of a model that also sees or hears
        config = text | config
    weights = sorted(folder.glob("*.safetensors"))
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    return BaseModelInfo(
        id=uri,
        source="folder",
        architecture=next(iter(config.get("architectures") or []), None),
        parameters=_parameters(weights),
        size_bytes=sum(path.stat().st_size for path in weights),
        max_positions=positions,
        dtype=config.get("dtype") or config.get("torch_dtype"),
        has_chat_template=_has_chat_template(folder),
        vocabulary=config.get("vocab_size"),
        limits=ModelLimits(max_length=positions),
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
