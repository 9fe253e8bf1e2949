"""Webhooks: what a job tells, that it is signed, and what happens when nobody listens."""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import openai
import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session
from standardwebhooks import Webhook, WebhookVerificationError
from structlog.testing import capture_logs

from app.db import now
from app.jobs.states import Status
from app.tables import JobRow
from app.webhooks import courier, sending
from app.webhooks.backoff import GIVE_UP_SECONDS, next_attempt
from app.webhooks.notices import Notices, payload
from app.webhooks.secrets import make_secret, signed
from tests.app.hooked import Hooked, hook_settings, hooked
from tests.app.receiver import Message, Receiver, receiving
from tests.app.scraping import scrape
from tests.app.service import Json, ok
from tests.system.service import until


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def other() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def gone() -> Receiver:
    with receiving() as receiver:
        return receiver


@pytest.fixture
def hook(
    tmp_path: Path, migrated_sqlite_url: str, receiver: Receiver, other: Receiver, gone: Receiver
) -> Iterator[Hooked]:
    settings = hook_settings(tmp_path, migrated_sqlite_url, receiver, other, gone)
    with hooked(settings, receiver) as hook:
        yield hook


@pytest.fixture
def any_hook(
    tmp_path: Path, migrated_url: str, receiver: Receiver, other: Receiver
) -> Iterator[Hooked]:
    """Once on each database."""
    with hooked(hook_settings(tmp_path, migrated_url, receiver, other), receiver) as hook:
        yield hook


class TestTold:
    def test_a_job_tells_how_it_goes_in_order_and_each_thing_once(self, any_hook: Hooked) -> None:
        job_id = any_hook.submit()
        any_hook.happen(job_id, "job.running")
        any_hook.happen(job_id, "job.evaluated", "job.checkpoint", "job.evaluated", step=10)
        any_hook.happen(job_id, "job.checkpoint", step=20)
        any_hook.happen(job_id, "job.succeeded")
        log = any_hook.settled(job_id, 4)
        assert any_hook.receiver.types == [
            "job.running", "job.checkpoint", "job.checkpoint", "job.succeeded",
        ]  # fmt: skip
        assert [one["event"]["seq"] for one in log] == [2, 4, 6, 7]
        assert [one["id"] for one in log] == any_hook.receiver.ids
        assert {one["state"] for one in log} == {"delivered"}
        assert all(len(one["attempts"]) == 1 for one in log)

    def test_it_sends_the_job_as_a_request_would_show_it(self, hook: Hooked) -> None:
        job_id = hook.submit(name="nightly", labels={"team": "search"})
        hook.service.set(job_id, report={"rows": 12}, result={"loss": 1.5}, step=9)
        hook.happen(job_id, "job.failed", reason="disk_full")
        hook.settled(job_id)
        (message,) = hook.receiver.messages
        shown = hook.service.get(f"/jobs/{job_id}")
        assert shown.pop("report") == {"rows": 12}
        assert message.told["data"] == shown
        assert message.told["event"] == {
            "seq": 2, "message": "It is failed.", "data": {"reason": "disk_full"},
        }  # fmt: skip
        assert shown["spec"]["webhook_url"] == hook.receiver.url()
        (event,) = [e for e in hook.service.get(f"/jobs/{job_id}/events")["items"] if e["seq"] == 2]
        at = datetime.fromisoformat(message.told["timestamp"])
        assert abs(at - datetime.fromisoformat(event["at"])) < timedelta(milliseconds=1)
        assert message.headers["content-type"] == "application/json"

    def test_a_job_without_a_webhook_tells_nothing(self, hook: Hooked) -> None:
        silent = hook.service.submit()["id"]
        assert "webhook_url" in hook.service.get(f"/jobs/{silent}")["spec"]
        hook.happen(silent, "job.running", "job.succeeded")
        job_id = hook.submit()
        hook.happen(job_id, "job.succeeded")
        hook.settled(job_id)
        assert hook.log(silent) == []
        assert len(hook.receiver.messages) == 1

    def test_a_job_cancelled_while_it_waited_tells_so(self, hook: Hooked) -> None:
        job_id = hook.submit()
        ok(hook.service.http.post(f"/jobs/{job_id}/cancel"), 202)
        hook.settled(job_id)
        assert hook.receiver.types == ["job.cancelled"]

    def test_a_row_that_cannot_be_read_keeps_nobody_else_from_being_told(
        self, hook: Hooked
    ) -> None:
        with capture_logs() as logs:
            broken, job_id = hook.submit(), hook.submit()
            hook.service.set(broken, spec={"webhook_url": hook.receiver.url()})
            hook.happen(broken, "job.succeeded")
            hook.happen(job_id, "job.succeeded")
            hook.settled(job_id)
            until(lambda: any(line.get("job_id") == broken for line in logs))
        assert hook.receiver.types == ["job.succeeded"]

    def test_the_key_of_a_repeated_request_counts_the_webhook_in(self, hook: Hooked) -> None:
        body = hook.service.body | {"webhook_url": hook.receiver.url()}
        first = ok(hook.service.post(body, Idempotency_Key="k"), 202)
        assert ok(hook.service.post(body, Idempotency_Key="k"), 202)["id"] == first["id"]
        problem = ok(hook.service.post(hook.service.body, Idempotency_Key="k"), 422)
        assert problem["code"] == "idempotency_key_reused"


