"""What a dataset URI may name, told without the network: the worker fetches what passes here.

    file:rows.jsonl                               below a configured root
    dataset:ds_…                                  an upload
    https://host/rows.jsonl                       at a public address
    s3://bucket/key, gs://…, az://container/key   in a listed bucket
    hf://datasets/ORG/NAME[@REVISION]/PATH        on the hub, as its own ``HfFileSystem`` writes it

No other library ever sees such a URI: those take ``zip://…::https://…`` and ``file:`` apart as they
like. Each is taken apart here, and only its parts are passed on.
"""

import re
from dataclasses import dataclass
from urllib.parse import unquote

from app.net.rules import Rules
from app.net.urls import check_url, shown
from app.settings import REMOTE_STORES, STORE_NAME, Settings
from app.uris import UriError, is_hub_id, is_listed, resolve_dataset_file

SCHEMES = ("file:", "dataset:", "https:", "s3:", "gs:", "az:", "hf:")
MAX_KEY = 1024  # of S3
HIDDEN = re.compile(r"%(?:2e|2f|5c|00)", re.IGNORECASE)  # what means a way elsewhere once decoded

HUB_URI = re.compile(
    r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/convert/[\w.-]+|refs/pr/\d+|[^/@]+))?/(?P<path>[^@]+)",
    re.ASCII,
)
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./-]{0,127}")


@dataclass(frozen=True)
class BucketFile:
    bucket: str
    """``s3://name``"""
    key: str


@dataclass(frozen=True)
class HubFile:
    repo: str
    revision: str | None
    path: str


def schemes(settings: Settings) -> list[str]:
    """Those that this service takes, as it is set up."""
    buckets = {bucket.partition("://")[0] + ":" for bucket in settings.dataset_buckets}
    closed = {"s3:", "gs:", "az:"} - buckets
    found = [scheme for scheme in SCHEMES if scheme not in closed]
    return [*found, "http:"] if settings.allow_http else found


def check_dataset_uri(uri: str, settings: Settings) -> None:
    """Raises ``UriError`` where it cannot be fetched, as far as this machine alone can tell."""
    match uri.partition(":")[0]:
        case "file":
            resolve_dataset_file(uri, settings.dataset_roots)
        case "dataset":
            pass  # the database knows
        case "https" | "http":
            check_url(uri, Rules.of(settings))
        case scheme if scheme in REMOTE_STORES:
            bucket_file(uri, settings)
        case "hf":
            hub_file(uri, settings)
        case _:
            raise UriError(
                "uri_scheme_unsupported",
                f"{shown(uri)} does not begin with one of {', '.join(SCHEMES)}.",
                "Name a file below a configured root, or upload one with POST /datasets.",
            )


def bucket_file(uri: str, settings: Settings) -> BucketFile:
    """The parts of a URI in a bucket that is listed. Raises ``UriError``."""
    scheme, _, rest = uri.partition("://")
    name, _, key = rest.partition("/")
    if not STORE_NAME.fullmatch(name) or len(key) > MAX_KEY or not is_path(key):
        raise UriError(
            "uri_malformed",
            f"{shown(uri)} is not the URI of an object in a bucket.",
            "Write s3://bucket/folder/rows.jsonl, without empty parts, '.' and '..'; the key as "
            "it is, not quoted.",
        )
    if not any(_matches(uri, pattern) for pattern in settings.dataset_buckets):
        listed = ", ".join(settings.dataset_buckets) or "none"
        raise UriError(
            "bucket_not_allowed",
            f"{shown(uri)} is in none of the buckets that datasets may come from: {listed}.",
            "Add it to FLATLORA_DATASET_BUCKETS, or upload the rows with POST /datasets.",
        )
    if settings.store_url and uri.startswith(f"{settings.store_url.rstrip('/')}/"):
        raise UriError(
            "path_not_allowed",
            f"{shown(uri)} lies in the service's own store, from which nothing is read.",
            "Copy it out of there; rows can also be uploaded with POST /datasets.",
        )
    return BucketFile(f"{scheme}://{name}", key)


def hub_file(uri: str, settings: Settings) -> HubFile:
    """The parts of a URI of the hub, if its repository is listed. Raises ``UriError``."""
    match = HUB_URI.fullmatch(uri)
    revision = unquote(match["revision"]) if match and match["revision"] else None
    if match is None or not _is_hub_file(match["repo"], revision, match["path"]):
        raise UriError(
            "uri_malformed",
            f"{shown(uri)} is not the URI of a file in a dataset of the hub.",
            "Write hf://datasets/org/name/rows.jsonl, or with a commit, tag or branch "
            "hf://datasets/org/name@revision/rows.jsonl; a / in a revision is written %2F.",
        )
    if not is_listed(match["repo"], settings.hub_datasets):
        listed = ", ".join(settings.hub_datasets) or "none"
        raise UriError(
            "dataset_not_allowed",
            f"{match['repo']} is not among the hub's datasets that this service may use: {listed}.",
            "Add it to FLATLORA_HUB_DATASETS, or upload the rows with POST /datasets.",
        )
    return HubFile(match["repo"], revision, match["path"])


def is_path(text: str) -> bool:
    """Whether it names one thing below where it is looked for, however it is written or read."""
    parts = text.split("/")
    is_clean = text.isprintable() and "\\" not in text and not HIDDEN.search(text)
    return is_clean and not any(part.strip() in {"", ".", ".."} for part in parts)


def _is_hub_file(repo: str, revision: str | None, path: str) -> bool:
    is_revision = revision is None or (REVISION.fullmatch(revision) and ".." not in revision)
    return bool(is_hub_id(repo) and is_revision and is_path(path) and not re.search(r"[?#*]", path))


def _matches(uri: str, pattern: str) -> bool:
    """``s3://team-*/rows`` is all below the folders rows of these buckets; no * spans a slash."""
    regex = re.escape(pattern.rstrip("/")).replace(r"\*", "[^/]*")
    return bool(re.fullmatch(rf"{regex}(?:/.*)?", uri))
