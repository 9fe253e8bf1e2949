"""URIs of datasets and base models: what they may point at, and where that is.

The API resolves a URI when a job is submitted, the worker again when it fetches: both here.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

DATASET_SCHEMES = ("file:", "dataset:")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
UPLOAD_ID = re.compile(r"dataset:ds_[0-9a-f]{32}")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class UriError(Exception):
    """A URI that cannot be used.

    code: uri_malformed, uri_scheme_unsupported, path_not_allowed, dataset_not_found,
    base_model_not_found or base_model_unusable.
    """

    def __init__(self, code: str, detail: str, hint: str | None = None) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.hint = hint


def resolve_dataset_file(uri: str, roots: Sequence[Path]) -> Path:
    """The file behind a ``file:`` URI, if it lies below one of the roots."""
    path = _resolve(uri, roots, setting="FLATLORA_DATASET_ROOTS")
    if path is None or not path.exists():
        raise UriError("dataset_not_found", f"There is no file {uri}.", "Check the path.")
    if not path.is_file():
        raise UriError("dataset_not_found", f"{uri} is not a file.", "Name one file of rows.")
    return path


def resolve_model_folder(uri: str, roots: Sequence[Path]) -> Path:
    """The folder behind a ``file:`` URI, if a base model can be loaded from it."""
    path = _resolve(uri, roots, setting="FLATLORA_MODEL_ROOTS")
    if path is None or not path.is_dir():
        raise UriError(
            "base_model_not_found", f"There is no folder {uri}.", "GET /models lists them."
        )
    if not (path / "config.json").is_file():
        raise UriError(
            "base_model_unusable",
            f"{uri} holds no config.json.",
            "Name the folder that save_pretrained() wrote.",
        )
    if not any(path.glob("*.safetensors")):
        pickled = any(found for pattern in PICKLES for found in path.glob(pattern))
        raise UriError(
            "base_model_unusable",
            f"{uri} holds no *.safetensors" + (", only pickled weights." if pickled else "."),
            "Save the weights as safetensors: pickles are never opened.",
        )
    return path


def check_hub_id(name: str, allowed: Sequence[str]) -> None:
    """That a name can be a model of the hub, and one that this service may use."""
    if not HUB_ID.fullmatch(name) or ".." in name:
        raise UriError(
            "base_model_not_found",
            f"{name!r} is neither a hub id nor a file: URI.",
            "Write org/name, or file: and a folder below a configured root.",
        )
    patterns = [re.escape(pattern).replace(r"\*", ".*") for pattern in allowed]
    if not any(re.fullmatch(pattern, name) for pattern in patterns):
        raise UriError(
            "base_model_not_allowed",
            f"{name} is not among the hub models that this service may use.",
            "GET /models lists them; FLATLORA_HUB_MODELS sets them.",
        )


def check_dataset_scheme(uri: str) -> None:
    if not uri.startswith(DATASET_SCHEMES):
        raise UriError(
            "uri_scheme_unsupported",
            f"{uri!r} does not begin with one of {', '.join(DATASET_SCHEMES)}.",
            "Name a file below a configured root, or upload one with POST /datasets.",
        )


def _resolve(uri: str, roots: Sequence[Path], *, setting: str) -> Path | None:
    """The real path below a root. None if it is allowed and there is nothing there.

    A relative path is looked for below each root in turn.
    """
    path = _path_of(uri)
    candidates = [path] if path.is_absolute() else [root / path for root in roots]
    real = [Path(os.path.realpath(candidate)) for candidate in candidates]
    allowed = [
        candidate for candidate in real if any(candidate.is_relative_to(root) for root in roots)
    ]
    if not allowed:
        folders = ", ".join(str(root) for root in roots)
        raise UriError(
            "path_not_allowed",
            f"{uri} lies outside the folders that this service may read: {folders}.",
            f"Move it below one of them, or add its folder to {setting}.",
        )
    return next((candidate for candidate in allowed if candidate.exists()), None)


def _path_of(uri: str) -> Path:
    parts = urlsplit(uri)
    text = unquote(parts.path)
    if parts.scheme != "file" or parts.netloc not in {"", "localhost"} or parts.query or not text:
        raise UriError(
            "uri_malformed",
            f"{uri!r} is not a file: URI.",
            "Write file:rows.jsonl or file:///rows.",
        )
    if "\0" in text or parts.fragment:
        raise UriError("uri_malformed", f"{uri!r} holds a character that no path has.")
    return Path(text)
