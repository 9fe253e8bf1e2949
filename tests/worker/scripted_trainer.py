"""A trainer that does what its job's folder says, for tests of what stands around it.

``script.json``: ``{"says": [message, …], "then": "hang" | "deaf" | "exit", "code": 0}``, and with
``"follows": true`` it dies with its supervisor. A code below 0 is a signal that it dies of. What it
is sent goes into ``signals`` in the folder, a name and a time a line; ``hang`` ends as the real one
does, with 75 for SIGTERM and 76 for SIGUSR1. Its environment is the last line of its log.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from app.parent import die_with_parent
from worker.inputs import LOG_FILE

CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 76}


def told_environment(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / LOG_FILE).read_text().splitlines()[-1])
    return found


def main(folder: Path, descriptor: int) -> int:
    script = json.loads((folder / "script.json").read_text())
    if script.get("follows"):
        die_with_parent()
    sys.stdout.write(json.dumps(dict(os.environ)) + "\n")
    sys.stdout.flush()

    def note(number: int, _frame: FrameType | None) -> None:
        with (folder / "signals").open("a") as file:
            file.write(f"{signal.Signals(number).name} {time.monotonic()}\n")
        if script["then"] != "deaf":
            os._exit(CODES[signal.Signals(number)])

    for number in CODES:
        signal.signal(number, note)
    with os.fdopen(descriptor, "w", buffering=1) as pipe:
        for message in [{"kind": "phase", "name": "training"}, *script.get("says", [])]:
            pipe.write(json.dumps(message) + "\n")
        while script["then"] != "exit":
            signal.pause()
    code = int(script.get("code", 0))
    if code < 0:
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[2]), int(sys.argv[3])))
