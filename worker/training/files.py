"""Files that are what they were, and are still there after the power has failed."""

import hashlib
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Bring a file, or the list of a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Give a file another text, whole or not at all; on the disk when this returns."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(text)
    sync(partial)
    partial.rename(path)
    sync(path.parent)


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
