"""Running the checks: side by side, each for some seconds at most, whatever the others do."""

import queue
import threading
import time
from collections.abc import Iterator

from app.doctor.broker import BROKER
from app.doctor.database import DATABASE
from app.doctor.finding import Check, Finding, fail, told
from app.doctor.gpu import GPU
from app.doctor.hub import HUB
from app.doctor.machine import DISK, FILES, FOLDER, PORT, PROGRAM
from app.doctor.store import STORE
from app.settings import Settings

# Torch last: it takes some seconds to import.
CHECKS = (PROGRAM, FOLDER, DISK, FILES, PORT, DATABASE, BROKER, STORE, HUB, GPU)


class Run:
    """A check in a thread that is left behind if it hangs: the process ends without it."""

    def __init__(self, check: Check, settings: Settings) -> None:
        self._check = check
        self._settings = settings
        self._until = time.monotonic() + check.seconds
        self._found: queue.SimpleQueue[Finding | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=check.name, daemon=True).start()

    def _work(self) -> None:
        try:
            for finding in self._check.run(self._settings):
                self._found.put(finding)
        except Exception as error:  # whatever it is, it is what this check has found
            self._found.put(self._failed(told(error)))
        self._found.put(None)

    def findings(self) -> Iterator[Finding]:
        while True:
            try:
                left = max(0.0, self._until - time.monotonic())
                finding = self._found.get(timeout=left)
            except queue.Empty:
                yield self._failed(f"no answer within {self._check.seconds:g} s")
                return
            if finding is None:
                return
            yield finding

    def _failed(self, found: str) -> Finding:
        return fail(self._check.name, found, self._check.expected, self._check.mend)


def examine(settings: Settings) -> Iterator[Finding]:
    """All findings, in the order of the checks, as soon as each is there."""
    for run in [Run(check, settings) for check in CHECKS]:
        yield from run.findings()
