"""A thousand jobs through eight slots: each is run once, and how long that takes.

    python -m benchmarks.thousand_jobs [--jobs 1000] [--workers 2] [--slots 4]

Everything is real but the training: Postgres, Redis, the API, Celery workers, a trainer process for
each job and another that checks its adapter; the trainer is that of the fault tests, which is done
in milliseconds. So this is what the service itself costs per job. Ends with 1 if a job ran twice,
not at all, or to other bytes than were foretold.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.faults.cluster import Cluster

PATIENT = {
    "FLATLORA_LEASE_SECONDS": "60",
    "FLATLORA_HEARTBEAT_SECONDS": "10",
}


def run(jobs: int, workers: int, slots: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        with Cluster(Path(folder) / "c", workers=workers, slots=slots, environment=PATIENT) as it:
            started = time.monotonic()
            posts = []
            for number in range(jobs):
                asked = time.monotonic()
                it.submit(steps=3, checkpoint_steps=2, step_ms=0, seed=number)
                posts.append(1000 * (time.monotonic() - asked))
            submitted = time.monotonic() - started
            rows = it.settle(seconds=3600)
            taken = time.monotonic() - started
            starts = Counter(entry["job"] for entry in it.executions() if entry["event"] == "start")
            return {
                "jobs": jobs,
                "slots": workers * slots,
                "states": dict(Counter(row["status"] for row in rows)),
                "executions per job": dict(Counter(starts[row["id"]] for row in rows)),
                "claims per job": dict(Counter(row["fence"] for row in rows)),
                "violations": [str(violation) for violation in it.violations()],
                "seconds to submit": round(submitted, 1),
                "seconds in all": round(taken, 1),
                "jobs a second": round(jobs / taken, 2),
                "POST p50 ms": round(statistics.median(posts), 1),
                "POST p99 ms": round(statistics.quantiles(posts, n=100)[98], 1),
            }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--slots", type=int, default=4, help="of each worker")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    result = run(options.jobs, options.workers, options.slots)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    for name, value in result.items():
        sys.stdout.write(f"{name}: {value}\n")
    once = {1: options.jobs}
    is_right = result["executions per job"] == once == result["claims per job"]
    return 0 if is_right and not result["violations"] else 1


if __name__ == "__main__":
    sys.exit(main())
