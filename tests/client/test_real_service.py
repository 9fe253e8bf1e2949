"""What a client keeps house with, on the service itself, with keys and a receiver of webhooks."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from typer.testing import CliRunner

from app.cli.main import cli
from flatlora_client import FlatLora, Forbidden, NotFound, ServerError, Unauthenticated
from tests.app.hooked import hook_settings
from tests.app.live import Live, live
from tests.app.receiver import Receiver, receiving
from tests.client.both import Connect
from tests.system.service import until


@dataclass
class World:
    service: Live
    receiver: Receiver

    @property
    def url(self) -> str:
        return str(self.service.http.base_url).rstrip("/")

    @property
    def key(self) -> str:
        """The operator's."""
        return self.service.settings.key_file.read_text().strip()


@pytest.fixture(scope="module")
def world(migrated_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("guarded")
    database = shutil.copy(migrated_file, folder / "flatlora.db")
    with receiving() as receiver:
        settings = hook_settings(folder, f"sqlite:///{database}", receiver, auth="key")
        with live(settings) as service:
            yield World(service, receiver)


@pytest.fixture
def client(world: World, connect: Connect) -> FlatLora:
    """The operator's."""
    return connect(world.url, api_key=world.key)


def test_a_dataset_is_found_by_its_name_and_hash_and_removed(
    client: FlatLora, tmp_path: Path
) -> None:
    path = tmp_path / "odd name & more.jsonl"
    path.write_text('{"text": "rows"}\n')
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "others"}\n')
    made, beside = client.datasets.upload(path), client.datasets.upload(other)
    assert {beside.id, made.id} <= {found.id for found in client.datasets.list(limit=1)}
    assert [found.id for found in client.datasets.list(filename=path.name)] == [made.id]
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert [found.id for found in client.datasets.page(sha256=sha256).items] == [made.id]
    shown = client.datasets.get(made.id)
    assert (shown.filename, shown.size, shown.sha256) == (path.name, 17, sha256)
    client.datasets.delete(made.id)
    with pytest.raises(NotFound) as caught:
        client.datasets.get(made.id)
    assert caught.value.code == "dataset_not_found"
    client.datasets.delete(beside.id)


def test_the_audit_log_tells_it_all_newest_first(client: FlatLora) -> None:
    made = client.keys.create(name="ci", role="viewer")
    assert client.keys.revoke(made.id).revoked_at is not None
    assert client.keys.revoke(made.id).revoked_at is not None
    found = list(client.audit.list(object=made.id, limit=1))
    assert {event.action for event in found} == {"create_key", "revoke_key"}
    assert found[-1].action == "create_key"
    assert found == sorted(found, key=lambda event: int(event.id), reverse=True)
    assert all(event.actor and event.at and event.request_id for event in found)
    [newest] = islice(client.audit.list(action="revoke_key"), 1)
    assert newest.object == made.id
    page = client.audit.page(object=made.id, limit=1)
    assert page.items[0] == found[0]
    assert client.audit.page(object=made.id, before=page.next).items == tuple(found[1:])


def test_a_secret_is_rotated_and_both_sign_meanwhile(client: FlatLora) -> None:
    old = client.webhooks.secret()
    new = client.webhooks.rotate_secret()
    assert new.secret.startswith("whsec_")
    assert new.secret != old.secret
    assert new.previous_until is not None
    assert new.created_at is not None
    assert new.previous_until > new.created_at
    assert new.secret not in repr(new)
    assert client.webhooks.secret().secret == new.secret


def test_a_jobs_messages_are_logged_and_sent_again(world: World, client: FlatLora) -> None:
    job = client.jobs.create(
        base_model="file:tiny", dataset_uri="file:train.jsonl", webhook_url=world.receiver.url()
    )
    assert client.deliveries.list(job.id) == ()
    world.service.happen(job.id, "job.running", status="running", fence=1)

    def delivered() -> bool:
        return [sent.state for sent in client.deliveries.list(job.id)] == ["delivered"]

    until(delivered, seconds=20, every=0.02)
    [sent] = client.deliveries.list(job.id)
    assert (sent.job_id, sent.event["type"]) == (job.id, "job.running")
    assert [tried.status for tried in sent.attempts] == [204]
    world.receiver.messages.clear()
    assert client.deliveries.retry(sent.id).id == sent.id
    until(lambda: world.receiver.messages, seconds=20, every=0.02)
    assert world.receiver.messages[0].id == sent.id
    world.receiver.messages[0].verify(client.webhooks.secret().secret)
    until(delivered, seconds=20, every=0.02)


def test_a_test_message_says_how_it_fared(world: World, client: FlatLora) -> None:
    tested = client.webhooks.test(world.receiver.url())
    assert (tested.delivered, tested.status, tested.error) == (True, 204, None)
    assert tested.id in {message.id for message in world.receiver.messages}