class TestSigned:
    @pytest.fixture
    def message(self, hook: Hooked) -> Message:
        job_id = hook.submit()
        hook.happen(job_id, "job.succeeded")
        hook.settled(job_id)
        return hook.receiver.messages[0]

    def test_the_library_of_the_standard_takes_it_and_nothing_forged(
        self, hook: Hooked, message: Message
    ) -> None:
        secret = hook.secret
        assert message.verify(secret) == message.told
        forged = Message(message.path, message.headers, message.body.replace(b"0", b"1", 1))
        other_id = Message(message.path, {**message.headers, "webhook-id": "msg_1"}, message.body)
        for fake in (forged, other_id):
            with pytest.raises(WebhookVerificationError):
                fake.verify(secret)
        with pytest.raises(WebhookVerificationError):
            message.verify(make_secret())

    def test_the_openai_client_takes_it_too(self, hook: Hooked, message: Message) -> None:
        client = openai.OpenAI(api_key="none", webhook_secret=hook.secret)
        with client:
            found: Any = client.webhooks.unwrap(message.body, message.headers)
            assert found.type == "job.succeeded"
            assert found.data.id == message.told["data"]["id"]
            with pytest.raises(openai.InvalidWebhookSignatureError):
                client.webhooks.unwrap(message.body + b" ", message.headers)

    def test_one_that_is_sent_again_by_a_stranger_later_is_refused(self) -> None:
        secret, body = make_secret(), payload("job.running", datetime.now(UTC), {})
        for minutes, is_taken in ((0, True), (4.9, True), (5.1, False), (-5.1, False)):
            moment = datetime.now(UTC) - timedelta(minutes=minutes)
            headers = dict(signed([Webhook(secret)], "msg_1", body, moment))
            message = Message("/", headers, body.encode())
            if is_taken:
                message.verify(secret)
                continue
            with pytest.raises(WebhookVerificationError, match="too"):
                message.verify(secret)

    def test_an_attempt_made_later_is_signed_for_its_own_time(self, hook: Hooked) -> None:
        hook.receiver.answers(500)
        job_id = hook.submit()
        hook.happen(job_id, "job.succeeded")
        hook.attempted(job_id)
        first = hook.receiver.messages[0]
        until(lambda: int(first.headers["webhook-timestamp"]) < int(datetime.now(UTC).timestamp()))
        hook.receiver.answers(200)
        hook.change(due_at=now())
        hook.settled(job_id)
        again = hook.receiver.messages[-1]
        assert (again.id, again.body) == (first.id, first.body)
        assert again.headers["webhook-timestamp"] > first.headers["webhook-timestamp"]
        again.verify(hook.secret)


