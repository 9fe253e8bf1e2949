"""Every command against a service that keeps to the contract: what it prints, and how it ends."""

import hashlib
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import pytest
import typer
from typer.testing import CliRunner, Result

from app import __version__
from app.cli import watch
from app.cli.main import cli
from tests.client.conftest import peer as peer
from tests.client.conftest import served as served
from tests.client.peer import Json, Peer
from tests.client.test_downloads import ADAPTER, ROUTE, content

JOB = "job_" + "0" * 32
SHA256 = "ab" * 32
RUNNING = {"status": "running", "phase": "training", "total_steps": 10, "progress": None,
           "queue_position": None, "name": None, "created_at": "2026-11-27T10:00:00Z",
           "finished_at": None, "failure": None, "result": None,
           "spec": {"base_model": "m", "dataset_uri": "d", "rank": 16, "sigma": 0.05}}  # fmt: skip
DATASET = {"id": "ds_1", "uri": "dataset:ds_1", "filename": "[b]rows.jsonl", "size": 12345,
           "sha256": "ab" * 32, "created_at": "2026-11-27T10:00:00Z"}  # fmt: skip
FILE = {"name": "adapter_config.json", "size": 2, "sha256": "cd" * 32}
FINISHED = {"job_id": JOB, "name": "[b]mine", "labels": {}, "base_model": "Qwen/Qwen3", "rank": 8,
            "sigma": 0.1, "base_model_revision": "abc", "metrics": {}, "size": 1000,
            "files": [FILE], "created_at": "2026-11-27T10:00:00Z"}  # fmt: skip

Run = Callable[..., Result]


