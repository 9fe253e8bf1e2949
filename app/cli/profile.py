"""Which service the command line talks to, and with which key."""

import os
from dataclasses import dataclass

from app.settings import Settings


@dataclass(frozen=True)
class Profile:
    url: str
    key: str | None

    @classmethod
    def load(cls, settings: Settings) -> "Profile":
        """``FLATLORA_URL`` and ``FLATLORA_API_KEY``, else the service of this data folder."""
        url = os.environ.get("FLATLORA_URL", settings.base_url)
        key = os.environ.get("FLATLORA_API_KEY")
        if key is None and settings.key_file.exists():
            key = settings.key_file.read_text().strip()
        return cls(url.rstrip("/"), key)
