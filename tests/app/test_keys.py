"""Keys: what each role may do, in which project, until when, and what is written down of it."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from structlog.testing import capture_logs
from typer.testing import CliRunner

from app.access.authenticator import REVOKED_WITHIN_SECONDS
from app.access.keys import key_id
from app.access.keys import make_key as new_key
from app.cli.main import cli
from app.db import now
from app.main import create_app
from app.settings import Settings, get_settings
from tests.app.conftest import make_settings, serve
from tests.app.keys import acting, audited, bearer, change_key, key_row, make_key, operator
from tests.app.listening import said
from tests.app.service import Service, ok
from tests.system.service import until

ROWS = {"Content-Type": "application/x-ndjson"}
READS = ["/jobs", "/datasets", "/models", "/workers", "/quota"]


@pytest.fixture
def settings(tmp_path: Path, migrated_sqlite_url: str) -> Settings:
    return make_settings(tmp_path, migrated_sqlite_url, auth="key")


@pytest.fixture(params=["sqlite", "postgres"])
def any_service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    url = request.getfixturevalue(f"migrated_{request.param}_url")
    yield from serve(make_settings(tmp_path, url, auth="key"))


class TestRoles:
    @pytest.mark.parametrize(
        ("role", "may"),
        [
            ("viewer", set()),
            ("submitter", {"submit", "upload", "cancel"}),
            ("admin", {"submit", "upload", "cancel", "keys", "make", "revoke", "audit"}),
        ],
    )
    def test_each_may_do_what_it_may_and_no_more(
        self, service: Service, role: str, may: set[str]
    ) -> None:
        with acting(service, make_key(service, "search")["key"]):
            job_id = service.submit()["id"]
        other = make_key(service, "search", "viewer")["id"]
        with acting(service, make_key(service, "search", role)["key"]) as http:
            for path in READS:
                assert http.get(path).status_code == 200, path
            answers = {
                "submit": service.post(service.body),
                "upload": http.post("/datasets?filename=a.jsonl", content=b"{}", headers=ROWS),
                "cancel": http.post(f"/jobs/{job_id}/cancel"),
                "keys": http.get("/keys"),
                "make": http.post("/keys", json={"name": "x"}),
                "revoke": http.delete(f"/keys/{other}"),
                "audit": http.get("/audit"),
            }
        assert {name for name, answer in answers.items() if answer.is_success} == may
        for name in answers.keys() - may:
            refusal = ok(answers[name], 403)
            assert refusal["code"] == "forbidden"
            assert f"a {role}'s" in refusal["detail"]

    def test_a_viewer_is_refused_before_the_body_is_looked_at(self, service: Service) -> None:
        with acting(service, make_key(service, role="viewer")["key"]) as http:
            ok(http.post("/datasets?filename=a.jsonl", content=b"", headers=ROWS), 403)

    def test_an_unknown_role_or_project_name_is_refused(self, service: Service) -> None:
        for wrong in ({"role": "root"}, {"project": "A B"}, {"project": "x" * 64}, {"name": ""}):
            body = {"name": "x"} | wrong
            ok(service.http.post("/keys", json=body, headers=operator(service)), 422)


class TestProjects:
    def test_the_operator_makes_keys_of_any_and_an_admin_of_its_own_alone(
        self, service: Service
    ) -> None:
        admin = make_key(service, "search", "admin")
        with acting(service, admin["key"]) as http:
            refusal = ok(http.post("/keys", json={"name": "x", "project": "other"}), 403)
            assert "makes keys of no other" in refusal["detail"]
            made = ok(http.post("/keys", json={"name": "x", "role": "viewer"}), 201)
            assert made["project"] == "search"
            assert made["created_by"] == f"admin of search ({admin['id']})"

    def test_an_admin_sees_and_revokes_keys_of_its_project_alone(self, service: Service) -> None:
        foreign = make_key(service, "other")
        admin = make_key(service, "search", "admin")
        with acting(service, admin["key"]) as http:
            listed = service.get("/keys")["items"]
            assert [key["id"] for key in listed] == [admin["id"]]
            assert ok(http.delete(f"/keys/{foreign['id']}"), 404)["code"] == "key_not_found"
        assert key_row(service, foreign["id"]).revoked_at is None

    def test_idempotency_keys_of_two_projects_do_not_meet(self, service: Service) -> None:
        jobs = set()
        for project in ("search", "other"):
            with acting(service, make_key(service, project)["key"]):
                jobs.add(ok(service.post(service.body, Idempotency_Key="same"), 202)["id"])
        assert len(jobs) == 2

    def test_a_request_that_names_another_project_than_its_keys_is_refused(
        self, service: Service
    ) -> None:
        key = make_key(service, "search")["key"]
        for project, status in (("search", 200), ("other", 403)):
            headers = bearer(key) | {"Flatlora-Project": project}
            assert service.http.get("/jobs", headers=headers).status_code == status

    def test_without_keys_everybody_is_in_the_default_one(
        self, tmp_path: Path, migrated_sqlite_url: str
    ) -> None:
        for service in serve(make_settings(tmp_path, migrated_sqlite_url)):
            made = ok(service.http.post("/keys", json={"name": "x", "project": "other"}), 201)
            assert made["created_by"] == "anybody"
            job_id = service.submit()["id"]
            with acting(service, made["key"]):  # asked for nothing, so it opens nothing else
                assert service.get(f"/jobs/{job_id}")["id"] == job_id
            assert service.get("/quota")["project"] == "default"
            assert {actor for _, actor, _, _ in audited(service)} == {"anybody"}


class TestLife:
    def test_a_revoked_one_opens_nothing_more_within_five_seconds(self, service: Service) -> None:
        made = make_key(service)
        headers = bearer(made["key"])
        assert service.http.get("/jobs", headers=headers).status_code == 200
        path = f"/keys/{made['id']}"
        revoked = ok(service.http.delete(path, headers=operator(service)), 200)
        started = time.monotonic()
        until(lambda: service.http.get("/jobs", headers=headers).status_code == 401, every=0.2)
        assert REVOKED_WITHIN_SECONDS == 5
        assert time.monotonic() - started < REVOKED_WITHIN_SECONDS + 4
        again = ok(service.http.delete(path, headers=operator(service)), 200)
        assert again["revoked_at"] == revoked["revoked_at"]

    def test_one_expires_at_its_moment_though_it_was_used_just_before(
        self, any_service: Service
    ) -> None:
        made = make_key(any_service, expires_in_days=1)
        change_key(any_service, made["id"], expires_at=now(2))
        headers = bearer(made["key"])
        assert any_service.http.get("/jobs", headers=headers).status_code == 200
        started = time.monotonic()
        until(lambda: any_service.http.get("/jobs", headers=headers).status_code == 401, every=0.02)
        assert time.monotonic() - started < 4.5  # less than a key is believed for

    def test_its_last_use_is_noted_to_the_minute(self, any_service: Service) -> None:
        made = make_key(any_service)
        assert made["last_used_at"] is None
        any_service.http.get("/jobs", headers=bearer(made["key"]))
        first = until(lambda: key_row(any_service, made["id"]).last_used_at)

        def use_elsewhere() -> None:
            """In a process that has not seen the key yet, and has written all when it ends."""
            with TestClient(create_app(any_service.settings), base_url="http://localhost") as http:
                assert http.get("/jobs", headers=bearer(made["key"])).status_code == 200

        use_elsewhere()
        assert key_row(any_service, made["id"]).last_used_at == first
        change_key(any_service, made["id"], last_used_at=now(-61))
        use_elsewhere()
        last = key_row(any_service, made["id"]).last_used_at
        assert last is not None
        assert first is not None
        assert last >= first

    def test_a_busy_client_costs_the_database_one_look_up_in_five_seconds(
        self, service: Service
    ) -> None:
        headers = bearer(make_key(service)["key"])
        with said("SELECT api_keys") as statements:
            for _ in range(20):
                assert service.http.get("/models", headers=headers).status_code == 200
        assert len(statements) <= 3  # one for the key, one to note its use, one if it took long


class TestForm:
    def test_a_mistyped_one_is_refused_without_asking_the_database(self) -> None:
        key = new_key().key
        assert key_id(key) == key.split("_")[1]
        for place in range(4, len(key)):
            wrong = key[:place] + ("0" if key[place] != "0" else "1") + key[place + 1 :]
            assert key_id(wrong) is None

    def test_it_is_one_that_scanners_of_secrets_know(self) -> None:
        made = {new_key().key for _ in range(100)}
        assert len(made) == 100
        for key in made:
            assert re.fullmatch(r"flk_[0-9a-f]{12}_[A-Za-z0-9]{40}_[0-9a-f]{8}", key)

    def test_with_the_id_of_another_and_a_right_checksum_it_opens_nothing(
        self, service: Service
    ) -> None:
        import zlib

        made = make_key(service)
        body = f"flk_{made['id']}_{'a' * 40}"
        forged = f"{body}_{zlib.crc32(body.encode()):08x}"
        assert key_id(forged) == made["id"]
        ok(service.http.get("/jobs", headers=bearer(forged)), 401)


class TestSecrets:
    def test_a_key_is_shown_once_and_is_nowhere_else(
        self, service: Service, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with capture_logs() as logs:
            made = make_key(service, "search", "admin")
            secret = made["key"].split("_")[2]
            with acting(service, made["key"]) as http:
                shown = [
                    http.get("/keys").text,
                    http.get("/audit").text,
                    http.get("/jobs").text,
                    http.delete("/keys/unknown").text,
                    http.post("/keys", json={"name": made["key"], "role": 1}).text,
                    http.get("/nowhere").text,
                ]
            wrong = made["key"][:-1] + "!"
            shown.append(service.http.get("/jobs", headers=bearer(wrong)).text)
        kept = service.settings.database.removeprefix("sqlite:///")
        written = Path(kept).read_bytes() + Path(f"{kept}-wal").read_bytes()
        assert secret.encode() not in written
        assert secret not in json.dumps(logs, default=str)
        assert secret not in "".join(capfd.readouterr())
        assert [text for text in shown if secret in text] == []


class TestAudit:
    def test_every_change_leaves_a_line_and_nothing_else_does(self, service: Service) -> None:
        made = make_key(service, "search", "admin")
        actor = f"admin of search ({made['id']})"
        before = audited(service)
        assert before == [("search", "operator", "create_key", made["id"])]
        with acting(service, made["key"]) as http:
            key = {"Idempotency_Key": "k"}
            job_id = ok(service.post(service.body, **key), 202)["id"]
            assert ok(service.post(service.body, **key), 202)["id"] == job_id
            dataset = ok(http.post("/datasets?filename=a.jsonl", content=b"{}", headers=ROWS), 201)
            ok(http.post("/datasets?filename=a.jsonl", content=b"{}", headers=ROWS), 200)
            ok(http.post(f"/jobs/{job_id}/cancel"), 202)
            second = ok(http.post("/keys", json={"name": "x"}), 201)["id"]
            ok(http.delete(f"/keys/{second}"), 200)
            # Refusals and readings:
            service.refused(service.body | {"rank": 0})
            ok(http.post("/jobs/job_0/cancel"), 404)
            ok(http.delete("/keys/ffffffffffff"), 404)
            ok(http.post("/keys", json={"name": "x", "project": "other"}), 403)
            service.get("/jobs")
            told = service.get("/audit")["items"]
        assert audited(service)[1:] == [
            ("search", actor, "create_job", job_id),
            ("search", actor, "create_dataset", dataset["id"]),
            ("search", actor, "cancel_job", job_id),
            ("search", actor, "create_key", second),
            ("search", actor, "revoke_key", second),
        ]
        assert [line["action"] for line in reversed(told)] == [
            action for _, _, action, _ in audited(service)
        ]

    def test_a_project_sees_its_own_lines_alone_in_pages_and_by_filter(
        self, service: Service
    ) -> None:
        make_key(service, "other", "admin")
        admin = make_key(service, "search", "admin")
        with acting(service, admin["key"]):
            ids = [service.submit()["id"] for _ in range(3)]
            page = service.get("/audit", limit=2)
            assert [line["object"] for line in page["items"]] == ids[:0:-1]
            rest = service.get("/audit", limit=2, before=page["next"])
            assert [line["object"] for line in rest["items"]] == [ids[0], admin["id"]]
            assert rest["next"] is None
            found = service.get("/audit", action="create_job", object=ids[1])["items"]
            assert [line["object"] for line in found] == [ids[1]]
            assert re.fullmatch(r"[0-9a-f]{32}", found[0]["request_id"])


class TestCommand:
    @pytest.fixture(params=["sqlite", "postgres"])
    def url(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        url: str = request.getfixturevalue(f"migrated_{request.param}_url")
        monkeypatch.setenv("FLATLORA_DATABASE_URL", url)
        get_settings.cache_clear()
        yield url
        get_settings.cache_clear()

    def test_keys_are_made_shown_and_revoked_beside_the_service(
        self, url: str, tmp_path: Path
    ) -> None:
        def run(*words: str) -> str:
            done = CliRunner().invoke(cli, ["keys", *words])
            assert done.exit_code == 0, done.output
            return done.stdout

        made = json.loads(run("create", "nightly", "--project", "search", "--json"))
        assert (made["role"], made["created_by"]) == ("submitter", "operator")
        for service in serve(make_settings(tmp_path, url, auth="key")):
            with acting(service, made["key"]):
                assert service.get("/quota")["project"] == "search"
            listed = json.loads(run("list", "--json"))["items"]
            assert [key["id"] for key in listed] == [made["id"]]
            assert made["key"] not in json.dumps(listed)
            revoked = json.loads(run("revoke", made["id"], "--json"))
            assert revoked["revoked_at"]
            assert "revoked" in run("list")
            actor = "operator (command line)"
            assert audited(service) == [
                ("search", actor, "create_key", made["id"]),
                ("search", actor, "revoke_key", made["id"]),
            ]

    @pytest.mark.parametrize(
        ("words", "code"),
        [
            (["create", "x", "--project", "A B"], 2),
            (["create", "x", "--role", "root"], 2),
            (["create", "x", "--expires-days", "0"], 2),
            (["revoke", "unknown"], 1),
        ],
    )
    def test_what_it_cannot_do_it_says(
        self, migrated_sqlite_url: str, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int
    ) -> None:
        monkeypatch.setenv("FLATLORA_DATABASE_URL", migrated_sqlite_url)
        get_settings.cache_clear()
        assert CliRunner().invoke(cli, ["keys", *words]).exit_code == code
        get_settings.cache_clear()
