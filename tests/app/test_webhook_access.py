"""Who may read the secret, where webhooks may go, and what never leaves the service."""

from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session
from standardwebhooks import WebhookVerificationError
from structlog.testing import capture_logs

from app.access.keys import make_key
from app.access.principal import Role
from app.access.repository import add_key
from app.db import now
from app.settings import Settings
from app.tables import AuditRow, JobRow, WebhookDeliveryRow, WebhookSecretRow
from app.webhooks.secrets import SEALED
from tests.app.hooked import Hooked, hook_settings, hooked
from tests.app.net.world import NETWORK, PUBLIC, Forbidden, answer_names, listening
from tests.app.receiver import Receiver, receiving
from tests.app.service import Json, Service, faults, ok
from tests.system.service import until

SECRET_KEY = "a long random string, as it should be"  # noqa: S105 - of nothing


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def hook(tmp_path: Path, migrated_sqlite_url: str, receiver: Receiver) -> Iterator[Hooked]:
    with hooked(hook_settings(tmp_path, migrated_sqlite_url, receiver), receiver) as hook:
        yield hook


@pytest.fixture
def any_hook(tmp_path: Path, migrated_url: str, receiver: Receiver) -> Iterator[Hooked]:
    with hooked(hook_settings(tmp_path, migrated_url, receiver), receiver) as hook:
        yield hook


def sealing(folder: Path, url: str, receiver: Receiver, secret_key: str = SECRET_KEY) -> Settings:
    folder.mkdir(exist_ok=True)
    return hook_settings(folder, url, receiver, secret_key=secret_key)


def rotate(hook: Hooked) -> Json:
    return ok(hook.service.http.post("/webhooks/secret"), 200)


def told(hook: Hooked) -> None:
    job_id = hook.submit()
    hook.happen(job_id, "job.running")
    hook.settled(job_id)


def rows_of(hook: Hooked) -> WebhookSecretRow:
    with Session(hook.service.engine) as session:
        return session.scalars(select(WebhookSecretRow)).one()


class TestSecret:
    def test_it_is_made_once_and_rotated_with_a_day_in_which_both_sign(
        self, any_hook: Hooked
    ) -> None:
        old = any_hook.secret
        assert old.startswith("whsec_")
        assert any_hook.secret == old
        rotated = rotate(any_hook)
        new = rotated["secret"]
        assert new != old
        assert rotated["previous_until"] > rotated["created_at"]
        told(any_hook)
        message = any_hook.receiver.messages[-1]
        assert message.headers["webhook-signature"].count("v1,") == 2
        message.verify(old)
        message.verify(new)
        with Session(any_hook.service.engine) as session, session.begin():
            session.execute(update(WebhookSecretRow).values(previous_until=now(-1)))
        told(any_hook)
        message = any_hook.receiver.messages[-1]
        message.verify(new)
        with pytest.raises(WebhookVerificationError):
            message.verify(old)

    def test_it_is_nowhere_but_in_its_answer_and_its_row(self, hook: Hooked) -> None:
        with capture_logs() as logs:
            secret = hook.secret
            hook.receiver.answers(500)
            job_id = hook.submit()
            hook.happen(job_id, "job.running")
            hook.attempted(job_id)
        words = [str(logs), hook.service.http.get("/metrics").text]
        words += [hook.service.http.get(f"/jobs/{job_id}{end}").text for end in ("", "/deliveries")]
        words += [message.body.decode() for message in hook.receiver.messages]
        with Session(hook.service.engine) as session:
            for table in (AuditRow, JobRow, WebhookDeliveryRow):
                words += [str(vars(row)) for row in session.scalars(select(table))]
            audited = session.scalars(select(AuditRow.action)).all()
        assert not any(secret.removeprefix("whsec_") in word for word in words)
        assert "show_webhook_secret" in audited

    def test_with_a_key_of_the_service_the_database_has_it_sealed(
        self, tmp_path: Path, migrated_url: str, receiver: Receiver
    ) -> None:
        with hooked(sealing(tmp_path, migrated_url, receiver), receiver) as hook:
            told(hook)
            receiver.messages[0].verify(hook.secret)
            row = rows_of(hook)
            assert row.secret.startswith(SEALED)
            assert hook.secret.removeprefix("whsec_") not in row.secret
            first = hook.secret
            rotate(hook)
            told(hook)
            receiver.messages[-1].verify(first)

    def test_one_of_before_the_key_goes_on_until_it_is_rotated(
        self, tmp_path: Path, migrated_sqlite_url: str, receiver: Receiver
    ) -> None:
        with hooked(hook_settings(tmp_path, migrated_sqlite_url, receiver), receiver) as hook:
            plain = hook.secret
        settings = sealing(tmp_path / "again", migrated_sqlite_url, receiver)
        with hooked(settings, receiver) as hook:
            assert hook.secret == plain
            rotate(hook)
            assert rows_of(hook).secret.startswith(SEALED)
            told(hook)
            receiver.messages[-1].verify(plain)

    def test_with_another_key_nothing_is_sent_unsigned_and_rotating_mends_it(
        self, tmp_path: Path, migrated_sqlite_url: str, receiver: Receiver
    ) -> None:
        with hooked(sealing(tmp_path, migrated_sqlite_url, receiver), receiver) as hook:
            lost = hook.secret
        other = f"another {SECRET_KEY}"
        settings = sealing(tmp_path / "again", migrated_sqlite_url, receiver, secret_key=other)
        with hooked(settings, receiver) as hook, capture_logs() as logs:
            problem = ok(hook.service.http.get("/webhooks/secret"), 409)
            assert problem["code"] == "webhook_secret_unreadable"
            test = hook.service.http.post("/webhooks/test", json={"url": receiver.url()})
            assert ok(test, 409)["code"] == "webhook_secret_unreadable"
            job_id = hook.submit()
            hook.happen(job_id, "job.running")
            (attempt,) = hook.attempted(job_id)["attempts"]
            assert "FLATLORA_SECRET_KEY" in attempt["error"]
            assert receiver.messages == []
            assert any(line["event"] == "webhooks cannot be signed" for line in logs)
            new = rotate(hook)
            assert new["previous_until"] is None
            hook.change(due_at=now())
            hook.settled(job_id)
            receiver.messages[0].verify(new["secret"])
            with pytest.raises(WebhookVerificationError):
                receiver.messages[0].verify(lost)


