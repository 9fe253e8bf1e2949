"""A wish to pause reaches the trainer, and whatever happens then, the job is paused or over."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Engine

from app.db import now
from app.jobs.states import Reason, Status
from app.settings import Settings
from tests.system.service import until
from tests.worker.jobs import (
    Json,
    add_job,
    change,
    claimed,
    event_types,
    expire,
    make_spec,
    outbox,
    row,
)
from worker.claims import Claims
from worker.lease import Lease, LeaseLost
from worker.slot import Bench, Slot

ROWS = '{"prompt": "1", "completion": "1"}\n'

BOTH = pytest.mark.parametrize("migrated_url", ["sqlite", "postgres"], indirect=True)

ENDS: dict[str, Callable[[Claims, Lease], object]] = {
    "drained": lambda claims, lease: claims.release(lease, "drained"),
    "its trainer died": lambda claims, lease: claims.lose(lease, Reason.WORKER_LOST, "died"),
    "its lease ran out": lambda claims, _: claims.reap(),
    "its worker was restarted": lambda claims, _: claims.recover(),
}


@pytest.fixture
def migrated_url(request: pytest.FixtureRequest) -> str:
    """SQLite where a test does not ask for both."""
    url: str = request.getfixturevalue(f"migrated_{getattr(request, 'param', 'sqlite')}_url")
    return url


@BOTH
class TestNobodyRunsIt:
    @pytest.mark.parametrize("end", ENDS)
    def test_so_it_is_paused_and_goes_on_when_it_is_resumed(
        self, engine: Engine, claims: Claims, end: str
    ) -> None:
        checkpoint = {"fence": 1, "step": 5, "files": []}
        job_id = add_job(engine, checkpoint=checkpoint)
        lease = claimed(claims)
        change(engine, job_id, status=Status.PAUSING)
        if end == "its lease ran out":
            expire(engine, job_id)
        ENDS[end](claims, lease)
        job = row(engine, job_id)
        assert (job.status, job.worker, job.lease_until, job.phase) == ("paused", None, None, None)
        assert job.checkpoint == checkpoint, "it goes on from there"
        assert job.finished_at is None
        assert event_types(engine, job_id) == ["job.running", "job.paused"]
        assert claims.claim_next() is None
        change(engine, job_id, status=Status.QUEUED)
        assert claimed(claims).fence == 2

    @pytest.mark.parametrize("end", ["drained", "its worker was restarted"])
    def test_and_that_was_no_attempt(self, engine: Engine, claims: Claims, end: str) -> None:
        job_id = add_job(engine)
        lease = claimed(claims)
        change(engine, job_id, status=Status.PAUSING)
        ENDS[end](claims, lease)
        assert row(engine, job_id).attempt == 0

    def test_also_after_its_last_attempt_and_one_is_left_then(
        self, engine: Engine, claims: Claims
    ) -> None:
        job_id = add_job(engine, attempt=2)
        lease = claimed(claims)
        assert lease.attempt == 3
        change(engine, job_id, status=Status.PAUSING)
        claims.lose(lease, Reason.WORKER_LOST, "died")
        assert (row(engine, job_id).status, row(engine, job_id).attempt) == ("paused", 2)

    def test_no_worker_is_woken_for_it(self, engine: Engine) -> None:
        claims = Claims(engine, worker="w1", lease_seconds=60, max_attempts=3, wakes=True)
        job_id = add_job(engine)
        lease = claimed(claims)
        change(engine, job_id, status=Status.PAUSING)
        claims.release(lease, "drained")
        assert outbox(engine) == []

    def test_the_attempt_before_writes_no_more(self, engine: Engine, claims: Claims) -> None:
        job_id = add_job(engine)
        lease = claimed(claims)
        change(engine, job_id, status=Status.PAUSING)
        claims.release(lease, "drained")
        with pytest.raises(LeaseLost):
            claims.succeed(lease, result={}, adapter=None)
        with pytest.raises(LeaseLost):
            claims.beat(lease, [])
        assert row(engine, job_id).status == Status.PAUSED


@BOTH
class TestWishThatComesTooLate:
    def test_a_job_that_ends_before_is_over(self, engine: Engine, claims: Claims) -> None:
        for end in ("succeeded", "failed"):
            job_id = add_job(engine)
            lease = claimed(claims)
            change(engine, job_id, status=Status.PAUSING)
            if end == "succeeded":
                claims.succeed(lease, result={}, adapter=None)
            else:
                claims.fail(lease, Reason.DATASET_INVALID, "m", None)
            assert row(engine, job_id).status == end


@BOTH
def test_a_paused_job_does_not_wait_for_too_long(engine: Engine, claims: Claims) -> None:
    job_id = add_job(engine, status=Status.PAUSED, queue_deadline=now(-60))
    assert claims.expire() == 0
    assert row(engine, job_id).status == Status.PAUSED


@pytest.fixture
def settings(tmp_path: Path, migrated_url: str) -> Settings:
    return Settings(
        data_dir=tmp_path / "data",
        database_url=migrated_url,
        dataset_roots=[tmp_path],
        model_roots=[tmp_path],
        trainer_module="tests.worker.scripted_trainer",
        retry_seconds=0,
        drain_grace_seconds=3,
    )


Begin = Callable[..., str]


@pytest.fixture
def begin(engine: Engine, settings: Settings, tmp_path: Path) -> Begin:
    """A job whose trainer does what a script says."""
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(8))

    def begin(**script: object) -> str:
        uri, model = f"file:{tmp_path / 'rows.jsonl'}", f"file:{tmp_path / 'model'}"
        job_id = add_job(engine, spec=make_spec(base_model=model, dataset_uri=uri))
        folder = settings.work_dir / job_id
        folder.mkdir(parents=True)
        (folder / "script.json").write_text(json.dumps(script))
        return job_id

    return begin


def attempt(settings: Settings, draining: threading.Event, *, then: Callable[[], None]) -> None:
    """Run the job whose turn it is, and do something once its trainer is there."""
    bench = Bench(settings, Slot("slot-a", "cpu"), draining)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(bench.run_next)
        then()
        assert running.result(30)
    bench.close()


class TestRunningJob:
    def pause(self, engine: Engine, job_id: str) -> None:
        until(lambda: row(engine, job_id).phase == "training", seconds=20)
        change(engine, job_id, status=Status.PAUSING)

    @pytest.mark.parametrize("then", ["hang", "deaf"])
    def test_its_trainer_drains_or_is_killed_and_it_is_paused(
        self, engine: Engine, settings: Settings, begin: Begin, then: str
    ) -> None:
        step: Json = {"kind": "step", "step": 7, "total": 9, "metrics": {"loss": 1.0}}
        job_id = begin(then=then, says=[step])
        attempt(settings, threading.Event(), then=lambda: self.pause(engine, job_id))
        job = row(engine, job_id)
        assert (job.status, job.attempt, job.worker) == ("paused", 0, None)
        assert job.step == 7, "its last words are kept"
        assert (settings.work_dir / job_id / "signals").read_text().startswith("SIGTERM ")
        assert event_types(engine, job_id) == ["job.running", "job.paused"]
        assert (settings.work_dir / job_id / "dataset").is_dir(), "it goes on from its folder"

    def test_a_worker_that_stops_meanwhile_leaves_it_paused(
        self, engine: Engine, settings: Settings, begin: Begin
    ) -> None:
        job_id, draining = begin(then="deaf"), threading.Event()

        def pause_and_drain() -> None:
            self.pause(engine, job_id)
            draining.set()

        attempt(settings, draining, then=pause_and_drain)
        assert (row(engine, job_id).status, row(engine, job_id).attempt) == ("paused", 0)

    def test_one_that_is_cancelled_meanwhile_is_cancelled(
        self, engine: Engine, settings: Settings, begin: Begin
    ) -> None:
        job_id = begin(then="deaf")
        sent = settings.work_dir / job_id / "signals"

        def pause_and_cancel() -> None:
            self.pause(engine, job_id)
            until(sent.exists, seconds=20, every=0.01)
            change(engine, job_id, status=Status.CANCELLING)

        attempt(settings, threading.Event(), then=pause_and_cancel)
        assert row(engine, job_id).status == Status.CANCELLED
