"""Every named place where this program may die: it dies there, and the job ends right."""

import ast
import secrets
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from app.failpoints import Point
from tests.faults.cluster import Cluster, Json
from tests.faults.conftest import MakeCluster
from tests.faults.failpoints import Failpoints
from tests.faults.journal import repeated_steps
from tests.faults.procs import is_alive, send
from tests.faults.summary import count
from tests.faults.whole import assert_clean, assert_no_orphans, make_whole
from tests.system.service import ROOT, until

CHECKPOINT_STEPS = 10
DISCARD = 9  # a port on which nobody listens
WEBHOOKS = {
    "FLATLORA_ALLOWED_NETWORKS": "127.0.0.1/32",
    "FLATLORA_ALLOWED_PORTS": str(DISCARD),
    "FLATLORA_ALLOW_HTTP": "1",
}


def insist(cluster: Cluster, body: Json, key: str) -> str:
    """As a good client does it: the same request with the same key, until it is answered."""

    def post() -> str:
        try:
            response = cluster.post(body, key=key)
        except httpx2.TransportError:
            return ""
        return str(response.json()["id"]) if response.status_code == 202 else ""

    return until(post, seconds=60)


class Stage:
    """A cluster of one slot, and the points where its processes may die."""

    def __init__(self, cluster: Cluster, failpoints: Failpoints) -> None:
        self.cluster = cluster
        self.failpoints = failpoints
        (self.worker,) = cluster.workers

    def body(self, *, step_ms: int = 10) -> Json:
        return self.cluster.body(steps=30, checkpoint_steps=CHECKPOINT_STEPS, step_ms=step_ms)

    def submit(self) -> str:
        """A job that is done before long."""
        return insist(self.cluster, self.body(), secrets.token_hex(8))

    def train(self) -> str:
        """A job that is in the middle of its training."""
        job_id = insist(self.cluster, self.body(step_ms=100), secrets.token_hex(8))
        self.cluster.wait(job_id, lambda row: row["step"] >= 1)
        return job_id

    def roles(self) -> dict[str, list[int]]:
        return {
            "api": self.cluster.api.servers(),
            "worker": [self.worker.pid],
            "celery": self.worker.celery(),
            "pool child": self.worker.pool_children(),
        }


EVERY_RUN = {
    Point.REQUEST_AFTER_COMMIT, Point.WEBHOOK_AFTER_SEND, Point.CLAIM_AFTER_COMMIT,
    Point.HANDOVER_AFTER_COMMIT, Point.PUBLISH_AFTER_MANIFEST,
}  # fmt: skip
"""Where dying has cost the most thought; the others run on demand."""

ABOVE = {
    "api": ["worker", "celery", "pool child"],
    "worker": [],
    "pool child": ["api", "worker", "celery"],
    "trainer": ["api", "worker", "celery", "pool child"],
}
"""Who has to live on, by who dies."""

Schedule = Callable[[Stage, Point], str]


def submitted(stage: Stage, point: Point) -> str:
    """The point lies on the way of every job."""
    stage.failpoints.arm(point)
    job_id = stage.submit()
    stage.failpoints.wait(point)
    return job_id


def told_to_a_webhook(stage: Stage, point: Point) -> str:
    """Nobody listens there, which is an attempt all the same."""
    stage.failpoints.arm(point)
    body = {**stage.body(), "webhook_url": f"http://127.0.0.1:{DISCARD}/"}
    job_id = insist(stage.cluster, body, secrets.token_hex(8))
    stage.failpoints.wait(point)
    return job_id


def relayed_by_the_worker(stage: Stage, point: Point) -> str:
    """The API dies between the commit and the nudge of its own relay."""
    api, key = stage.cluster.api, secrets.token_hex(8)
    stage.failpoints.arm(point)
    stage.failpoints.arm(Point.REQUEST_AFTER_COMMIT)
    with pytest.raises(httpx2.TransportError):
        stage.cluster.post(stage.body(), key=key)
    api.kill()
    stage.failpoints.wait(Point.REQUEST_AFTER_COMMIT)
    stage.failpoints.wait(point)
    api.start()
    return insist(stage.cluster, stage.body(), key)


