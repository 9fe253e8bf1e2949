"""Fetching a base model from the hub, in a process that can be stopped."""

import logging
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from worker.training.errors import BaseModelUnavailable

log = logging.getLogger(__name__)

WEIGHTS = "*.safetensors"
# What else a base model needs, and nothing that could run code: no pickles, no scripts.
DESCRIPTION = ["*.json", "*.jinja", "*.model", "tokenizer*", "vocab*", "merges*"]


def download_model(name: str, revision: str | None, *, with_weights: bool) -> Path:
    """A folder of the cache, named by the commit that the revision stands for.

    Raises:
        BaseModelUnavailable: If the hub has no such model, refuses it, or cannot be reached.
    """
    patterns = [*DESCRIPTION, *([WEIGHTS] if with_weights else [])]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise BaseModelUnavailable(
            f"The hub wants an access token for {name}.", "Set HF_TOKEN for the worker."
        ) from error
    except RepositoryNotFoundError as error:
        raise BaseModelUnavailable(
            f"The hub has no model {name}, or it is private.", "Check the name, or set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise BaseModelUnavailable(
            f"The model {name} has no revision {revision}.", "Name a commit, a tag or a branch."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        log.exception("model download failed")
        raise BaseModelUnavailable(
            f"The worker cannot reach the hub to get {name}.",
            "Check the worker's network, or put the model in a folder and name it as file:.",
        ) from error
