"""A dataset in a bucket, with the credentials that the clouds' own tools read."""

import logging
from collections.abc import Iterator
from pathlib import PurePosixPath

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

from app.objects import CHUNK, NO_BUCKET, connect
from worker.remote import Arrived, Order, too_large, write_hashed
from worker.training.errors import DatasetUnavailable, is_disk_full

log = logging.getLogger(__name__)


def bring_object(order: Order) -> Arrived:
    """Raises ``DatasetUnavailable``. Outages are waited for as with the service's own store."""
    bucket, key = order.parts["bucket"], order.parts["key"]
    try:
        sha256 = write_hashed(order, _chunks(order, bucket, key))
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise DatasetUnavailable(
            f"The worker may not read {order.uri}.",
            "Give its credentials the right to read there.",
        ) from error
    except FileNotFoundError as error:
        what = f"bucket {bucket}" if NO_BUCKET.search(str(error)) else f"object {order.uri}"
        raise DatasetUnavailable(f"There is no {what}.", "Check the URI.") from error
    except (BaseError, ValueError) as error:
        if is_disk_full(error):
            raise
        log.exception("fetching an object failed")
        raise DatasetUnavailable(
            f"The worker cannot fetch {order.uri} ({type(error).__name__}).",
            "Check the worker's way to the bucket and its credentials (AWS_…, GOOGLE_…, AZURE_…).",
        ) from error
    return Arrived(PurePosixPath(key).name, sha256)


def _chunks(order: Order, bucket: str, key: str) -> Iterator[bytes]:
    found = obstore.get(connect(bucket), key)
    if found.meta["size"] > order.max_bytes:
        raise too_large(order)
    for chunk in found.stream(min_chunk_size=CHUNK):
        yield bytes(chunk)
