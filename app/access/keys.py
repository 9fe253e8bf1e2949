"""API keys: ``flk_<id>_<secret>_<checksum>``.

The prefix and the checksum are for secret scanners: one can tell a leaked key from other text, and
a mistyped one is refused without asking the database. Only the SHA-256 of a key is kept: its secret
has 238 bits of chance, so nothing slower is needed.
"""

import hashlib
import re
import secrets
import string
import zlib
from dataclasses import dataclass

LETTERS = string.ascii_letters + string.digits
SECRET_LETTERS = 40
KEY = re.compile(r"(flk_([0-9a-f]{12})_[A-Za-z0-9]{40})_([0-9a-f]{8})")


@dataclass(frozen=True)
class NewKey:
    """A key, which only its maker ever sees whole."""

    id: str
    key: str

    @property
    def sha256(self) -> str:
        return digest(self.key)


def make_key() -> NewKey:
    key_id = secrets.token_hex(6)
    secret = "".join(secrets.choice(LETTERS) for _ in range(SECRET_LETTERS))
    body = f"flk_{key_id}_{secret}"
    return NewKey(key_id, f"{body}_{_checksum(body)}")


def key_id(key: str) -> str | None:
    """The id in a key; None for text that cannot be one."""
    match = KEY.fullmatch(key)
    return match[2] if match and match[3] == _checksum(match[1]) else None


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"