def trainer_killed(stage: Stage, point: Point) -> str:
    job_id = stage.train()
    stage.failpoints.arm(point)
    stage.cluster.kill("trainer", job_id=job_id)
    stage.failpoints.wait(point)
    return job_id


def pool_child_killed(stage: Stage, point: Point) -> str:
    """The next one puts back what the slot has held, and dies of that."""
    job_id = stage.train()
    stage.failpoints.arm(point)
    stage.cluster.kill("pool child", job_id=job_id)
    stage.failpoints.wait(point)
    return job_id


def lease_run_out(stage: Stage, point: Point) -> str:
    """The supervisor hangs, so that the worker's parent puts the job back."""
    job_id = stage.train()
    (child,) = stage.worker.pool_children(busy=True)
    send(child, signal.SIGSTOP)
    count("pool child frozen")
    stage.failpoints.arm(point)
    stage.failpoints.wait(point, seconds=60)
    return job_id


def worker_drained(stage: Stage, point: Point) -> str:
    """Its parent ends as if nothing had been."""
    job_id = stage.train()
    stage.failpoints.arm(point)
    assert stage.worker.stop() == 0
    stage.failpoints.wait(point, seconds=0.1)
    return job_id


WHERE: dict[Point, tuple[str, Schedule]] = {
    Point.REQUEST_BEFORE_COMMIT: ("api", submitted),
    Point.REQUEST_AFTER_COMMIT: ("api", submitted),
    Point.RELAY_BEFORE_SEND: ("api", submitted),
    Point.RELAY_AFTER_SEND: ("api", submitted),
    Point.WEBHOOK_BEFORE_NOTICED: ("api", told_to_a_webhook),
    Point.WEBHOOK_BEFORE_SEND: ("api", told_to_a_webhook),
    Point.WEBHOOK_AFTER_SEND: ("api", told_to_a_webhook),
    Point.CLAIM_BEFORE_COMMIT: ("pool child", submitted),
    Point.CLAIM_AFTER_COMMIT: ("pool child", submitted),
    Point.INPUTS_BEFORE_PIN: ("pool child", submitted),
    Point.INPUTS_AFTER_PIN: ("pool child", submitted),
    Point.HEARTBEAT_BEFORE_COMMIT: ("pool child", submitted),
    Point.HEARTBEAT_AFTER_COMMIT: ("pool child", submitted),
    Point.CHECKPOINT_FILES_WRITTEN: ("trainer", submitted),
    Point.CHECKPOINT_RENAMED: ("trainer", submitted),
    Point.HANDOVER_BEFORE_UPLOAD: ("pool child", submitted),
    Point.HANDOVER_BEFORE_COMMIT: ("pool child", submitted),
    Point.HANDOVER_AFTER_COMMIT: ("pool child", submitted),
    Point.PUBLISH_BEFORE_BLOBS: ("pool child", submitted),
    Point.PUBLISH_AFTER_BLOBS: ("pool child", submitted),
    Point.PUBLISH_AFTER_MANIFEST: ("pool child", submitted),
    Point.END_BEFORE_COMMIT: ("pool child", submitted),
    Point.END_AFTER_COMMIT: ("pool child", submitted),
    Point.REQUEUE_BEFORE_COMMIT: ("pool child", trainer_killed),
    Point.REQUEUE_AFTER_COMMIT: ("pool child", trainer_killed),
}
"""Which process dies there, and how it is brought there."""

OTHER_WAYS: list[tuple[Point, str, Schedule]] = [
    (Point.RELAY_BEFORE_SEND, "worker", relayed_by_the_worker),
    (Point.REQUEUE_BEFORE_COMMIT, "pool child", pool_child_killed),
    (Point.REQUEUE_BEFORE_COMMIT, "pool child", worker_drained),
    (Point.RELAY_AFTER_SEND, "worker", relayed_by_the_worker),
    (Point.REQUEUE_AFTER_COMMIT, "pool child", pool_child_killed),
    (Point.REQUEUE_AFTER_COMMIT, "pool child", worker_drained),
    (Point.REQUEUE_BEFORE_COMMIT, "worker", lease_run_out),
    (Point.REQUEUE_AFTER_COMMIT, "worker", lease_run_out),
]
"""Points that several processes come by, or by several ways."""

