"""The operator's key: of the data folder, or in the environment (docs/decisions/0003)."""

import os
import secrets
from pathlib import Path

from app.settings import Settings
from app.storage import make_private


def ensure_key(settings: Settings) -> tuple[str, bool]:
    """The service's key, and whether it was made just now."""
    if settings.api_key:
        return settings.api_key.get_secret_value(), False
    path = settings.key_file
    make_private(path.parent)
    key = f"flk_{secrets.token_hex(24)}"
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    partial.touch(mode=0o600, exist_ok=False)
    partial.write_text(key + "\n")
    try:
        os.link(partial, path)  # atomic, and refuses to replace a key that is there
    except FileExistsError:
        return _read_key(path), False
    finally:
        partial.unlink()
    return key, True


def _read_key(path: Path) -> str:
    key = path.read_text().strip()
    if not key:
        raise ValueError(f"{path} is empty: remove it, and a new key is made")
    return key
