"""Fetching a base model from the hub, in a process that can be stopped."""

import logging
from pathlib import Path

import httpx2
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from worker.hub_refusals import REFUSED, explained
from worker.training.errors import BaseModelUnavailable, DiskFull, is_disk_full

log = logging.getLogger(__name__)

WEIGHTS = "*.safetensors"
# What else a base model needs, and nothing that could run code: no pickles, no scripts.
DESCRIPTION = ["*.json", "*.jinja", "*.model", "tokenizer*", "vocab*", "merges*"]
NEVER = ["*.py", "*.so", "*.pkl", "*.pickle", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.joblib"]


def download_model(name: str, revision: str | None, *, with_weights: bool) -> Path:
    """A folder of the cache, named by the commit that the revision stands for.

    Raises:
        BaseModelUnavailable: If the hub has no such model, refuses it, or cannot be reached.
    """
    patterns = [*DESCRIPTION, *([WEIGHTS] if with_weights else [])]
    try:
        found = snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=NEVER
        )
        return Path(found)
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