def test_the_quota_counts_and_has_names(world: World, client: FlatLora) -> None:
    before = client.quota()
    job = client.jobs.create(base_model="file:tiny", dataset_uri="file:train.jsonl")
    after = client.quota()
    assert before.queued is not None
    assert after.queued is not None
    assert (after.project, after.queued.used) == ("default", before.queued.used + 1)
    assert after.gpu_minutes is not None
    assert after.gpu_minutes.window_days == after["gpu_minutes"]["window_days"]
    job.cancel()


def test_models_have_limits(client: FlatLora) -> None:
    [tiny] = client.models.list().items
    assert tiny.limits is not None
    assert (tiny.limits.max_rank, tiny.limits.max_length) == (1024, None)


def test_an_adapter_says_where_its_tar_is(world: World, client: FlatLora) -> None:
    adapter = {"files": [{"name": "a", "size": 1, "sha256": "ab" * 32}], "size": 1}
    job = client.jobs.create(base_model="file:tiny", dataset_uri="file:train.jsonl")
    done = client.jobs.get(job.id).created_at
    world.service.set(job.id, status="succeeded", adapter=adapter, finished_at=done)
    assert client.adapters.get(job.id).url == f"/jobs/{job.id}/adapter"


def test_an_upload_in_parts_is_looked_at_and_forgotten(world: World, client: FlatLora) -> None:
    content = b"x" * 100
    sha256 = hashlib.sha256(content).hexdigest()
    place, key = f"/datasets/uploads/{sha256}", {"Authorization": f"Bearer {world.key}"}
    http = world.service.http
    begun = http.put(place, params={"filename": "a.jsonl", "size": 100}, headers=key)
    assert begun.is_success
    part = {"Upload-Offset": "0", "Content-Type": "application/octet-stream"}
    assert http.patch(place, content=content[:60], headers=key | part).is_success
    state = client.datasets.upload_state(sha256)
    assert (state.offset, state.size, state.filename, state.dataset) == (60, 100, "a.jsonl", None)
    assert state.expires_at is not None
    client.datasets.forget_upload(sha256)
    with pytest.raises(NotFound):
        client.datasets.upload_state(sha256)


def test_a_service_that_cannot_serve_says_so_at_once(world: World, client: FlatLora) -> None:
    assert (client.ready().status, client.version()["features"]["auth"]) == ("ok", "key")
    store = world.service.settings.data_dir
    away = store.with_name("away")
    store.rename(away)
    store.write_text("no folder")
    try:
        with pytest.raises(ServerError) as caught:
            client.ready()
        assert caught.value.code == "not_ready"
    finally:
        store.unlink()
        away.rename(store)
    assert client.ready().status == "ok"


class TestKeysOfTheCommandLine:
    @pytest.fixture(autouse=True)
    def elsewhere(self, world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Where there is no database, but an address and the key of an admin."""
        monkeypatch.setenv("FLATLORA_URL", world.url)
        monkeypatch.chdir(tmp_path)

    def run(self, *words: str, code: int = 0) -> str:
        with capture_logs():  # the service's, which is in this process
            done = CliRunner().invoke(cli, ["keys", *words, "--remote"])
        assert done.exit_code == code, done.output
        return done.stdout if code == 0 else done.stderr

    def test_an_admin_elsewhere_makes_shows_and_revokes_keys(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with FlatLora(world.url, world.key) as operator:
            admin = operator.keys.create(name="boss", role="admin", project="search")
            assert admin.key
            monkeypatch.setenv("FLATLORA_API_KEY", admin.key)
            made = json.loads(self.run("create", "ci", "--expires-days", "1", "--json"))
            assert (made["project"], made["role"]) == ("search", "submitter")
            with FlatLora(world.url, made["key"]) as ci:
                assert ci.quota().project == "search"
            listed = json.loads(self.run("list", "--json"))["items"]
            assert {key["id"] for key in listed} == {admin.id, made["id"]}
            assert f"revoked {made['id']} (ci)" in self.run("revoke", made["id"])
            assert "revoked" in self.run("list")
            plain = self.run("create", "other", "--role", "viewer").strip()
            with FlatLora(world.url, plain) as viewer, pytest.raises(Forbidden):
                list(viewer.keys.list())
            assert "makes keys of no other" in self.run("create", "x", "--project", "other", code=1)
            assert "no key" in self.run("revoke", "ffffffffffff", code=1)

    def test_without_a_key_it_is_refused(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("FLATLORA_API_KEY", raising=False)
        with FlatLora(world.url) as nobody, pytest.raises(Unauthenticated):
            nobody.keys.list()
        self.run("list", code=1)
