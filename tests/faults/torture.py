"""Breaks a cluster at random for a while, lets it settle, and asks the oracle what it has kept.

    python -m tests.faults.torture [--seconds 600] [--seed N] [--json FILE]

The seed determines which faults come when, and which jobs; not what each fault meets. Ends with 1,
and keeps the logs, if a job was lost, was run twice to an end, has failed without being made to, or
was given other bytes than an unbroken run gives.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from tests.faults.chaos import Chaos, schedule
from tests.faults.client import Client, Wishes, broken_wishes, real_body
from tests.faults.cluster import Cluster, Row
from tests.faults.journal import TERMINAL, Violation
from tests.faults.summary import FAULTS
from tests.faults.whole import hashes
from tests.system.service import until

WORKERS, SLOTS = 2, 2
LONG_SECONDS = 60  # a shorter run has no time for the real trainer
SETTLE_SECONDS = 240
IDLE_SECONDS = 30  # that a slot may be idle while a job waits, after the last fault
LAST_SECONDS = 60
ALLOWED_SECONDS = 2.0  # between the end of an attempt's right to run and its end
ENVIRONMENT = {
    "FLATLORA_MAX_ATTEMPTS": "40",  # a job that is hit again and again is not to blame
    "FLATLORA_RETRY_SECONDS": "0",
    "FLATLORA_STALL_SECONDS": "120",
    "OMP_NUM_THREADS": "1",  # threads of several trainers would wait for each other
}


@dataclass
class Report:
    seed: int
    seconds: float
    faults: dict[str, int]
    jobs: dict[str, int]
    """By status, with the reason of the failed."""
    trained_for_real: int
    attempts: dict[int, int]
    """How many jobs were claimed so often."""
    steps: int
    steps_repeated: int
    resumed: int
    requests: dict[str, int]
    settled_after: float
    hit_most: list[dict[str, Any]]
    """Jobs that were claimed more often than any other."""
    violations: list[Violation] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"seed {self.seed}, {self.seconds:g} s, {WORKERS} workers × {SLOTS} slots",
            f"faults injected: {sum(self.faults.values())} ({_listed(self.faults)})",
            f"jobs: {sum(self.jobs.values())} ({_listed(self.jobs)}); "
            f"with the real trainer: {self.trained_for_real}",
            f"jobs by claims: {_listed(self.attempts)}",
            f"steps: {self.steps}, of them done again {self.steps_repeated}; "
            f"resumed from a checkpoint: {self.resumed}",
            f"requests: {_listed(self.requests)}",
            f"settled {self.settled_after:.1f} s after the last fault",
            *(f"VIOLATION {it.job} {it.rule}: {it.detail}" for it in self.violations),
            f"violations: {len(self.violations)}",
        ]
        return "\n".join(lines)


def _listed(counts: dict[Any, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items())


def torture(folder: Path, seed: int, seconds: float) -> Report:
    """Break a cluster for so many seconds, and look what came of it."""
    before = FAULTS.copy()
    cluster = Cluster(folder / "cluster", workers=WORKERS, slots=SLOTS, environment=ENVIRONMENT)
    chaos = Chaos(cluster, folder / "points")
    is_long = seconds >= LONG_SECONDS
    with cluster:
        twin = hashes(_unbroken(cluster)) if is_long else {}
        with Client(cluster, seed, is_long=is_long) as client:
            chaos.run(schedule(seed, seconds), seconds)
            chaos.calm()
        calm_at = time.monotonic()
        found = [Violation("", "idle", it) for it in _settle(cluster)]
        settled_after = time.monotonic() - calm_at
        found += _left_over(cluster)
        found += [Violation("", "client", it) for it in client.wishes.complaints]
        found += [Violation("", "drain", it) for it in chaos.complaints]
        rows = cluster.query("SELECT * FROM jobs")
        chaotic = [row for row in rows if row["name"] != TWIN]
        found += [
            Violation(job, "wish", it) for job, it in broken_wishes(client.wishes, chaotic, twin)
        ]
        found += cluster.violations(tolerance_seconds=ALLOWED_SECONDS)
        report = _report(cluster, rows, client.wishes)
        return Report(
            seed, seconds, dict((FAULTS - before).most_common()), **report,
            settled_after=settled_after, violations=found,
        )  # fmt: skip


TWIN = "unbroken"


def _unbroken(cluster: Cluster) -> Row:
    answer = cluster.post({**real_body(), "name": TWIN})
    assert answer.status_code == 202, answer.text
    return cluster.finish(answer.json()["id"], seconds=180)


def _settle(cluster: Cluster) -> Iterator[str]:
    """Wait until every job is over; what was idle meanwhile that should not have been."""
    slots = WORKERS * SLOTS
    deadline = time.monotonic() + SETTLE_SECONDS
    busy_at = time.monotonic()
    counted = """
        SELECT count(*) FILTER (WHERE status = ANY(%s)) AS over, count(*) AS all_,
               count(*) FILTER (WHERE worker IS NOT NULL AND NOT status = ANY(%s)) AS held,
               count(*) FILTER (WHERE status = 'queued'
                                AND (available_at IS NULL OR available_at <= now())) AS waiting
        FROM jobs
    """
    while True:
        (row,) = cluster.query(counted, list(TERMINAL), list(TERMINAL))
        if row["over"] == row["all_"]:
            return
        if not row["waiting"] or row["held"] == slots:
            busy_at = time.monotonic()
        elif time.monotonic() > busy_at + IDLE_SECONDS:
            yield f"{row['waiting']} jobs wait and {slots - row['held']} slots are idle"
            busy_at = time.monotonic()
        if time.monotonic() > deadline:
            yield f"not all is over {SETTLE_SECONDS} s after the last fault: {row}"
            return
        time.sleep(0.2)


def _left_over(cluster: Cluster) -> Iterator[Violation]:
    if not _within(lambda: not cluster.query("SELECT 1 FROM outbox")):
        yield Violation("", "outbox", "wake-ups are left in it")
    if not _within(lambda: not cluster.orphans()):
        yield from (Violation("", "orphan", str(process)) for process in cluster.orphans())
    if not _within(lambda: not any(worker.trainers() for worker in cluster.workers)):
        yield Violation("", "trainer", "one runs, and no job")


def _within(look: Callable[[], bool]) -> bool:
    try:
        return until(look, seconds=LAST_SECONDS)
    except (AssertionError, psycopg.OperationalError):
        return False


def _report(cluster: Cluster, rows: list[Row], wishes: Wishes) -> dict[str, Any]:
    executions = cluster.executions()
    steps = [(it["job"], it["step"]) for it in executions if it["event"] == "step"]
    ends = Counter(
        f"{row['status']}: {row['reason']}" if row["reason"] else row["status"] for row in rows
    )
    return {
        "jobs": dict(ends.most_common()),
        "trained_for_real": sum("real" in row["labels"] for row in rows),
        "attempts": dict(sorted(Counter(row["fence"] for row in rows).items())),
        "steps": len(steps),
        "steps_repeated": len(steps) - len(set(steps)),
        "resumed": sum(it["event"] == "resume" for it in executions),
        "requests": {"answered": wishes.answered, "met an outage": wishes.unanswered},
        "hit_most": [
            {name: row[name] for name in ("id", "labels", "status", "reason", "attempt", "fence")}
            for row in sorted(rows, key=lambda row: -row["fence"])[:5]
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, help="default: another one each time")
    parser.add_argument("--json", type=Path, help="also write the report here")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    folder = Path(tempfile.mkdtemp(prefix="flatlora-torture-"))
    sys.stdout.write(f"seed {seed}: {options.seconds:g} s; logs in {folder}\n")
    sys.stdout.flush()
    report = torture(folder, seed, options.seconds)
    sys.stdout.write(f"{report}\n")
    if options.json:
        options.json.write_text(json.dumps(_as_json(report), indent=1) + "\n")
    if report.violations:
        sys.stdout.write(f"the logs are in {folder}\n")
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def _as_json(report: Report) -> dict[str, Any]:
    violations = [violation._asdict() for violation in report.violations]
    return {**asdict(report), "violations": violations}


if __name__ == "__main__":
    sys.exit(main())
