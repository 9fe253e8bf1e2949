"""The artifact store: written, read back, deleted, and refusing to create a thing twice."""

import asyncio
import secrets
from collections.abc import Iterator
from contextlib import suppress

from app.doctor.finding import Check, Finding, fail, ok, told
from app.objects import Objects, Outage
from app.settings import Settings
from app.storage import ArtifactStore, open_store

EXPECTED = "a store that can be written and read"
MEND = (
    "Check FLATLORA_STORE_URL (the bucket must be there), the endpoint (AWS_ENDPOINT_URL, "
    "AZURE_STORAGE_ENDPOINT, GOOGLE_BASE_URL), the region, and the keys' right to get, put, list "
    "and delete."
)


def store(settings: Settings) -> Iterator[Finding]:
    where, folder = settings.store_url or str(settings.artifacts_dir), settings.store_folder
    if folder and not folder.exists():
        yield ok("store", f"{folder} is not there yet; it is made at the first start")
        return
    key, body = f"doctor/{secrets.token_hex(8)}", secrets.token_bytes(1024)
    try:
        opened = open_store(settings)
        objects = Objects(opened.raw)
        objects.create(key, body)
    except (Outage, OSError, ValueError) as error:
        yield fail("store", f"{where}: {told(error)}", EXPECTED, MEND)
        return
    try:
        yield _read(objects, key, body, where)
        yield _created_once(objects, key)
        if settings.downloads == "redirect":
            yield _presigned(opened, settings)
        objects.delete([key])
    except (Outage, OSError) as error:
        yield fail("store", f"{where}: {told(error)}", EXPECTED, MEND)
        with suppress(Outage, OSError):
            objects.delete([key])


def _read(objects: Objects, key: str, body: bytes, where: str) -> Finding:
    if objects.read(key) != body:
        return fail("store", f"{where} gave other bytes than were put", EXPECTED, MEND)
    return ok("store", f"{where}: put and got", EXPECTED)


def _created_once(objects: Objects, key: str) -> Finding:
    """The manifest of a job is created so: whoever comes second is refused."""
    expected = "the second of two creations of one key is refused"
    if not objects.create(key, b"second"):
        return ok("store creation", "refused the second", expected)
    mend = "Use a store that honours If-None-Match on PUT: else a job might have two adapters."
    return fail("store creation", "took both", expected, mend)


def _presigned(opened: ArtifactStore, settings: Settings) -> Finding:
    expected = "URLs that need no credentials, as FLATLORA_DOWNLOADS=redirect sends clients to them"
    try:
        url = asyncio.run(opened.presigned("0" * 64, settings.presign_seconds))
    except (AssertionError, OSError, ValueError) as error:
        return fail("store URLs", told(error), expected, "Set FLATLORA_DOWNLOADS=stream.")
    return ok("store URLs", f"signed for {url.partition('?')[0].rsplit('/', 3)[0]}", expected)


STORE = Check("store", store, EXPECTED, MEND)