class TestNobodyListens:
    def test_it_is_tried_again_until_it_arrives_and_the_log_has_every_attempt(
        self, any_hook: Hooked
    ) -> None:
        any_hook.receiver.answers(500, b"down for\0 a while" + b"x" * 5000)
        job_id = any_hook.submit()
        any_hook.happen(job_id, "job.succeeded")
        first = any_hook.attempted(job_id)
        (attempt,) = first["attempts"]
        assert (attempt["status"], attempt["error"]) == (500, None)
        assert attempt["excerpt"].startswith("down for� a while")
        assert len(attempt["excerpt"]) == sending.EXCERPT_BYTES
        left = datetime.fromisoformat(first["next_attempt_at"]) - datetime.fromisoformat(
            attempt["at"]
        )
        assert timedelta(seconds=4.5) < left < timedelta(seconds=20)
        any_hook.change(due_at=now())
        assert len(any_hook.attempted(job_id, 2)["attempts"]) == 2
        any_hook.receiver.answers(200, b"thanks")
        any_hook.change(due_at=now())
        (last,) = any_hook.settled(job_id)
        assert [a["status"] for a in last["attempts"]] == [500, 500, 200]
        assert (last["state"], last["next_attempt_at"]) == ("delivered", None)
        assert len(set(any_hook.receiver.ids)) == 1

    def test_after_a_day_it_is_given_up(self, hook: Hooked) -> None:
        hook.receiver.answers(503)
        job_id = hook.submit()
        hook.happen(job_id, "job.succeeded")
        hook.attempted(job_id)
        with capture_logs() as logs:
            hook.change(due_at=now(), give_up_at=now())
            (last,) = hook.settled(job_id)
        assert last["state"] == "failed"
        assert any(line["event"] == "a webhook was given up" for line in logs)

    def test_410_ends_it_at_once(self, hook: Hooked) -> None:
        hook.receiver.answers(410)
        job_id = hook.submit()
        hook.happen(job_id, "job.running")
        (last,) = hook.settled(job_id)
        assert (last["state"], len(last["attempts"])) == ("failed", 1)

    def test_no_redirect_is_followed(self, hook: Hooked, other: Receiver) -> None:
        hook.receiver.answers(307, Location=other.url())
        job_id = hook.submit()
        hook.happen(job_id, "job.running")
        (attempt,) = hook.attempted(job_id)["attempts"]
        assert attempt["status"] == 307
        assert "no redirect is followed" in attempt["error"]
        assert other.messages == []

    def test_a_receiver_that_is_gone_is_an_attempt(self, hook: Hooked, gone: Receiver) -> None:
        job_id = hook.submit(gone)
        hook.happen(job_id, "job.running")
        (attempt,) = hook.attempted(job_id)["attempts"]
        assert attempt["status"] is None
        assert "connection to 127.0.0.1 has failed" in attempt["error"]

    def test_who_asks_to_be_left_alone_is(self, hook: Hooked) -> None:
        hook.receiver.answers(429, Retry_After="3600")
        job_id = hook.submit()
        hook.happen(job_id, "job.running")
        due = datetime.fromisoformat(hook.attempted(job_id)["next_attempt_at"])
        assert timedelta(minutes=59) < due - datetime.now(UTC) < timedelta(minutes=61)

    def test_it_can_be_asked_for_again(self, hook: Hooked) -> None:
        hook.receiver.answers(410)
        job_id = hook.submit()
        hook.happen(job_id, "job.running")
        (failed,) = hook.settled(job_id)
        hook.receiver.answers(200)
        answer = ok(hook.service.http.post(f"/deliveries/{failed['id']}/retry"), 202)
        assert answer["state"] == "pending"
        (arrived,) = hook.settled(job_id)
        assert (arrived["state"], len(arrived["attempts"])) == ("delivered", 2)
        assert len(set(hook.receiver.ids)) == 1
        ok(hook.service.http.post(f"/deliveries/{failed['id']}/retry"), 202)
        assert len(hook.attempted(job_id, 3)["attempts"]) == 3
        for unknown in ("msg_" + "0" * 32, "x"):
            problem = ok(hook.service.http.post(f"/deliveries/{unknown}/retry"), 404)
            assert problem["code"] == "delivery_not_found"

    def test_the_waits_grow_and_end_after_a_day(self) -> None:
        moment = begun = datetime.now(UTC)
        end = begun + timedelta(seconds=GIVE_UP_SECONDS)
        waits: list[float] = []
        while due := next_attempt(len(waits) + 1, moment, end):
            waits.append((due - moment).total_seconds())
            moment = due
        for wait, usual in zip(waits, (5, 300, 1800, 7200, 18000, 36000), strict=False):
            assert usual <= wait <= 1.2 * usual
        assert len(waits) == 7
        assert moment == end
        assert sum(waits) == pytest.approx(GIVE_UP_SECONDS)


