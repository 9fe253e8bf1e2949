"""A dataset's file on the hub, pinned to a commit."""

import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import httpx2
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from worker.hub_refusals import REFUSED, explained
from worker.remote import Arrived, Order, too_large, write_hashed
from worker.training.errors import DatasetUnavailable, is_disk_full

log = logging.getLogger(__name__)

TRIES = 4
FIRST_WAIT = 0.5
CHUNK = 1 << 20
UNREACHABLE = (
    LocalEntryNotFoundError,
    HfHubHTTPError,
    FileMetadataError,
    httpx2.HTTPError,
    OSError,
)


def bring_hub_file(order: Order) -> Arrived:
    """Raises ``DatasetUnavailable``."""
    repo, path, revision = (order.parts[name] for name in ("repo", "path", "revision"))
    try:
        found, commit = _fetched(order)
        sha256 = write_hashed(order, _chunks(found))
    except REFUSED as error:
        raise DatasetUnavailable(*explained(error, "dataset", repo, revision)) from error
    except LocalEntryNotFoundError as error:  # it is an EntryNotFoundError too
        raise _unreachable(order, error) from error
    except EntryNotFoundError as error:
        raise DatasetUnavailable(
            f"The dataset {repo} has no file {path}.", "Its page on the hub lists them."
        ) from error
    except HFValidationError as error:
        raise DatasetUnavailable(f"{repo} is no name of a dataset.", "Write org/name.") from error
    except UNREACHABLE as error:
        if is_disk_full(error):
            raise
        raise _unreachable(order, error) from error
    finally:
        shutil.rmtree(_scratch(order), ignore_errors=True)
    return Arrived(PurePosixPath(path).name, sha256, commit)


def _unreachable(order: Order, error: Exception) -> DatasetUnavailable:
    log.error("a download from the hub failed", exc_info=error)
    return DatasetUnavailable(
        f"The worker cannot get {order.uri} from the hub ({type(error).__name__}).",
        "Check the worker's network, or upload the rows with POST /datasets.",
    )


def _fetched(order: Order) -> tuple[Path, str]:
    """The file, and the commit that it is of."""
    if constants.HF_HUB_OFFLINE:  # what is in the cache
        repo, path, revision = (order.parts[name] for name in ("repo", "path", "revision"))
        found = Path(hf_hub_download(repo, path, repo_type="dataset", revision=revision))
        return found, found.parts[-2 - path.count("/")]
    for last in range(TRIES):
        try:
            return _download(order)
        except UNREACHABLE as error:
            if last == TRIES - 1 or not _is_transient(error):
                raise
            log.warning("the hub has failed, and is asked again", exc_info=error)
        time.sleep(FIRST_WAIT * 2**last)
    raise AssertionError


def _download(order: Order) -> tuple[Path, str]:
    """Beside the job's file rather than into the cache, which nobody would ever empty."""
    repo, path, revision = (order.parts[name] for name in ("repo", "path", "revision"))
    url = hf_hub_url(repo, path, repo_type="dataset", revision=revision)
    described = get_hf_file_metadata(url)
    if (described.size or 0) > order.max_bytes:
        raise too_large(order)
    if described.commit_hash is None:
        raise FileMetadataError("the hub names no commit")
    found = hf_hub_download(
        repo, path, repo_type="dataset", revision=described.commit_hash, local_dir=_scratch(order)
    )
    return Path(found), described.commit_hash


def _scratch(order: Order) -> Path:
    return Path(order.target + ".hub")


def _is_transient(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status >= 500 or status == 429
    return isinstance(error, LocalEntryNotFoundError | httpx2.TransportError)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk
