"""Whether the hub of models can be reached from here, where jobs may name its models."""

from collections.abc import Iterator
from importlib.util import find_spec

import httpx2

from app.doctor.finding import Check, Finding, ok, told, warn
from app.settings import Settings

PATIENCE_SECONDS = 4
EXPECTED = "an answer of the hub"
MEND = (
    "Open the way to it (HTTPS_PROXY, HF_ENDPOINT). Without it set HF_HUB_OFFLINE=1, and name base "
    "models as file: or have them in the cache."
)


def hub(settings: Settings) -> Iterator[Finding]:
    if not settings.hub_models:
        yield ok("hub", "not needed: FLATLORA_HUB_MODELS allows none of its models")
        return
    if find_spec("huggingface_hub") is None:
        yield ok("hub", "not needed: workers alone fetch models, and this machine is none")
        return
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield ok("hub", "not asked: HF_HUB_OFFLINE is set")
        return
    try:
        answer = httpx2.head(constants.ENDPOINT, timeout=PATIENCE_SECONDS)
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        found = f"{constants.ENDPOINT}: {told(error)}"
        yield warn("hub", found, EXPECTED, MEND)
        return
    found = f"{constants.ENDPOINT} answers ({answer.status_code})"
    if answer.is_server_error:
        yield warn("hub", found, EXPECTED, "Try again later.")
    else:
        yield ok("hub", found, EXPECTED)


HUB = Check("hub", hub, EXPECTED, MEND)