class TestProjects:
    @pytest.fixture
    def keyed(
        self, tmp_path: Path, migrated_sqlite_url: str, receiver: Receiver
    ) -> Iterator[Hooked]:
        settings = hook_settings(
            tmp_path, migrated_sqlite_url, receiver, auth="key", api_key="flk_operator"
        )
        with hooked(settings, receiver) as hook:
            yield hook

    @staticmethod
    def key(hook: Hooked, role: Role, project: str) -> dict[str, str]:
        new = make_key()
        with Session(hook.service.engine) as session, session.begin():
            session.execute(
                add_key(new, name="k", role=role, lifetime=None, by="test", project=project)
            )
        return {"Authorization": f"Bearer {new.key}"}

    def test_the_secret_is_for_admins_and_each_project_has_its_own(self, keyed: Hooked) -> None:
        http = keyed.service.http
        for role in (Role.VIEWER, Role.SUBMITTER):
            for method in ("GET", "POST"):
                headers = self.key(keyed, role, "a")
                response = http.request(method, "/webhooks/secret", headers=headers)
                assert ok(response, 403)["code"] == "forbidden"
        found = {
            project: ok(http.get("/webhooks/secret", headers=self.key(keyed, Role.ADMIN, project)),
                        200)["secret"]
            for project in ("a", "b")
        }  # fmt: skip
        assert found["a"] != found["b"]
        ok(http.post("/webhooks/secret", headers=self.key(keyed, Role.ADMIN, "b")), 200)
        again = http.get("/webhooks/secret", headers=self.key(keyed, Role.ADMIN, "a"))
        assert ok(again, 200)["secret"] == found["a"]

    def test_jobs_are_signed_with_their_projects_and_their_logs_are_nobody_elses(
        self, keyed: Hooked
    ) -> None:
        http = keyed.service.http
        mine = self.key(keyed, Role.ADMIN, "a")
        theirs = self.key(keyed, Role.ADMIN, "b")
        body = keyed.service.body | {"webhook_url": keyed.receiver.url()}
        job_id = ok(http.post("/jobs", json=body, headers=mine), 202)["id"]
        keyed.happen(job_id, "job.running")
        until(lambda: keyed.count(state="delivered") == 1)
        secret = ok(http.get("/webhooks/secret", headers=mine), 200)["secret"]
        keyed.receiver.messages[0].verify(secret)
        log = ok(http.get(f"/jobs/{job_id}/deliveries", headers=mine), 200)["items"]
        assert ok(http.get(f"/jobs/{job_id}/deliveries", headers=theirs), 404)
        retry = f"/deliveries/{log[0]['id']}/retry"
        assert ok(http.post(retry, headers=theirs), 404)["code"] == "delivery_not_found"
        assert keyed.count(state="delivered") == 1
        viewer = self.key(keyed, Role.VIEWER, "a")
        assert ok(http.post(retry, headers=viewer), 403)
        assert ok(http.get(f"/jobs/{job_id}/deliveries", headers=viewer), 200)


