"""Orders as the supervisor gives them, for tests of what carries them out."""

from pathlib import Path
from typing import Any

from app.settings import Settings
from tests.app.net.world import NETWORK, Site
from worker.remote import Order, order_for

ROWS = b'{"prompt": "a", "completion": "b"}\n' * 1000


def order_of(uri: str, folder: Path, site: Site | None = None, **settings: Any) -> Order:
    """With settings that let the site be reached."""
    folder.mkdir(exist_ok=True)
    given: dict[str, Any] = {"dataset_seconds": 10, "data_dir": folder / "data"}
    if site:
        given |= {"allowed_networks": NETWORK, "allow_http": True, "allowed_ports": [site.port]}
    return order_for(uri, folder / "train", Settings.model_validate(given | settings))