USES_AN_ATTEMPT = {
    Point.CHECKPOINT_FILES_WRITTEN, Point.CHECKPOINT_RENAMED, Point.REQUEUE_AFTER_COMMIT,
}  # fmt: skip
"""The trainer has died, and somebody lived to write so."""


@pytest.fixture(scope="class")
def stage(shared: MakeCluster, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    failpoints = Failpoints(tmp_path_factory.mktemp("points") / "armed")
    # A lease in which a slot is put in order again also where others use the machine.
    more = {"FLATLORA_LEASE_SECONDS": "15"}
    return Stage(shared(environment={**failpoints.environment, **WEBHOOKS, **more}), failpoints)


class TestEveryPoint:
    @pytest.fixture(autouse=True)
    def whole(self, stage: Stage) -> Iterator[None]:
        make_whole(stage.cluster)
        yield
        for point in Point:
            stage.failpoints.disarm(point)

    @pytest.mark.parametrize(
        "point",
        [
            point if point in EVERY_RUN else pytest.param(point, marks=pytest.mark.torture)
            for point in Point
        ],
    )
    def test_a_job_outlives_it(self, stage: Stage, point: Point) -> None:
        role, schedule = WHERE[point]
        job_id = dies_once(stage, point, role, schedule)
        row = stage.cluster.row(job_id)
        assert row["attempt"] == (2 if point in USES_AN_ATTEMPT else 1)

    @pytest.mark.parametrize(
        ("point", "role", "schedule"),
        [
            *OTHER_WAYS[:1],
            *(pytest.param(*way, marks=pytest.mark.torture) for way in OTHER_WAYS[1:]),
        ],
    )
    def test_also_where_it_is_come_by_otherwise(
        self, stage: Stage, point: Point, role: str, schedule: Schedule
    ) -> None:
        dies_once(stage, point, role, schedule)

    @pytest.mark.torture
    @pytest.mark.parametrize("time", range(10))
    @pytest.mark.parametrize("point", Point)
    def test_and_outlives_it_each_time(self, stage: Stage, point: Point, time: int) -> None:
        if WHERE[point][0] == "api":
            stage.cluster.api.restart()  # else its parent waits longer after each death
        dies_once(stage, point, *WHERE[point])


def dies_once(stage: Stage, point: Point, role: str, schedule: Schedule) -> str:
    """Let a job come by the point; it ends as if nothing had been there."""
    cluster = stage.cluster
    before = stage.roles()
    job_id = schedule(stage, point)
    until(lambda: not any(map(is_alive, before.get(role, []))), seconds=5)
    if schedule not in {relayed_by_the_worker, worker_drained}:  # those end others themselves
        assert all(is_alive(pid) for name in ABOVE[role] for pid in before[name])
    for node in cluster.nodes:
        if not node.is_running:
            node.start()
    row = cluster.finish(job_id)
    assert_clean(cluster, job_id)
    (same,) = cluster.query("SELECT count(*) AS jobs FROM jobs WHERE id = %s", job_id)
    assert same["jobs"] == 1
    # What was trained again is less than what lies between two checkpoints, for each death.
    assert repeated_steps(cluster.executions(job_id)) <= 2 * CHECKPOINT_STEPS
    until(lambda: not cluster.query("SELECT 1 FROM outbox"), seconds=10)
    make_whole(cluster)
    assert_no_orphans(cluster)
    assert cluster.row(job_id)["fence"] == row["fence"], "it was claimed again after its end"
    return job_id


class TestTheList:
    def test_every_point_has_a_schedule_here(self) -> None:
        assert list(WHERE) == list(Point)

    def test_every_point_lies_at_one_place_of_the_code(self) -> None:
        uses = Counter(
            name for folder in ("app", "worker") for path in (ROOT / folder).rglob("*.py")
            for name in _points(path) if path != ROOT / "app" / "failpoints.py"
        )  # fmt: skip
        assert uses == Counter(point.name for point in Point)

    def test_the_tiny_trainer_has_those_of_the_real_one(self) -> None:
        real = ROOT / "worker" / "training" / "checkpoints.py"
        tiny = ROOT / "tests" / "faults" / "tiny_trainer.py"
        assert _points(tiny) == _points(real)
        assert len(_points(real)) == 2


def _points(path: Path) -> list[str]:
    """Names of the points in a file, in order."""
    return [
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == Point.__name__
    ]
