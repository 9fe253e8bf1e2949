"""A pickle that tells when it is opened: a file comes into being."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any


class Opened:
    """What makes the canary where somebody unpickles it."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mknod, (str(self._canary),))


def pickled(canary: Path, *, zipped: bool = False) -> bytes:
    """As ``torch.save`` wrote it long ago, and in a zip as it does today."""
    body = pickle.dumps(Opened(canary))
    if not zipped:
        return body
    path = canary.with_name("zipped")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", body)
        archive.writestr("archive/version", "3\n")
    return path.read_bytes()
