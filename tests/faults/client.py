"""A client that wants many things and repeats itself until it is answered."""

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import httpx2

from tests.faults.cluster import Cluster, Row
from tests.system.service import example_job

Json = dict[str, Any]

WAITING = 10  # jobs that it keeps under way
REAL_EVERY = 40  # jobs, one of which the real trainer gets
ANSWER_SECONDS = 20
LAST_TRIES_SECONDS = 60  # after the last fault
OUTAGE = {503}

FATAL = {"crash_at": "worker_lost", "full_at": "disk_full", "memory_at": "gpu_out_of_memory"}
"""Labels that make a job fail, each with the reason."""


@dataclass
class Wish:
    """One job, as the client has asked for it."""

    key: str
    body: Json
    job_id: str = ""
    is_cancelled: bool = False

    @property
    def is_real(self) -> bool:
        return "real" in self.body["labels"]

    @property
    def ends(self) -> set[tuple[str, str | None]]:
        """The statuses, with their reasons, in which it may end."""
        cancelled = {("cancelled", None)} if self.is_cancelled else set()
        for label, value in self.body["labels"].items():
            if label in FATAL and not value.endswith("first"):
                return cancelled | {("failed", FATAL[label])}
        return cancelled | {("succeeded", None)}


@dataclass
class Wishes:
    made: list[Wish] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    answered: int = 0
    unanswered: int = 0
    """Requests that met an outage."""

    @property
    def jobs(self) -> list[Wish]:
        return [wish for wish in self.made if wish.job_id]


class Client:
    """Submits, cancels, asks, and sends some requests twice, in a thread, while the block lasts."""

    def __init__(self, cluster: Cluster, seed: int, *, is_long: bool) -> None:
        """``is_long``: there is time for the real trainer, and for a crash at each attempt."""
        self.wishes = Wishes()
        self._cluster = cluster
        self._draw = random.Random(f"client {seed}")
        self._is_long = is_long
        self._over = threading.Event()
        self._patient_until = float("inf")
        self._thread = threading.Thread(target=self._run, name="client", daemon=True)
        cluster.api.http.timeout = httpx2.Timeout(ANSWER_SECONDS)

    def __enter__(self) -> "Client":
        self._thread.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._patient_until = time.monotonic() + LAST_TRIES_SECONDS
        self._over.set()
        self._thread.join(2 * LAST_TRIES_SECONDS)
        if self._thread.is_alive():
            self.wishes.complaints.append("a request was neither answered nor refused")

    def _run(self) -> None:
        while not self._over.wait(self._draw.uniform(0.02, 0.3)):
            if self._under_way() < WAITING:
                self._submit()
            if self.wishes.jobs and self._draw.random() < 0.05:
                self._submit_again()
            if self.wishes.jobs and self._draw.random() < 0.08:
                self._cancel()

    def _under_way(self) -> int:
        query = {"status": ["queued", "running", "cancelling"], "limit": 100}
        answer = self._send("GET", "/jobs", params=query)
        return len(answer.json()["items"]) if answer else WAITING

    def _submit(self) -> None:
        number = len(self.wishes.made)
        wish = Wish(f"wish-{number}", self._body(number))
        self.wishes.made.append(wish)
        while time.monotonic() < self._patient_until:
            if job_id := self._post(wish):
                wish.job_id = job_id
                return
            time.sleep(0.2)
        self._complain(f"POST was not answered after the last fault, key {wish.key}")

    def _post(self, wish: Wish) -> str | None:
        try:
            answer = self._cluster.post(wish.body, key=wish.key)
        except httpx2.TransportError:
            self.wishes.unanswered += 1
            return None
        self._count(answer, "POST /jobs", 202)
        return str(answer.json()["id"]) if answer.status_code == 202 else None

    def _submit_again(self) -> None:
        """As one that did not hear the answer."""
        wish = self._draw.choice(self.wishes.jobs)
        found = self._post(wish)
        if found not in {None, wish.job_id}:
            self._complain(f"{wish.key} made {wish.job_id}, and {found} too")

    def _cancel(self) -> None:
        wish = self._draw.choice(self.wishes.jobs[-WAITING:])
        wish.is_cancelled = True  # before: the answer may be lost
        self._send("POST", f"/jobs/{wish.job_id}/cancel", expected={202, 409})

    def _send(
        self, method: str, path: str, *, expected: set[int] | None = None, **more: Any
    ) -> httpx2.Response | None:
        try:
            answer = self._cluster.api.http.request(method, path, **more)
        except httpx2.TransportError:
            self.wishes.unanswered += 1
            return None
        self._count(answer, f"{method} {path}", *(expected or {200}))
        return answer if answer.is_success else None

    def _count(self, answer: httpx2.Response, what: str, *expected: int) -> None:
        if answer.status_code in expected:
            self.wishes.answered += 1
        elif answer.status_code in OUTAGE:
            self.wishes.unanswered += 1
        else:
            self._complain(f"{what} was answered with {answer.status_code}: {answer.text[:300]}")

    def _complain(self, what: str) -> None:
        self.wishes.complaints.append(what)

    def _body(self, number: int) -> Json:
        draw = self._draw
        if self._is_long and number % REAL_EVERY == REAL_EVERY // 4:
            return real_body()
        is_dry = draw.random() < 0.05
        return self._cluster.body(
            steps=draw.randrange(5, 80),
            checkpoint_steps=draw.randrange(2, 15),
            step_ms=draw.choice([2, 10, 30, 60]),
            labels={} if is_dry else self._labels(),
            seed=draw.randrange(1000),
            rank=draw.choice([1, 4, 16]),
            priority=draw.randrange(10),
            dry_run=is_dry,
        )

    def _labels(self) -> dict[str, str]:
        draw = self._draw
        step = draw.randrange(1, 6)
        labels = draw.choices(
            [
                {},
                {"crash_at": f"{step} first"},
                {"deaf": "1"},
                {"crash_at": f"{step}"},
                {"full_at": f"{step}"},
                {"memory_at": f"{step}"},
            ],
            weights=[80, 10, 4, 2 * self._is_long, 2, 2],
        )
        return labels[0]


def real_body() -> Json:
    """Always the same, so that one unbroken run is the twin of all."""
    return example_job(
        labels={"real": "1"},
        data={"max_length": 128},
        training={"max_steps": 16, "batch_size": 4, "checkpoint_steps": 2},
        evaluation={"max_rows": 8, "every_steps": 8},
    )


def broken_wishes(wishes: Wishes, rows: list[Row], twin: Json) -> Iterator[tuple[str, str]]:
    """Each with its job: wishes that were not fulfilled, and what nobody has wished for."""
    wanted = {wish.job_id: wish for wish in wishes.jobs}
    found = {row["id"]: row for row in rows}
    for job_id in found.keys() - wanted.keys():
        yield job_id, "nobody has been told of it"
    for job_id, wish in wanted.items():
        row = found.get(job_id)
        if row is None:
            continue  # the journal tells
        if (row["status"], row["reason"]) not in wish.ends:
            yield job_id, f"it is {row['status']} ({row['reason']}: {row['message']})"
        if wish.is_real and row["adapter"]:
            files = {file["name"]: file["sha256"] for file in row["adapter"]["files"]}
            if files != twin:
                yield job_id, "its adapter is not that of the unbroken run"
