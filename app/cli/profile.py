"""Which service the command line talks to, and with which key."""

from dataclasses import dataclass

import flatlora_client
from app.cli.output import USAGE, fail
from app.settings import Settings


@dataclass(frozen=True)
class Profile:
    url: str
    key: str | None

    @classmethod
    def load(cls, settings: Settings) -> "Profile":
        """``FLATLORA_URL`` and ``FLATLORA_API_KEY``, else the service of this data folder."""
        try:
            found = flatlora_client.Profile.load(
                data_dir=settings.data_dir, default_url=settings.base_url
            )
        except PermissionError as error:
            fail(
                f"{error.filename} is another user's",
                "Ask them for it and set FLATLORA_API_KEY, or set FLATLORA_URL and "
                "FLATLORA_DATA_DIR.",
                code=USAGE,
            )
        return cls(found.url, found.key)
