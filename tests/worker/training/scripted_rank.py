"""A rank that does what its line of a script says, such as ``wait 0, fail internal, exit 1``.

    python scripted_rank.py <folder> <what rank 0 does> <what rank 1 does> …

Its environment lies in ``rank-<n>.json`` once its handlers are set. ``hang`` ends with 75 for
SIGTERM and 76 for SIGUSR1.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 76}


def main(folder: Path, script: list[str]) -> None:
    for number, code in CODES.items():
        signal.signal(number, lambda *_, code=code: os._exit(code))
    rank = os.environ["RANK"]
    partial = folder / f"rank-{rank}.part"
    partial.write_text(json.dumps({"pid": os.getpid(), **os.environ}))
    partial.rename(folder / f"rank-{rank}.json")
    for step in script[int(rank)].split(", "):
        match step.split():
            case ["exit", with_code]:
                os._exit(int(with_code))
            case ["fail", reason, *length]:
                hint = "h" * int(length[0]) if length else None
                said = {"reason": reason, "message": f"said by {rank}", "hint": hint}
                failures = int(os.environ["FLATLORA_FAILURE_DESCRIPTOR"])
                os.write(failures, json.dumps(said).encode() + b"\n")
            case ["die"]:
                os.kill(os.getpid(), signal.SIGKILL)
            case ["wait", other]:
                while not (folder / f"rank-{other}.json").exists():
                    time.sleep(0.005)
            case ["sleep", seconds]:
                time.sleep(float(seconds))
            case ["hang"]:
                while True:
                    signal.pause()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
