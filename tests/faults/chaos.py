"""Faults at random. A seed determines which come when and for how long; not what each one meets."""

import random
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from app.failpoints import Point
from tests.faults.cluster import Cluster
from tests.faults.failpoints import Failpoints
from tests.faults.nodes import Node, Worker
from tests.faults.procs import end, naming, send
from tests.faults.proxy import Proxy
from tests.faults.servers import Server
from tests.faults.summary import count
from tests.faults.whole import make_whole

Thing = TypeVar("Thing")
Mend = Callable[[], None]

GAP_SECONDS = 1.5  # between faults on average
BURST, CALM_SECONDS = 8, 8  # after so many faults nothing breaks for a while, and work gets done
RESTART_SECONDS = 0.5  # until a service manager starts again what has died
STOP_SECONDS = 60  # that a worker may take to drain, whatever else is broken
TICK_SECONDS = 0.05
LEASE_SECONDS = 3

KINDS = {  # weight, and for how many seconds at most
    "kill_trainer": (5, 0),
    "kill_pool_child": (3, 0),
    "kill_celery": (2, 0),
    "kill_worker": (2, 4),
    "kill_api_server": (2, 0),
    "kill_api": (1, 3),
    "drain_worker": (3, 2),
    "freeze_worker": (3, 3 * LEASE_SECONDS),
    "kill_postgres": (2, 2 * LEASE_SECONDS),
    "stop_postgres": (2, 2 * LEASE_SECONDS),
    "kill_redis": (2, 6),
    "wipe_redis": (1, 0),
    "cut": (3, 5),
    "stall": (3, 5),
    "half_open": (3, 5),
    "slow": (2, 5),
    "cut_commit": (6, 0),
    "die_at_a_point": (6, 3),
    "sleep_at_a_point": (4, 3),
    "spoil_checkpoint": (3, 0),
}


@dataclass(frozen=True)
class Fault:
    at: float
    """Seconds after the beginning."""
    kind: str
    seconds: float
    """Until it is mended."""
    luck: float
    """From 0 to 1: which of those that are there it hits."""


def schedule(seed: int, seconds: float) -> list[Fault]:
    draw = random.Random(seed)
    faults: list[Fault] = []
    at = 0.0
    while (at := at + draw.expovariate(1 / GAP_SECONDS)) < seconds:
        (kind,) = draw.choices(list(KINDS), weights=[weight for weight, _ in KINDS.values()])
        longest = KINDS[kind][1]
        faults.append(Fault(at, kind, draw.uniform(0.1, 1) * longest, draw.random()))
        if len(faults) % BURST == 0:
            at += CALM_SECONDS
    return faults


def pick(things: Iterable[Thing], luck: float) -> list[Thing]:
    """One of them, if there are any."""
    found = list(things)
    return found[int(luck * len(found)) :][:1]