@pytest.fixture
def flatlora(peer: Peer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.setenv("FLATLORA_URL", peer.url)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(cli, arguments)

    return run


def shown(result: Result, code: int = 0) -> str:
    assert result.exit_code == code, result.output
    return result.stdout


def printed(result: Result, code: int = 0) -> Json:
    found: Json = json.loads(shown(result, code))
    return found


class TestJobs:
    @pytest.fixture(autouse=True)
    def job(self, peer: Peer) -> Json:
        return peer.add_job(**RUNNING)

    @pytest.mark.parametrize(
        ("action", "status"), [("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")]
    )
    def test_one_is_steered(self, peer: Peer, flatlora: Run, action: str, status: str) -> None:
        assert printed(flatlora("jobs", action, JOB, "--json"))["status"] == status
        assert JOB in shown(flatlora("jobs", action, JOB))
        assert len(peer.asked(f"POST /jobs/{JOB}/{action}")) == 2

    def test_one_is_run_once_more(self, flatlora: Run) -> None:
        again = printed(flatlora("jobs", "retry", JOB, "--json"))
        assert (again["retried_from"], again["id"]) == (JOB, JOB[:-1] + "1")

    def test_a_key_of_ones_own_makes_one_job_of_two_commands(
        self, peer: Peer, flatlora: Run
    ) -> None:
        given = ("jobs", "submit", "-m", "m", "-d", "dataset:ds_1", "--json")
        first, second, other = (
            printed(flatlora(*given, *more))["id"]
            for more in (("--idempotency-key", "mine"), ("--idempotency-key", "mine"), ())
        )
        assert first == second != other
        flatlora("jobs", "retry", JOB, "--idempotency-key", "again")
        [retried] = peer.asked(f"POST /jobs/{JOB}/retry")
        assert retried.headers["idempotency-key"] == "again"

    def test_they_are_filtered_by_when_they_were_made(self, peer: Peer, flatlora: Run) -> None:
        moment = "2026-11-27T10:00:00+01:00"
        assert flatlora("jobs", "list", "--created-after", moment).exit_code == 0
        assert unquote(peer.seen[0].query["created_after"]) == moment
        peer.jobs.clear()
        assert shown(flatlora("jobs", "list", "--created-after", moment)) == "no jobs here\n"

    def test_one_is_removed(self, peer: Peer, flatlora: Run) -> None:
        assert shown(flatlora("jobs", "delete", JOB)) == f"deleted {JOB}\n"
        assert peer.jobs == {}
        assert printed(flatlora("jobs", "delete", JOB, "--json"), 1)["error"]["status"] == 404

    def test_its_events_are_listed_or_followed(self, peer: Peer, flatlora: Run, job: Json) -> None:
        for kind in ("job.queued", "job.checkpoint", "job.succeeded"):
            peer.add_event(kind)
        assert printed(flatlora("jobs", "events", JOB, "--json"))["items"] == peer.events
        lines = shown(flatlora("jobs", "events", JOB, "--after", "1")).splitlines()
        assert [line.split()[:2] for line in lines] == [
            ["2", "job.checkpoint"],
            ["3", "job.succeeded"],
        ]
        followed = shown(flatlora("jobs", "events", JOB, "--follow", "--json"))
        assert [json.loads(line) for line in followed.splitlines()] == peer.events

    def test_so_is_its_log(self, peer: Peer, flatlora: Run, job: Json) -> None:
        peer.logs = [{"seq": seq, "text": f"[b]line {seq}"} for seq in (1, 2, 3)]
        job["status"] = "failed"
        assert printed(flatlora("jobs", "logs", JOB, "--json"))["items"] == peer.logs
        assert shown(flatlora("jobs", "logs", JOB, "-f")) == "[b]line 1\n[b]line 2\n[b]line 3\n"
        assert shown(flatlora("jobs", "logs", JOB, "--after", "2")) == "[b]line 3\n"

    def test_its_curves(self, peer: Peer, flatlora: Run) -> None:
        points = [
            {"step": step, "series": "train", "data": {"loss": 1 / step}} for step in (1, 2, 3)
        ]
        peer.answer(f"GET /jobs/{JOB}/metrics", {"items": points, "next": None})
        assert printed(flatlora("jobs", "metrics", JOB, "--json"))["items"] == points
        head, *rows = shown(flatlora("jobs", "metrics", JOB, "--last", "2")).splitlines()
        assert head.split() == ["step", "series", "loss"]
        assert [row.split() for row in rows] == [["2", "train", "0.5"], ["3", "train", "0.3333"]]

    def test_its_checkpoints(self, peer: Peer, flatlora: Run) -> None:
        found = [{"step": 5, "loss": 1.25, "size": 2000, "verified": True, "kept": False}]
        peer.answer(f"GET /jobs/{JOB}/checkpoints", {"items": found})
        assert printed(flatlora("jobs", "checkpoints", JOB, "--json")) == {"items": found}
        last = shown(flatlora("jobs", "checkpoints", JOB)).splitlines()[-1]
        assert last.split() == ["5", "1.25", "2.0", "kB", "yes", "no"]

    def test_its_messages(self, peer: Peer, flatlora: Run) -> None:
        tried = {"at": "2026-11-27T08:00:00Z", "seconds": 0.1, "error": None, "excerpt": "no"}
        found = [
            {
                "id": "msg_1", "job_id": JOB, "state": "failed",
                "event": {"seq": 7, "type": "job.succeeded"},
                "attempts": [{**tried, "status": 500}, {**tried, "status": 410}],
                "next_attempt_at": None, "created_at": "2026-11-27T08:00:00Z",
            }
        ]  # fmt: skip
        peer.answer(f"GET /jobs/{JOB}/deliveries", {"items": found})
        assert printed(flatlora("jobs", "deliveries", JOB, "--json")) == {"items": found}
        last = shown(flatlora("jobs", "deliveries", JOB)).splitlines()[-1]
        assert last.split() == ["msg_1", "job.succeeded", "failed", "2", "410"]

    def test_what_happens_is_told_while_it_is_watched(
        self, peer: Peer, flatlora: Run, job: Json, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """From when one looks: what was before is in its events."""
        monkeypatch.setattr(watch, "LAST_EVENTS_SECONDS", 30)
        peer.add_event("job.checkpoint")

        def finish() -> None:
            peer.add_event("job.evaluated")
            peer.add_event("job.succeeded")
            job.update(status="succeeded")

        peer.when("GET /jobs/*/events", finish, of=3)  # the first two look for what was before
        watched = flatlora("jobs", "watch", JOB)
        assert watched.exit_code == 0, watched.output
        assert "running" in watched.stderr or "training" in watched.stderr
        assert "evaluated  number 2" in watched.stderr
        assert "number 1" not in watched.stderr
        assert watched.stdout == f"succeeded {JOB}\n"

    def test_a_service_that_streams_nothing_is_watched_as_well(
        self, peer: Peer, flatlora: Run, job: Json
    ) -> None:
        peer.waits = peer.streams = False
        peer.when("GET /jobs/*", lambda: job.update(status="cancelled"), of=2)
        watched = flatlora("jobs", "watch", JOB, "--json")
        assert printed(watched, 3)["status"] == "cancelled"


class TestDownload:
    def test_one_that_was_interrupted_goes_on(
        self, peer: Peer, flatlora: Run, tmp_path: Path
    ) -> None:
        job_id = peer.publish(ADAPTER)["id"]
        peer.fail(ROUTE, bytes=1_000_000, after=True)
        peer.fail(ROUTE, status=503, times=9)
        assert flatlora("jobs", "download", job_id).exit_code == 1
        peer.faults.clear()
        assert shown(flatlora("jobs", "download", job_id)) == f"adapter in {job_id}\n"
        assert content(tmp_path / job_id) == ADAPTER
        assert peer.asked(ROUTE)[-1].headers["range"] == "bytes=1000000-"
        whole = flatlora("adapters", "download", job_id)
        assert (whole.exit_code, "exists already" in whole.stderr) == (2, True)

    @pytest.mark.parametrize("names", [["mine"], ["README.md", "adapter_config.json.part"]])
    def test_a_folder_of_something_else_is_left_alone(
        self, peer: Peer, flatlora: Run, tmp_path: Path, names: list[str]
    ) -> None:
        job_id = peer.publish({**ADAPTER, "README.md": b"theirs"})["id"]
        for name in names:
            (tmp_path / name).write_text("mine")
        done = flatlora("jobs", "download", job_id, "--to", str(tmp_path))
        assert done.exit_code == 2
        assert set(content(tmp_path).values()) == {b"mine"}

    def test_wrong_bytes_are_told(self, peer: Peer, flatlora: Run) -> None:
        job_id = peer.publish({"a": b"right"})["id"]
        peer.files = {"a": b"wrong"}
        done = printed(flatlora("jobs", "download", job_id, "--json"), 1)
        assert done["error"]["code"] == "hash_mismatch"

    def test_one_tar_goes_on_too_and_takes_no_others_place(
        self, peer: Peer, flatlora: Run, tmp_path: Path
    ) -> None:
        job_id = peer.publish(ADAPTER)["id"]
        route = "GET /jobs/*/adapter"
        peer.when(route, lambda: peer.fail(route, bytes=1_000_000, after=True), of=2)
        peer.when(route, lambda: peer.fail(route, status=503, times=9), of=3)
        assert flatlora("jobs", "download", job_id, "--tar").exit_code == 1
        peer.faults.clear()
        peer.changes.clear()
        done = printed(flatlora("jobs", "download", job_id, "--tar", "--json"))
        assert done == {"job_id": job_id, "file": str(tmp_path / f"{job_id}.tar")}
        assert peer.asked(route)[-1].headers["range"] == "bytes=1000000-"
        with tarfile.open(done["file"]) as tar:
            assert tar.getnames() == [f"adapter/{name}" for name in ADAPTER]
        again = flatlora("adapters", "download", job_id, "--tar")
        assert (again.exit_code, "exists already" in again.stderr) == (2, True)
        assert flatlora("adapters", "download", job_id, "--tar", "--to", "x/a.tar").exit_code == 0
        assert (tmp_path / "x" / "a.tar").is_file()


class TestDatasets:
    def test_a_file_is_uploaded(self, peer: Peer, flatlora: Run, tmp_path: Path) -> None:
        (tmp_path / "[b]rows.jsonl").write_text("{}\n")
        done = printed(flatlora("datasets", "upload", "[b]rows.jsonl", "--json"))
        assert (done["filename"], done["size"]) == ("[b]rows.jsonl", 3)
        assert "[b]rows.jsonl" in shown(flatlora("datasets", "upload", "[b]rows.jsonl"))
        named = printed(
            flatlora("datasets", "upload", "[b]rows.jsonl", "--name", "x.txt", "--json")
        )
        assert named["filename"] == "x.txt"
        assert flatlora("datasets", "upload", "none.jsonl").exit_code == 2

    def test_they_are_listed_shown_and_removed(self, peer: Peer, flatlora: Run) -> None:
        peer.answer("GET /datasets", {"items": [DATASET], "next": "ds_1"})
        peer.answer("GET /datasets/ds_1", DATASET)
        peer.answer("DELETE /datasets/ds_1", None)
        assert printed(flatlora("datasets", "list", "--json"))["next"] == "ds_1"
        listed = shown(flatlora("datasets", "list"))
        assert "[b]rows.jsonl" in listed
        assert "more: flatlora datasets list --after ds_1" in listed
        assert printed(flatlora("datasets", "show", "dataset:ds_1", "--json")) == DATASET
        assert "12.3 kB" in shown(flatlora("datasets", "show", "ds_1"))
        assert shown(flatlora("datasets", "delete", "dataset:ds_1")) == "deleted dataset:ds_1\n"

    def test_they_are_found_by_name_and_hash(self, peer: Peer, flatlora: Run) -> None:
        peer.answer("GET /datasets", {"items": [], "next": None})
        listed = shown(flatlora("datasets", "list", "--name", "rows.jsonl", "--sha256", SHA256))
        assert listed == "no datasets here\n"
        query = peer.seen[0].query
        assert (query["filename"], query["sha256"]) == ("rows.jsonl", SHA256)

    def test_an_upload_in_parts_is_looked_at_and_given_up(
        self, peer: Peer, flatlora: Run, tmp_path: Path
    ) -> None:
        (tmp_path / "rows.jsonl").write_text("{}\n")
        sha256 = hashlib.sha256(b"{}\n").hexdigest()
        state = {"sha256": sha256, "filename": "[b]rows", "size": 3000, "offset": 1000,
                 "part_size": 9, "dataset": None, "expires_at": "2026-11-28T10:00:00Z"}  # fmt: skip
        peer.answer(f"GET /datasets/uploads/{sha256}", state)
        peer.answer(f"DELETE /datasets/uploads/{sha256}", None)
        assert printed(flatlora("datasets", "upload-state", sha256, "--json")) == state
        looked_at = shown(flatlora("datasets", "upload-state", "rows.jsonl"))
        assert "1.0 kB of 3.0 kB" in looked_at
        assert "[b]rows" in looked_at
        assert sha256 in shown(flatlora("datasets", "forget-upload", "rows.jsonl"))
        assert flatlora("datasets", "forget-upload", "none.jsonl").exit_code == 2

    def test_one_that_is_read_is_refused_in_words(self, peer: Peer, flatlora: Run) -> None:
        peer.fail("DELETE /datasets/*", status=409)
        done = flatlora("datasets", "delete", "ds_1")
        assert (done.exit_code, "It is on_purpose." in done.stderr) == (1, True)


class TestTheRest:
    def test_adapters(self, peer: Peer, flatlora: Run) -> None:
        peer.answer("GET /adapters", {"items": [FINISHED], "next": None})
        peer.answer(f"GET /adapters/{JOB}", FINISHED)
        listed = flatlora("adapters", "list", "-m", "Qwen/Qwen3", "--label", "team=nlp", "--json")
        assert printed(listed)["items"] == [FINISHED]
        assert peer.seen[0].query["label.team"] == "nlp"
        assert "[b]mine" in shown(flatlora("adapters", "list"))
        assert printed(flatlora("adapters", "show", JOB, "--json")) == FINISHED
        described = shown(flatlora("adapters", "show", JOB))
        assert "Qwen/Qwen3 @ abc" in described
        assert str(FILE["sha256"]) in described

    def test_models(self, peer: Peer, flatlora: Run) -> None:
        tiny = {"id": "file:/m/tiny", "parameters": 1234, "has_chat_template": True,
                "limits": {"max_length": 4096, "max_rank": 8, "max_sigma": 1.0}}  # fmt: skip
        found = {"items": [tiny],
                 "hub": ["Qwen/*"], "limits": {"max_rank": 1024}}  # fmt: skip
        peer.answer("GET /models", found)
        assert printed(flatlora("models", "list", "--json")) == found
        listed = shown(flatlora("models", "list"))
        for words in ("file:/m/tiny", "1,234", "4096", "Qwen/*", "max_rank", "1024"):
            assert words in listed

    def test_quota_and_audit(self, peer: Peer, flatlora: Run) -> None:
        quota = {"running": {"used": 1, "allowed": 4}, "queued": {"used": 0, "allowed": None}}
        peer.answer("GET /quota", quota)
        assert printed(flatlora("quota", "--json")) == quota
        assert ["running.allowed", "4"] in [
            line.split() for line in shown(flatlora("quota")).splitlines()
        ]
        event = {"id": 7, "action": "create_job", "actor": "ci", "object": JOB, "request_id": "r"}
        peer.answer("GET /audit", {"items": [event], "next": 7})
        assert printed(flatlora("audit", "--json"))["items"] == [event]
        listed = shown(flatlora("audit", "--limit", "1"))
        assert "create_job" in listed
        assert "more: flatlora audit --before 7" in listed

    def test_webhooks(self, peer: Peer, flatlora: Run) -> None:
        peer.answer("POST /webhooks/test", {"status": 200})
        peer.answer("GET /webhooks/secret", {"secret": "whsec_old"})
        peer.answer("POST /webhooks/secret", {"secret": "whsec_new"})
        peer.answer("POST /deliveries/msg_1/retry", {"id": "msg_1", "state": "pending"})
        assert printed(flatlora("webhooks", "test", "https://a.example", "--json")) == {
            "status": 200
        }
        assert "whsec_old" in shown(flatlora("webhooks", "secret"))
        assert "whsec_new" in shown(flatlora("webhooks", "secret", "--rotate"))
        assert printed(flatlora("webhooks", "retry", "msg_1", "--json"))["state"] == "pending"

    def test_the_services_version_and_whether_it_is_ready(self, peer: Peer, flatlora: Run) -> None:
        told = {"version": "9.9", "features": {"auth": "key", "dataset_schemes": ["file:", "hf:"]}}
        peer.answer("GET /version", told)
        peer.answer("GET /readyz", {"status": "ok", "broker": None})
        assert shown(flatlora("version")) == f"flatlora {__version__}\n"
        assert peer.seen == []
        found = printed(flatlora("version", "--service", "--json"))
        assert found == {
            "version": __version__,
            "service": {"url": peer.url, **told, "ready": {"status": "ok", "broker": None}},
        }
        lines = [line.split() for line in shown(flatlora("version", "--service")).splitlines()]
        assert lines[0] == ["flatlora", __version__]
        assert ["service.features.dataset_schemes", "file:,", "hf:"] in lines
        assert ["ready.status", "ok"] in lines
        peer.fail("GET /readyz", status=503, times=9)
        ill = flatlora("version", "--service")
        assert (ill.exit_code, "9.9" in ill.stdout, "on_purpose" in ill.stderr) == (1, True, True)
        assert len(peer.asked("GET /readyz")) == 3

    def test_a_page_of_a_proxy_is_no_service(self, peer: Peer, flatlora: Run) -> None:
        peer.answer("GET /quota", [])
        done = printed(flatlora("quota", "--json"), 4)
        assert done["error"]["code"] == "unreachable"

    def test_every_command_that_asks_the_service_can_answer_a_program(self) -> None:
        tree = typer.main.get_command(cli)
        groups = ["jobs", "datasets", "adapters", "models", "workers", "webhooks"]
        commands = {
            f"{group} {name}": command
            for group in groups
            for name, command in tree.commands[group].commands.items()  # type: ignore[attr-defined]
        }
        assert len(commands) > 20
        without = [
            name
            for name, command in commands.items()
            if "--json" not in [option for found in command.params for option in found.opts]
        ]
        assert without == []
