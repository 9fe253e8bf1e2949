"""Whatever is killed, the adapter is the one that an unbroken run makes."""

import os
import signal

import pytest

from tests.system.service import Json, Service, processes, until


def hashes(job: Json) -> dict[str, str]:
    return {file["name"]: file["sha256"] for file in job["adapter"]["files"]}


@pytest.fixture(scope="module")
def unbroken(shared_service: Service) -> dict[str, dict[str, str]]:
    """Hashes of finished adapters, by the settings that made them."""
    return {}


@pytest.fixture
def expected(
    shared_service: Service, unbroken: dict[str, dict[str, str]], body: Json
) -> dict[str, str]:
    """What the same job makes when nobody disturbs it."""
    if "files" not in unbroken:
        unbroken["files"] = hashes(shared_service.finish(shared_service.submit(body)))
    return unbroken["files"]


@pytest.mark.torture
class TestKilledTrainer:
    def test_the_job_goes_on_to_a_byte_identical_adapter_with_each_step_recorded_once(
        self, service: Service, body: Json, expected: dict[str, str]
    ) -> None:
        job_id = service.submit(body)
        service.wait_for(job_id, lambda job: job["step"] >= 12)
        (trainer,) = service.trainers()
        os.kill(trainer, signal.SIGKILL)
        job = service.finish(job_id)
        assert job["attempt"] == 2
        assert hashes(job) == expected
        with service.http as http:
            series = http.get(f"/jobs/{job_id}/metrics", params={"series": "train"}).json()
        assert [metric["step"] for metric in series["items"]] == list(range(1, 61))

    @pytest.mark.torture
    def test_a_trainer_that_always_dies_fails_the_job_with_its_reason(
        self, service: Service, body: Json
    ) -> None:
        job_id = service.submit(body)
        seen: set[int] = set()

        def kill_each() -> bool:
            for pid in set(service.trainers()) - seen:
                os.kill(pid, signal.SIGKILL)
                seen.add(pid)
            return bool(service.job(job_id)["status"] == "failed")

        until(kill_each, seconds=60)
        job = service.job(job_id)
        assert len(seen) == 3
        assert job["failure"]["reason"] == "worker_lost"
        assert "attempt 3 of 3" in job["failure"]["message"]
        assert "SIGKILL" in job["failure"]["message"]


class TestKilledService:
    def test_the_job_goes_on_after_a_restart_to_a_byte_identical_adapter(
        self, service: Service, body: Json, expected: dict[str, str]
    ) -> None:
        job_id = service.submit(body)
        service.wait_for(job_id, lambda job: job["step"] >= 12)
        children = [*service.children(), *service.trainers()]
        assert len(children) == 3
        service.kill()
        until(lambda: not any(_lives(pid) for pid in children), seconds=10)
        service.start()
        job = service.finish(job_id)
        assert job["attempt"] == 1, "a killed service is not the job's fault"
        assert hashes(job) == expected

    @pytest.mark.torture
    def test_a_killed_dispatcher_is_started_again_and_its_trainer_is_gone(
        self, service: Service, body: Json, expected: dict[str, str]
    ) -> None:
        job_id = service.submit(body)
        service.wait_for(job_id, lambda job: job["step"] >= 12)
        dispatcher, (trainer,) = service.dispatcher(), service.trainers()
        os.kill(dispatcher, signal.SIGKILL)
        until(lambda: not _lives(trainer), seconds=10)
        assert hashes(service.finish(job_id)) == expected
        assert service.dispatcher() != dispatcher


@pytest.mark.torture
class TestPausedJob:
    def test_it_holds_nothing_and_goes_on_to_a_byte_identical_adapter(
        self, service: Service, body: Json, expected: dict[str, str]
    ) -> None:
        job_id = service.submit(body)
        step = service.wait_for(job_id, lambda job: job["step"] >= 12)["step"]
        with service.http as http:
            assert http.post(f"/jobs/{job_id}/pause").json()["status"] == "pausing"
        paused = service.wait_for(job_id, lambda job: job["status"] == "paused", seconds=20)
        assert not service.trainers()
        service.finish(service.submit({**body, "dry_run": True}))  # the slot is free
        with service.http as http:
            assert http.post(f"/jobs/{job_id}/resume").json()["status"] == "queued"
        job = service.finish(job_id)
        assert job["attempt"] == 1
        assert hashes(job) == expected
        with service.http as http:
            events = http.get(f"/jobs/{job_id}/events").json()["items"]
        types = [event["type"] for event in events if event["type"].startswith("job.paus")]
        assert types == ["job.pausing", "job.paused"]
        resumed = [event["data"] for event in events if event["type"] == "job.resumed"]
        assert resumed == [{}, {"step": paused["step"]}]
        assert paused["step"] >= step


class TestStoppedService:
    @pytest.mark.torture
    def test_it_drains_to_a_checkpoint_and_goes_on_from_there(
        self, service: Service, body: Json, expected: dict[str, str]
    ) -> None:
        job_id = service.submit(body)
        step = service.wait_for(job_id, lambda job: job["step"] >= 12)["step"]
        service.stop()
        assert not processes(str(service.data_dir))
        service.start()
        job = service.finish(job_id)
        assert job["attempt"] == 1
        assert hashes(job) == expected
        with service.http as http:
            events = http.get(f"/jobs/{job_id}/events").json()["items"]
        types = [event["type"] for event in events]
        assert "job.requeued" in types
        resumed = next(event for event in events if event["type"] == "job.resumed")
        assert resumed["data"]["step"] >= step

    def test_two_services_do_not_share_a_data_folder(self, service: Service) -> None:
        other = Service(service.folder / "other")
        other.folder.mkdir()
        other.environment["FLATLORA_DATA_DIR"] = str(service.data_dir)
        done = other.flatlora("up")
        assert done.returncode == 1
        assert "works in" in done.stdout + done.stderr


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
