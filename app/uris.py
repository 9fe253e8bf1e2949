"""URIs of files and base models on this machine: what they may point at, and where that is.

The API resolves a URI when a job is submitted, the worker again when it fetches: both here. What
datasets may be beside files is in app/datasets/uris.py.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}(?<![.-])")
FILE_URI = re.compile(
    r"""file:
    (?://(?:localhost)?(?=/))?                        # no host, or this one
    (?P<path>(?!//)(?:[^?\#%\x00-\x1f]|%[0-9A-Fa-f]{2})+)""",
    re.VERBOSE,
)
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class UriError(Exception):
    """A URI that cannot be used.

    code: uri_malformed, uri_scheme_unsupported, path_not_allowed, dataset_not_found,
    base_model_not_found, base_model_unusable, base_model_not_allowed; of datasets elsewhere
    bucket_not_allowed, dataset_not_allowed, and those of app/net/errors.py.
    """

    def __init__(self, code: str, detail: str, hint: str | None = None) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.hint = hint


class Roots(list[Path]):
    """Folders below which ``file:`` URIs may point, though never into the closed one.

    That is the service's own data folder: key, database, other people's uploads.
    """

    def __init__(self, folders: Iterable[Path], closed: Path) -> None:
        super().__init__(folders)
        self.closed = closed


def file_uri(path: Path) -> str:
    """The URI of a path, with the signs quoted that would mean something else in a URI."""
    return f"file:{quote(os.fsencode(path))}"


def resolve_dataset_file(uri: str, roots: Sequence[Path]) -> Path:
    """The file behind a ``file:`` URI, if it lies below one of the roots."""
    path = _resolve(uri, roots, setting="FLATLORA_DATASET_ROOTS")
    if path is None:
        raise UriError("dataset_not_found", f"There is no file {uri}.", "Check the path.")
    if not path.is_file():
        raise UriError("dataset_not_found", f"{uri} is not a file.", "Name one file of rows.")
    if not os.access(path, os.R_OK):
        raise UriError("dataset_not_found", f"The service may not read {uri}.", "Check its rights.")
    return path


def resolve_model_folder(uri: str, roots: Sequence[Path]) -> Path:
    """The folder behind a ``file:`` URI, if a base model can be loaded from it."""
    path = _resolve(uri, roots, setting="FLATLORA_MODEL_ROOTS")
    if path is None or not path.is_dir():
        raise UriError(
            "base_model_not_found", f"There is no folder {uri}.", "GET /models lists them."
        )
    if not os.access(path, os.R_OK | os.X_OK):
        raise UriError(
            "base_model_unusable", f"The service may not read {uri}.", "Check its rights."
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


def is_hub_id(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and ".." not in name and "--" not in name


def is_listed(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name of the hub fits one of the patterns: ``*`` is any run of characters."""
    regexes = [re.escape(pattern).replace(r"\*", ".*") for pattern in patterns]
    return any(re.fullmatch(regex, name) for regex in regexes)


def check_hub_id(name: str, allowed: Sequence[str]) -> None:
    """That a name can be a model of the hub, and one that this service may use."""
    if not is_hub_id(name):
        raise UriError(
            "base_model_not_found",
            f"{name!r} is neither a hub id nor a file: URI.",
            "Write org/name, or file: and a folder below a configured root.",
        )
    if not is_listed(name, allowed):
        raise UriError(
            "base_model_not_allowed",
            f"{name} is not among the hub models that this service may use: {_list(allowed)}.",
            "Add it to FLATLORA_HUB_MODELS, or name another: GET /models lists them.",
        )


def _resolve(uri: str, roots: Sequence[Path], *, setting: str) -> Path | None:
    """The real path below a root. None if it is allowed and there is nothing there.

    A relative path is looked for below each root in turn.
    """
    path = _path_of(uri)
    folders = [Path(os.path.realpath(root)) for root in roots]
    candidates = [path] if path.is_absolute() else [folder / path for folder in folders]
    real = [Path(os.path.realpath(candidate)) for candidate in candidates]
    below = [
        candidate for candidate in real if any(candidate.is_relative_to(root) for root in folders)
    ]
    if not below:
        raise UriError(
            "path_not_allowed",
            f"{uri} lies outside the folders that this service may read: {_list(folders)}.",
            f"Move it below one of them, or add its folder to {setting}.",
        )
    allowed = [candidate for candidate in below if not is_closed(candidate, roots)]
    if not allowed:
        raise UriError(
            "path_not_allowed",
            f"{uri} lies in the service's own data folder, from which nothing is read.",
            "Move it out of there; rows can also be uploaded with POST /datasets.",
        )
    # Not Path.exists(): that raises where a name is too long or a folder is closed to us.
    return next((candidate for candidate in allowed if os.path.exists(candidate)), None)  # noqa: PTH110


def is_closed(path: Path, roots: Sequence[Path]) -> bool:
    """Whether a real path lies in the closed folder."""
    return isinstance(roots, Roots) and path.is_relative_to(os.path.realpath(roots.closed))


def _path_of(uri: str) -> Path:
    match = FILE_URI.fullmatch(uri)
    text = unquote(match["path"], errors="surrogateescape") if match else ""
    if not text or CONTROL.search(text):
        raise UriError(
            "uri_malformed",
            f"{uri!r} is not the file: URI of a path on this machine.",
            "Write file:folder/rows.jsonl or file:///folder/rows.jsonl; the signs ?, # and % in a "
            "name are written %3F, %23 and %25.",
        )
    return Path(text)


def _list(things: Sequence[object]) -> str:
    return ", ".join(map(str, things)) or "none"
