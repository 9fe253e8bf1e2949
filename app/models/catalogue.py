"""The base models in folders, so that asking for thousands of them often costs little."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

from app.models.folders import Described, find_models
from app.models.schemas import BaseModelInfo

FRESH_SECONDS = 3


class Catalogue:
    """Looks again when what it has found is older than ``FRESH_SECONDS``.

    Whoever asks meanwhile waits for the one look. Files that have stayed as they were are not
    read again.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = roots
        self._lock = asyncio.Lock()
        self._described: Described = {}
        self._found: list[BaseModelInfo] = []
        self._until = 0.0

    async def found(self) -> list[BaseModelInfo]:
        async with self._lock:
            if time.monotonic() >= self._until:
                self._found = await asyncio.to_thread(find_models, self._roots, self._described)
                self._until = time.monotonic() + FRESH_SECONDS
            return self._found
