"""Which service the command line talks to, and with which key."""

import os
from dataclasses import dataclass
from pathlib import Path

from app.cli.output import USAGE, fail
from app.settings import Settings


@dataclass(frozen=True)
class Profile:
    url: str
    key: str | None

    @classmethod
    def load(cls, settings: Settings) -> "Profile":
        """``FLATLORA_URL`` and ``FLATLORA_API_KEY``, else the service of this data folder."""
        own = _read(settings.url_file)
        url = (os.environ.get("FLATLORA_URL") or own or settings.base_url).rstrip("/")
        key = os.environ.get("FLATLORA_API_KEY")
        # The key of this folder's service is nobody else's business.
        if key is None and url == own:
            key = _read(settings.key_file)
        return cls(url, key)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return None
    except PermissionError:
        fail(
            f"{path} is another user's",
            "Ask them for it and set FLATLORA_API_KEY, or set FLATLORA_URL and FLATLORA_DATA_DIR.",
            code=USAGE,
        )
