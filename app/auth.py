"""The key that the embedded service asks for (docs/decisions/0003)."""

import os
import secrets
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.errors import Unauthenticated
from app.settings import Settings
from app.storage import make_private

bearer = HTTPBearer(auto_error=False, description="The key that `flatlora up` printed at first.")


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


async def require_key(
    request: Request,
    given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
) -> None:
    expected: str | None = request.state.key
    if expected is None:
        return
    if given is None:
        raise Unauthenticated(
            "This service asks for a key.",
            "Send it as `Authorization: Bearer <key>`. It was printed at the first start and "
            "lies in the file api_key of the data folder.",
        )
    if not secrets.compare_digest(given.credentials.encode(), expected.encode()):
        raise Unauthenticated(
            "This is not the key of this service.",
            "The key lies in the file api_key of the service's data folder.",
        )
