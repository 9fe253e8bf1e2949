"""Which service, and with which key: as arguments, the environment or a data folder say."""

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

import httpx2

from flatlora_client.errors import ConfigurationError

DEFAULT_URL = "http://127.0.0.1:8321"
DEFAULT_FOLDER = "flatlora-data"


@dataclass(frozen=True)
class Profile:
    """Where a service is, and the key that opens it."""

    url: str
    key: str | None

    @classmethod
    def load(
        cls,
        url: str | None = None,
        key: str | None = None,
        *,
        data_dir: Path | None = None,
        default_url: str = DEFAULT_URL,
    ) -> "Profile":
        """What is not given comes from ``FLATLORA_URL`` and ``FLATLORA_API_KEY``.

        Else it is the service that runs on the data folder here (``FLATLORA_DATA_DIR``), with the
        key that lies there: that key is sent to no other service.
        """
        folder = data_dir or Path(os.environ.get("FLATLORA_DATA_DIR") or DEFAULT_FOLDER)
        own = _read(folder / "url")
        found = (url or os.environ.get("FLATLORA_URL") or own or default_url).rstrip("/")
        if key is None:
            key = os.environ.get("FLATLORA_API_KEY")
        if key is None and found == own:
            key = _read(folder / "api_key")
        return cls(found, key)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return None


def checked(url: str) -> httpx2.URL:
    """The URL, if it is one of HTTP.

    Raises:
        ConfigurationError: it is not.
    """
    try:
        found = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ConfigurationError(f"found {url!r}, expected a URL: {error}") from None
    if found.scheme not in {"http", "https"} or not found.host:
        raise ConfigurationError(
            f"found {url!r}, expected a URL such as https://flatlora.example.com"
        )
    return found


def is_loopback(url: str) -> bool:
    """Whether it is this machine, which no proxy reaches."""
    host = httpx2.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