class Chaos:
    """Carries out a schedule, and is the service manager that starts again what has died."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        """Before the cluster is started: its processes get their failpoints."""
        self._cluster = cluster
        self._deadly = Failpoints(folder / "deadly", "kill")
        self._sleepy = Failpoints(folder / "sleepy", f"sleep:{LEASE_SECONDS / 2}")
        both = [points.environment for points in (self._deadly, self._sleepy)]
        for node in cluster.nodes:
            for name in both[0]:
                node.environment[name] = "; ".join(points[name] for points in both)
        self._log = folder / "chaos.log"
        self._mends: list[tuple[float, Mend]] = []
        self._down: set[Node | Server] = set()
        """What is not to be started yet."""
        self._died_at: dict[Node, float] = {}
        self.complaints: list[str] = []

    def run(self, faults: Sequence[Fault], seconds: float) -> None:
        """Until so many seconds have passed."""
        waiting, started = deque(faults), time.monotonic()
        while (now := time.monotonic() - started) < seconds:
            if waiting and waiting[0].at <= now:
                fault = waiting.popleft()
                self._tell(fault)
                if mend := getattr(self, fault.kind)(fault):
                    self._mends.append((time.monotonic() + fault.seconds, mend))
            self._mend_what_is_due()
            self._start_again()
            time.sleep(TICK_SECONDS)

    def _tell(self, fault: Fault) -> None:
        with self._log.open("a") as log:
            moment = time.strftime("%H:%M:%S", time.gmtime())
            log.write(f"{moment} {fault.kind} {fault.seconds:.1f} s, luck {fault.luck:.3f}\n")

    def calm(self) -> None:
        """No faults any more; returns when everything is there."""
        while self._mends:  # one that drains is not through at once
            self._mend_what_is_due(at_once=True)
            time.sleep(TICK_SECONDS)
        for proxy in self._proxies():
            proxy.pass_through()
        try:
            make_whole(self._cluster)
        except AssertionError:
            there = [f"{node.name}: {node.tree()}" for node in self._cluster.nodes]
            self.complaints.append(f"not everything is there after the last fault: {there}")

    def _mend_what_is_due(self, *, at_once: bool = False) -> None:
        now = float("inf") if at_once else time.monotonic()
        due = [mend for at, mend in self._mends if at <= now]
        self._mends = [(at, mend) for at, mend in self._mends if at > now]
        for mend in due:
            mend()

    def _start_again(self) -> None:
        for node in self._cluster.nodes:
            if node.is_running or node in self._down:
                self._died_at.pop(node, None)
            elif time.monotonic() > self._died_at.setdefault(node, time.monotonic()) + (
                RESTART_SECONDS
            ):
                node.launch()

    def _proxies(self) -> list[Proxy]:
        return [*self._cluster.proxies("postgres"), *self._cluster.proxies("redis")]

    def _workers(self) -> list[Worker]:
        return [worker for worker in self._cluster.workers if worker.is_running]

    # Processes

    def kill_trainer(self, fault: Fault) -> None:
        self._kill(
            "trainer", (pid for worker in self._workers() for pid in worker.trainers()), fault
        )

    def kill_pool_child(self, fault: Fault) -> None:
        pids = (pid for worker in self._workers() for pid in worker.pool_children())
        self._kill("pool child", pids, fault)

    def kill_celery(self, fault: Fault) -> None:
        self._kill(
            "celery main", (pid for worker in self._workers() for pid in worker.celery()), fault
        )

    def kill_api_server(self, fault: Fault) -> None:
        if self._cluster.api.is_running:
            self._kill("api server", self._cluster.api.servers(), fault)

    def _kill(self, what: str, pids: Iterable[int], fault: Fault) -> None:
        for pid in pick(pids, fault.luck):
            end([pid])
            count(f"{what} killed")

    def kill_api(self, _fault: Fault) -> Mend | None:
        return self._kill_node(self._cluster.api)

    def kill_worker(self, fault: Fault) -> Mend | None:
        for worker in pick(self._workers(), fault.luck):
            return self._kill_node(worker)
        return None

    def _kill_node(self, node: Node) -> Mend | None:
        if not node.is_running:
            return None
        node.kill()
        self._down.add(node)
        return lambda: self._down.discard(node)

    def drain_worker(self, fault: Fault) -> Mend | None:
        """It is started again when it has ended, as in an upgrade."""
        for worker in pick((it for it in self._workers() if it not in self._down), fault.luck):
            worker.terminate()
            self._down.add(worker)
            count("worker stopped")
            over = time.monotonic() + STOP_SECONDS
            return lambda: self._see_end_of(worker, over)
        return None

    def _see_end_of(self, worker: Worker, over: float) -> None:
        if not worker.is_running:
            self._down.discard(worker)
            # Killed by another fault, or stopped while it was still starting.
            if worker.exit_code not in {0, -signal.SIGKILL, -signal.SIGTERM}:
                self.complaints.append(f"{worker.name} was stopped and ended {worker.exit_code}")
        elif time.monotonic() < over:
            self._mends.append((time.monotonic() + 0.2, lambda: self._see_end_of(worker, over)))
        else:
            self._down.discard(worker)
            self.complaints.append(f"{worker.name} has not drained within {STOP_SECONDS} s")
            worker.kill()

    def freeze_worker(self, fault: Fault) -> Mend | None:
        for worker in pick(self._workers(), fault.luck):
            self._cluster.freeze(self._cluster.workers.index(worker))
            return lambda: self._thaw(worker)
        return None

    def _thaw(self, worker: Worker) -> None:
        """The whole machine: also a process whose parent was killed while it was being born."""
        self._cluster.thawed.append(time.time())
        for process in naming(str(worker.data_dir)):
            send(process.pid, signal.SIGCONT)

    # Servers

    def kill_postgres(self, _fault: Fault) -> Mend:
        return self._without(self._cluster.postgres, lambda: self._cluster.kill("postgres"))

    def stop_postgres(self, _fault: Fault) -> Mend:
        return self._without(self._cluster.postgres, self._cluster.stop_postgres)

    def kill_redis(self, _fault: Fault) -> Mend:
        return self._without(self._cluster.redis, lambda: self._cluster.kill("redis"))

    def _without(self, server: Server, stop: Callable[[], object]) -> Mend:
        if server.is_running:
            stop()
        return server.start

    def wipe_redis(self, _fault: Fault) -> None:
        if self._cluster.redis.is_running:
            self._cluster.wipe_redis()

    # Connections

    def cut(self, fault: Fault) -> Mend:
        return self._at_a_proxy(fault, Proxy.cut)

    def stall(self, fault: Fault) -> Mend:
        return self._at_a_proxy(fault, Proxy.stall)

    def half_open(self, fault: Fault) -> Mend:
        return self._at_a_proxy(fault, Proxy.half_open)

    def slow(self, fault: Fault) -> Mend:
        return self._at_a_proxy(fault, lambda proxy: proxy.slow(20_000))

    def _at_a_proxy(self, fault: Fault, what: Callable[[Proxy], None]) -> Mend:
        (proxy,) = pick(self._proxies(), fault.luck)
        what(proxy)
        return proxy.pass_through

    def cut_commit(self, fault: Fault) -> None:
        """Of a claim, of an end, or of whatever comes next."""
        nodes = self._cluster.proxies("postgres")
        words = [[], [b"job.running"], [b"job.succeeded"], [b"job.requeued"], [b"job.queued"]]
        for proxy, before in pick([(proxy, word) for word in words for proxy in nodes], fault.luck):
            proxy.cut_after(*before, b"COMMIT")

    # Failpoints

    def die_at_a_point(self, fault: Fault) -> Mend:
        return self._arm(self._deadly, fault)

    def sleep_at_a_point(self, fault: Fault) -> Mend:
        return self._arm(self._sleepy, fault)

    def _arm(self, points: Failpoints, fault: Fault) -> Mend:
        (point,) = pick(Point, fault.luck)
        with suppress(FileNotFoundError):  # armed already
            points.arm(point)
        return lambda: self._disarm(points, point)

    def _disarm(self, points: Failpoints, point: Point) -> None:
        if points.has_fired(point):
            points.wait(point)
        else:
            points.disarm(point)

    # Files

    def spoil_checkpoint(self, fault: Fault) -> None:
        """One byte of a file, on a machine or in the store."""
        folder = self._cluster.folder
        found = [
            *folder.glob("store/jobs/*/checkpoints/*/*/*"),
            *folder.glob("*/work/*/checkpoints/ckpt-*/*"),
        ]
        for path in pick(sorted(found), fault.luck):
            with suppress(FileNotFoundError), path.open("r+b") as file:
                if size := file.seek(0, 2):
                    file.seek(int(fault.luck * 7919) % size)
                    file.write(b"\xaa")
                    count("checkpoint spoiled")