class TestSlow:
    @pytest.fixture
    def released(self, receiver: Receiver) -> Iterator[threading.Event]:
        """The receiver says nothing until then."""
        event = threading.Event()

        def wait(_: Message) -> tuple[int, bytes, dict[str, str]]:
            event.wait(30)
            return 200, b"", {}

        receiver.answer = wait
        yield event
        event.set()

    def test_one_that_is_silent_holds_up_nobody_else(
        self, hook: Hooked, other: Receiver, released: threading.Event
    ) -> None:
        silent = [hook.submit() for _ in range(3 * courier.PER_HOST)]
        for job_id in silent:
            hook.happen(job_id, "job.running")
        until(lambda: len(hook.receiver.messages) == courier.PER_HOST)
        for _ in range(3):
            quick = hook.submit(other)
            hook.happen(quick, "job.running", "job.succeeded")
            hook.settled(quick, 2)
        assert len(hook.receiver.messages) == courier.PER_HOST
        assert hook.count(state="delivered") == 6
        released.set()
        for job_id in silent:
            hook.settled(job_id)
        assert len(set(hook.receiver.ids)) == len(hook.receiver.messages) == len(silent)

    def test_it_is_waited_for_only_so_long(
        self, hook: Hooked, released: threading.Event, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sending, "TIMEOUT_SECONDS", 0.3)
        job_id = hook.submit()
        hook.happen(job_id, "job.running")
        (attempt,) = hook.attempted(job_id)["attempts"]
        assert "not answered in time" in attempt["error"]
        assert 0.3 <= attempt["seconds"] < 3

    def test_a_service_that_stops_does_not_wait_for_it(
        self, tmp_path: Path, migrated_sqlite_url: str, receiver: Receiver,
        released: threading.Event, monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(courier, "CLOSE_SECONDS", 0.2)
        settings = hook_settings(tmp_path, migrated_sqlite_url, receiver)
        with hooked(settings, receiver) as hook:
            job_id = hook.submit()
            hook.happen(job_id, "job.running")
            until(lambda: receiver.messages)
            began = datetime.now(UTC)
        assert datetime.now(UTC) - began < timedelta(seconds=5)


class TestMetrics:
    def test_they_tell_what_waits_and_what_came_of_it(self, hook: Hooked) -> None:
        found = scrape(hook.service)
        assert found("flatlora_webhooks_pending") == 0
        assert found("flatlora_webhook_oldest_pending_seconds") == 0
        assert found("flatlora_webhook_attempts_total", outcome="delivered") == 0
        hook.receiver.answers(500)
        job_id = hook.submit()
        hook.happen(job_id, "job.running")
        hook.attempted(job_id)
        hook.change(created_at=now(-100))

        def look() -> bool:
            found = scrape(hook.service)
            return (
                found("flatlora_webhooks_pending") == 1
                and found("flatlora_webhook_oldest_pending_seconds") == pytest.approx(100, abs=9)
                and found("flatlora_webhook_lag_seconds") == 0
                and found("flatlora_webhook_attempts_total", outcome="refused") >= 1
            )

        until(look, every=0.3)

    def test_attempts_that_are_due_and_not_made_are_told(
        self, tmp_path: Path, migrated_sqlite_url: str, receiver: Receiver
    ) -> None:
        settings = hook_settings(tmp_path, migrated_sqlite_url, receiver, webhook_seconds=10_000)
        with hooked(settings, receiver) as hook:
            job_id = hook.submit()
            hook.happen(job_id, "job.running")
            Notices(hook.service.engine).make()
            hook.change(due_at=now(-50))
            lag = scrape(hook.service)("flatlora_webhook_lag_seconds")
            assert lag == pytest.approx(50, abs=9)


def test_a_job_that_goes_takes_its_deliveries_along(any_hook: Hooked) -> None:
    job_id = any_hook.submit()
    any_hook.happen(job_id, "job.succeeded")
    any_hook.settled(job_id)
    with Session(any_hook.service.engine) as session, session.begin():
        session.execute(update(JobRow).values(status=Status.SUCCEEDED))
        session.delete(session.get_one(JobRow, job_id))
    assert any_hook.count() == 0


def test_the_log_comes_in_pages(hook: Hooked) -> None:
    job_id = hook.submit()
    hook.happen(job_id, *["job.checkpoint"] * 5)
    hook.settled(job_id, 5)
    seen: list[int] = []
    page: Json = {"next": 0}
    while page["next"] is not None:
        page = hook.service.get(f"/jobs/{job_id}/deliveries", after=page["next"], limit=2)
        seen += [one["event"]["seq"] for one in page["items"]]
    assert seen == [2, 3, 4, 5, 6]
    missing = hook.service.http.get("/jobs/job_" + "0" * 32 + "/deliveries")
    assert ok(missing, 404)["code"] == "job_not_found"
