"""Fetching a base model from the hub, in a process that can be stopped."""

import logging
import time
from contextlib import suppress
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    FileMetadataError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from worker.hub_refusals import REFUSED, explained
from worker.training.errors import BaseModelUnavailable, DiskFull, is_disk_full
from worker.training.files import replace_text

log = logging.getLogger(__name__)

WEIGHTS = "*.safetensors"
# What else a base model needs, and nothing that could run code: no pickles, no scripts.
DESCRIPTION = ["*.json", "*.jinja", "*.model", "tokenizer*", "vocab*", "merges*"]
NEVER = ["*.py", "*.so", "*.pkl", "*.pickle", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.joblib"]
BROKEN_SECONDS = 3600  # without a byte: nobody writes it any more
AWAY = (HfHubHTTPError, httpx2.HTTPError, OfflineModeIsEnabled)


def download_model(name: str, revision: str | None, *, with_weights: bool, max_bytes: int) -> Path:
    """A folder of the cache, named by the commit that the revision stands for.

    Raises:
        BaseModelUnavailable: If the hub has no such model, refuses it, or cannot be reached; or if
            there is more of it than ``max_bytes``.
    """
    patterns = [*DESCRIPTION, *([WEIGHTS] if with_weights else [])]
    try:
        return _fetched(name, revision, patterns, max_bytes)
    except REFUSED as error:
        raise BaseModelUnavailable(*explained(error, "model", name, revision)) from error
    except HFValidationError as error:
        raise BaseModelUnavailable(
            f"{name} is no name of a model: {error}", "Write org/name as the hub does."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        if is_disk_full(error):
            raise DiskFull from error
        log.exception("model download failed")
        raise BaseModelUnavailable(
            f"The worker cannot get {name} from the hub ({type(error).__name__}).",
            "Check the worker's network and its cache folder, or put the model in a folder and "
            "name it as file:.",
        ) from error


def took_too_long(name: str, seconds: float) -> BaseModelUnavailable:
    return BaseModelUnavailable(
        f"{name} could not be fetched from the hub within {seconds:g} seconds.",
        "Submit the job again: files that have come whole stay in the worker's cache. "
        "FLATLORA_MODEL_SECONDS is the limit.",
    )


def _fetched(name: str, revision: str | None, patterns: list[str], max_bytes: int) -> Path:
    """Measured first; what is fetched is the very commit that was measured."""
    try:
        described = HfApi().model_info(name, revision=revision, files_metadata=True)
    except RevisionNotFoundError:
        raise
    except AWAY as error:
        return _cached(name, revision, patterns, error)
    if described.sha is None:
        raise FileMetadataError("the hub names no commit")
    _check_size(name, described, patterns, max_bytes)
    _forget_broken(name)
    found = Path(
        snapshot_download(
            name, revision=described.sha, allow_patterns=patterns, ignore_patterns=NEVER
        )
    )
    _remember(found, revision or "main")
    return found


def _cached(name: str, revision: str | None, patterns: list[str], error: Exception) -> Path:
    """What has come when the hub could be asked, else the error. Nothing is fetched unmeasured."""
    try:
        found = snapshot_download(
            name,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=NEVER,
            local_files_only=True,
        )
    except LocalEntryNotFoundError:
        raise error from None
    log.warning("the hub does not answer, and the cache is used", exc_info=error)
    return Path(found)


def _check_size(name: str, described: ModelInfo, patterns: list[str], max_bytes: int) -> None:
    files = {file.rfilename: file.size or 0 for file in described.siblings or []}
    wanted = filter_repo_objects(files, allow_patterns=patterns, ignore_patterns=NEVER)
    size = sum(files[path] for path in wanted)
    if size > max_bytes:
        raise BaseModelUnavailable(
            f"{name} has {size:,} bytes to fetch, and this service fetches {max_bytes:,} of a "
            "model at most.",
            "Name a smaller model, raise FLATLORA_MAX_MODEL_BYTES, or put the model in a folder "
            "and name it as file:.",
        )


def _forget_broken(name: str) -> None:
    """Remove halves of files whose process was ended: the hub's client reads none of them."""
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    for path in folder.glob("blobs/*.incomplete"):
        with suppress(OSError):
            if path.stat().st_mtime < time.time() - BROKEN_SECONDS:
                path.unlink()


def _remember(found: Path, revision: str) -> None:
    """Which commit the revision was, where the hub's client looks while the hub is away.

    It notes that itself only where it is asked for a branch or a tag rather than for a commit.
    """
    path = found.parents[1] / "refs" / revision
    if revision == found.name:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, found.name)
    except OSError:
        log.warning("the revision %s is not noted", revision, exc_info=True)
