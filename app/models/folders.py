"""Finding base models in folders, without loading them."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from app.models.schemas import BaseModelInfo

MAX_DEPTH = 3
MAX_FOLDERS = 2000  # looked into per root, so that a root such as a home folder stays quick
SKIPPED = {"node_modules", "site-packages", "__pycache__"}


def find_models(roots: Sequence[Path]) -> list[BaseModelInfo]:
    found = {model.id: model for root in roots for model in _below(root)}
    return [found[name] for name in sorted(found)]


def _below(root: Path) -> Iterator[BaseModelInfo]:
    waiting = [(root, 0)]
    looked_into = 0
    while waiting and looked_into < MAX_FOLDERS:
        folder, depth = waiting.pop(0)
        looked_into += 1
        with suppress(OSError, ValueError):  # unreadable, or its config.json is not JSON
            if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
                yield _describe(folder)
                continue
        if depth < MAX_DEPTH:
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


def _describe(folder: Path) -> BaseModelInfo:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return BaseModelInfo(
        id=f"file:{folder}",
        source="folder",
        architecture=next(iter(config.get("architectures") or []), None),
        dtype=config.get("dtype") or config.get("torch_dtype"),
        max_positions=config.get("max_position_embeddings"),
        vocabulary=config.get("vocab_size"),
        size_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        has_chat_template=_has_chat_template(folder),
    )


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    with suppress(OSError, ValueError):
        return "chat_template" in json.loads((folder / "tokenizer_config.json").read_text())
    return False