class TestButton:
    def test_it_says_what_came_back(self, hook: Hooked) -> None:
        hook.receiver.answers(418, b"a teapot")
        body = {"url": hook.receiver.url("/test")}
        answer = ok(hook.service.http.post("/webhooks/test", json=body), 200)
        assert (answer["delivered"], answer["status"]) == (False, 418)
        assert answer["excerpt"] == "a teapot"
        hook.receiver.answers(200)
        answer = ok(hook.service.http.post("/webhooks/test", json=body), 200)
        assert answer["delivered"]
        message = hook.receiver.messages[-1]
        assert message.path == "/test"
        assert (message.id, message.type) == (answer["id"], "webhook.test")
        message.verify(hook.secret)

    def test_that_nobody_answers_is_an_answer(self, hook: Hooked) -> None:
        url = hook.receiver.url().replace("127.0.0.1", "nowhere.invalid")
        with pytest.MonkeyPatch.context() as patch:
            answer_names(patch, lambda _: [])
            answer = ok(hook.service.http.post("/webhooks/test", json={"url": url}), 200)
        assert (answer["delivered"], answer["status"]) == (False, None)
        assert "nowhere.invalid" in answer["error"]


class TestAddresses:
    """S18: what is inside is never reached."""

    @pytest.fixture
    def forbidden(self) -> Iterator[Forbidden]:
        with listening() as found:
            yield found
            assert not found.was_reached

    @pytest.fixture
    def guarded(
        self, tmp_path: Path, migrated_sqlite_url: str, receiver: Receiver, forbidden: Forbidden
    ) -> Iterator[Hooked]:
        """The port of the listener is no reason to refuse it; its address is."""
        settings = hook_settings(
            tmp_path, migrated_sqlite_url, receiver,
            allowed_networks=[], allowed_ports=[forbidden.port],
        )  # fmt: skip
        with hooked(settings, receiver) as hook:
            yield hook

    @pytest.mark.parametrize(
        ("url", "code"),
        [
            ("http://127.0.0.1:{port}/", "address_not_allowed"),
            ("http://2130706433:{port}/", "address_not_allowed"),
            ("http://[::ffff:127.0.0.1]:{port}/", "address_not_allowed"),
            ("http://localhost:{port}/", "address_not_allowed"),
            ("https://169.254.169.254/latest/meta-data/", "address_not_allowed"),
            ("https://10.0.0.1/", "address_not_allowed"),
            ("https://example.org:22/", "port_not_allowed"),
            ("file:///etc/passwd", "uri_malformed"),
            ("gopher://example.org/", "uri_scheme_unsupported"),
            ("https://user:pass@example.org/", "uri_malformed"),
            ("example.org", "uri_malformed"),
        ],
    )
    def test_a_url_of_the_inside_is_refused_where_it_is_given(
        self, guarded: Hooked, forbidden: Forbidden, url: str, code: str
    ) -> None:
        url = url.replace("{port}", str(forbidden.port))
        problem = guarded.service.refused(guarded.service.body | {"webhook_url": url})
        assert problem["code"] == code
        assert list(faults(problem)) == ["/webhook_url"]
        tested = guarded.service.http.post("/webhooks/test", json={"url": url})
        assert ok(tested, 422)["code"] == code

    def test_http_needs_the_operators_word(self, service: Service) -> None:
        body = service.body | {"webhook_url": "http://example.org/"}
        assert service.refused(body)["code"] == "uri_scheme_unsupported"
        service.submit(webhook_url="https://example.org/")

    def test_a_name_of_the_inside_is_an_attempt_that_reaches_nobody(
        self, guarded: Hooked, forbidden: Forbidden, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answer_names(monkeypatch, lambda _: ["127.0.0.1"])
        attempt = self.attempt_at(guarded, f"http://inside.test:{forbidden.port}/")
        assert "not public" in attempt["error"]

    def test_nor_does_a_name_that_is_public_at_one_look_and_not_at_the_next(
        self, tmp_path: Path, migrated_sqlite_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        addresses: Iterator[Sequence[str]] = cycle([[PUBLIC], ["127.0.0.1"]])
        asked = answer_names(monkeypatch, lambda _: next(addresses))
        with receiving(PUBLIC) as receiver, listening(receiver.port) as forbidden:
            receiver.answers(200, Connection="close")
            settings = hook_settings(
                tmp_path, migrated_sqlite_url, receiver, allowed_networks=[NETWORK]
            )
            with hooked(settings, receiver) as hook:
                url = f"http://rebinding.test:{receiver.port}/"
                found = [self.attempt_at(hook, url)["status"] for _ in range(6)]
            assert found == [200, None] * 3
            assert len(asked) == 6
            assert not forbidden.was_reached

    def test_a_redirect_to_the_inside_is_not_followed(
        self, hook: Hooked, forbidden: Forbidden
    ) -> None:
        hook.receiver.answers(302, Location=f"http://127.0.0.1:{forbidden.port}/")
        assert self.attempt_at(hook, hook.receiver.url())["status"] == 302

    @staticmethod
    def attempt_at(hook: Hooked, url: str) -> Json:
        job_id = str(hook.service.submit(webhook_url=url)["id"])
        hook.happen(job_id, "job.running")
        (attempt,) = hook.attempted(job_id)["attempts"]
        return dict(attempt)
