"""A cluster's artifact store as it is, read without the service's own code."""

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import obstore
from obstore.store import LocalStore, ObjectStore, from_url

if TYPE_CHECKING:
    from obstore.store import ClientConfig


def hashes_in_store(url: str, variables: Mapping[str, str], job_id: str) -> dict[str, str] | None:
    """Hashes of the bytes under the names of a job's manifest; ``gone`` where there are none.

    None where there is no manifest. ``variables`` may hold AWS_… for a store on S3.
    """
    store = _open(url, variables)
    manifest = _bytes(store, f"jobs/{job_id}/manifest.json")
    if manifest is None:
        return None
    found = {}
    for file in json.loads(manifest)["adapter"]["files"]:
        digest = file["sha256"]
        content = _bytes(store, f"blobs/{digest[:2]}/{digest}")
        found[file["name"]] = "gone" if content is None else hashlib.sha256(content).hexdigest()
    return found


def _open(url: str, variables: Mapping[str, str]) -> ObjectStore:
    if url.startswith("file://"):
        return LocalStore(url.removeprefix("file://"))
    config = {name.lower(): value for name, value in variables.items() if name.startswith("AWS_")}
    options: ClientConfig = {"allow_http": True}
    return from_url(url, config=config, client_options=options)  # type: ignore[call-overload,no-any-return]


def _bytes(store: ObjectStore, key: str) -> bytes | None:
    try:
        return bytes(obstore.get(store, key).bytes())
    except FileNotFoundError:
        return None
