"""Another project's things do not exist: every operation of the document, for every role.

Operations are read from the document, so one that is new is tried by itself. Its path parameters
are filled by their names (``BY_NAME``), else with the first id that the list before them shows to
the other project. Where that is not enough the test fails and says which entry is missing here.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from app.access.principal import Role
from app.db import now
from app.jobs.states import Status
from app.tables import EventRow, WebhookDeliveryRow, WorkerRow
from tests.app.conftest import make_settings, serve
from tests.app.keys import acting, bearer, make_key
from tests.app.service import Json, Service, ok
from tests.contracts.openapi import document

CANARY = "canary-of-theirs"
SLOT = "w/0"
DELIVERY = f"msg_{0:031x}1"
BYTES = f'{{"text": "{CANARY}"}}\n'.encode()
ROWS = {"Content-Type": "application/x-ndjson"}
PARAMETER = re.compile(r"\{([a-z0-9_]+)\}")

# Everybody's: they have no project's rows in them.
SHARED = {"/healthz", "/readyz", "/version", "/models"}

# What a request needs beside the path, so that it is not refused for its shape.
NEEDS: dict[str, dict[str, Any]] = {
    "PATCH /datasets/uploads/{sha256}": {"headers": {"Upload-Offset": "0"}, "content": b"x"},
}

# Writes that name nothing in their path: what they say of a foreign thing in their body.
WRITES: dict[str, str] = {
    "POST /jobs": "test_a_job_cannot_be_trained_on_their_dataset",
    "POST /datasets": "test_their_bytes_are_a_dataset_of_ones_own",
    "POST /keys": "tests/app/test_keys.py: keys of no other project",
    "POST /v1/files": "as POST /datasets",
    "POST /v1/fine_tuning/jobs": "test_nor_by_openais_paths",
    "POST /webhooks/secret": "names nothing",
    "POST /webhooks/test": "names nothing",
}

# Looking changes them: when a key was last used, and who has read a secret.
MOVING = {"GET /keys", "GET /audit"}

# Names of one's own, which another project may use as well.
OWN_NAMES = {
    "PUT /datasets/uploads/{sha256}": "begins an upload of one's own",
}


@dataclass(frozen=True)
class Operation:
    method: str
    path: str
    described: Json = field(hash=False, compare=False)

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def parameters(self) -> list[str]:
        return PARAMETER.findall(self.path)

    @property
    def queries(self) -> list[str]:
        """Query parameters that take any text."""
        return [
            parameter["name"]
            for parameter in self.described.get("parameters", [])
            if parameter["in"] == "query" and "string" in json.dumps(parameter["schema"])
        ]


OPERATIONS = [
    Operation(method.upper(), path, described)
    for path, item in document()["paths"].items()
    for method, described in item.items()
    if path not in SHARED
]
WITH_ID = [operation for operation in OPERATIONS if operation.parameters]
LISTS = [o for o in OPERATIONS if not o.parameters and o.method == "GET"]
BARE_WRITES = [o for o in OPERATIONS if not o.parameters and o.method != "GET"]


@dataclass
class House:
    """A project with one of everything in it, and keys of each role of another project."""

    service: Service

    def __post_init__(self) -> None:
        self.theirs: str = make_key(self.service, "theirs", "admin", name=CANARY)["key"]
        self.mine = {role: make_key(self.service, "mine", role)["key"] for role in Role}
        with acting(self.service, self.theirs) as http:
            job = self.service.finished()
            labels = {"of": CANARY}
            waiting = self.service.submit(name=CANARY, labels=labels)
            running = self.service.submit(name=CANARY)
            uploaded = http.post(f"/datasets?filename={CANARY}.jsonl", content=BYTES, headers=ROWS)
            self.dataset = ok(uploaded, 201)
            key = make_key(self.service, "theirs", "viewer", name=CANARY)
        self.service.add_metrics(job["id"], "train", range(1, 3))
        with Session(self.service.engine) as session, session.begin():
            told = {"job_id": job["id"], "seq": 99, "type": "x", "message": CANARY, "data": {}}
            session.execute(insert(EventRow).values(at=now(), **told))
            session.add(delivery(job["id"]))
            session.add(worker())
        self.service.set(running["id"], status=Status.RUNNING, worker=SLOT, attempt=1)
        self.running: str = running["id"]
        self.by_name = {
            "job_id": [job["id"], waiting["id"]],
            "dataset_id": [self.dataset["id"]],
            "sha256": [self.dataset["sha256"]],
            "key_id": [key["id"]],
            "delivery_id": [DELIVERY],
            "file": [job["adapter"]["files"][0]["name"]],
        }
        jobs = [job["id"], waiting["id"], running["id"]]
        self.secrets = [CANARY, *jobs, self.dataset["id"], key["id"]]

    def foreign(self, operation: Operation) -> Iterator[str]:
        """The operation's paths with ids of the other project in them."""
        wanted = {name: self._ids(operation, name) for name in operation.parameters}
        for index in range(max(len(ids) for ids in wanted.values())):
            path = operation.path
            for name, ids in wanted.items():
                path = path.replace(f"{{{name}}}", ids[index % len(ids)])
            yield path

    def _ids(self, operation: Operation, name: str) -> list[str]:
        if name in self.by_name:
            return self.by_name[name]
        above = operation.path.partition(f"/{{{name}}}")[0]
        answer = self.service.http.get(above, headers=bearer(self.theirs))
        if answer.is_success:
            listed = answer.json()
            if items := listed.get("items") or listed.get("data"):
                return [items[0]["id"]]
        pytest.fail(f"{operation}: make one in House, and name its id as {name} in by_name")

    def ask(self, operation: Operation, path: str, key: str, **more: Any) -> httpx2.Response:
        needs = NEEDS.get(str(operation), {})
        headers = bearer(key) | needs.get("headers", {}) | more.pop("headers", {})
        body = {"content": needs["content"]} if "content" in needs else {}
        return self.service.http.request(
            operation.method, path, headers=headers, follow_redirects=False, **body, **more
        )

    @cached_property
    def seen_by_them(self) -> dict[str, str]:
        return self.look()

    def look(self) -> dict[str, str]:
        """All that their own key is shown of it."""
        shown = {}
        for operation in OPERATIONS:
            if operation.method != "GET" or str(operation) in MOVING:
                continue
            for path in self.foreign(operation) if operation.parameters else [operation.path]:
                shown[path] = without_request_id(self.ask(operation, path, self.theirs).text)
        return shown


def worker() -> WorkerRow:
    """Everybody's; it is heard for as long as the tests take."""
    return WorkerRow(
        name="w", host="h", pid=1, version="1", slots=[{"name": SLOT, "device": "0"}],
        state="active", started_at=now(), heartbeat_at=now(3600),
    )  # fmt: skip


def delivery(job_id: str) -> WebhookDeliveryRow:
    """Of theirs, and over."""
    return WebhookDeliveryRow(
        project="theirs", job_id=job_id, seq=99, id=DELIVERY, type="job.succeeded",
        url=f"https://{CANARY}.example", host=f"{CANARY}.example:443", body="{}",
        state="delivered", attempts=[], give_up_at=now(), created_at=now(),
    )  # fmt: skip


@pytest.fixture(
    scope="module", params=["sqlite", pytest.param("postgres", marks=pytest.mark.torture)]
)
def url(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    migrated_file: Path,
) -> Iterator[str]:
    if request.param == "postgres":
        with request.getfixturevalue("make_postgres")() as made:
            yield made
    else:
        copy = tmp_path_factory.mktemp("database") / "flatlora.db"
        copy.write_bytes(migrated_file.read_bytes())
        yield f"sqlite:///{copy}"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, url: str) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("isolation")
    for service in serve(make_settings(folder, url, auth="key")):
        house = House(service)
        assert CANARY in json.dumps(house.seen_by_them)
        yield house
        assert house.look() == house.seen_by_them, "something of theirs has changed"


def without_request_id(text: str) -> str:
    return re.sub(r'"request_id":\s*"[^"]*"', "", text)


def told(answer: httpx2.Response, path: str) -> str:
    """An answer without what is its own each time, and without the path that was asked for."""
    text = without_request_id(answer.text)
    for part in path.split("/"):
        if part:
            text = text.replace(part, "…")
    return text


def of_nothing(path: str) -> str:
    """The same path with ids that nobody has."""
    return re.sub(r"[0-9a-f]{12,}", lambda found: "0" * len(found[0]), path)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("operation", WITH_ID, ids=str)
def test_a_foreign_id_is_answered_as_one_that_does_not_exist(
    house: House, operation: Operation, role: Role
) -> None:
    if str(operation) in OWN_NAMES:
        pytest.skip(OWN_NAMES[str(operation)])
    streams: list[dict[str, str]] = [{}]
    if operation.method == "GET":
        streams += [{"Accept": "text/event-stream"}, {"Range": "bytes=0-1"}]
    for path in house.foreign(operation):
        for headers in streams:
            answer = house.ask(operation, path, house.mine[role], headers=headers)
            expected = {404} if role is Role.ADMIN else {403, 404}
            assert answer.status_code in expected, (
                f"{operation} as {role}: {answer.status_code} {answer.text}. If it is refused for "
                "its shape, say in NEEDS what it needs."
            )
            nothing = house.ask(operation, of_nothing(path), house.mine[role], headers=headers)
            assert nothing.status_code == answer.status_code
            assert told(answer, path) == told(nothing, of_nothing(path))
            assert CANARY not in answer.text


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("operation", LISTS, ids=str)
def test_a_list_never_shows_a_foreign_row(house: House, operation: Operation, role: Role) -> None:
    answer = house.ask(operation, operation.path, house.mine[role])
    assert answer.status_code in ({200} if role is Role.ADMIN else {200, 403})
    assert [secret for secret in house.secrets if secret in answer.text] == []
    for query in [*operation.queries, "label.of"]:
        for secret in house.secrets:
            answer = house.ask(operation, operation.path, house.mine[role], params={query: secret})
            assert answer.status_code in {200, 400, 403, 422}, answer.text
            if answer.status_code == 200:
                assert [found for found in house.secrets if found in answer.text] == []


@pytest.mark.parametrize("operation", BARE_WRITES, ids=str)
def test_a_write_without_an_id_has_an_entry_here(operation: Operation) -> None:
    assert str(operation) in WRITES, "say in WRITES what it does with ids in its body"


def test_a_job_cannot_be_trained_on_their_dataset(house: House) -> None:
    theirs = f"dataset:{house.dataset['id']}"
    with acting(house.service, house.mine[Role.ADMIN]):
        for wrong in ({"dataset_uri": theirs}, {"evaluation": {"validation_uri": theirs}}):
            assert house.service.refused(house.service.body | wrong)["code"] == "dataset_not_found"


def test_nor_by_openais_paths(house: House) -> None:
    theirs = f"file-{house.dataset['id'].removeprefix('ds_')}"
    with acting(house.service, house.mine[Role.ADMIN]) as http:
        model = house.service.body["base_model"]
        body = {"model": model, "training_file": theirs}
        answer = http.post("/v1/fine_tuning/jobs", json=body)
        nobodys = http.post(
            "/v1/fine_tuning/jobs", json=body | {"training_file": "file-" + "0" * 32}
        )
        assert answer.status_code == nobodys.status_code
        assert answer.status_code in {400, 404}
        assert answer.json()["error"]["code"] == nobodys.json()["error"]["code"]


def test_their_bytes_are_a_dataset_of_ones_own(house: House) -> None:
    """Who has the bytes may have them here; that others have them too is not told."""
    with acting(house.service, house.mine[Role.ADMIN]) as http:
        answer = http.post("/datasets?filename=own.jsonl", content=BYTES, headers=ROWS)
        own = ok(answer, 201)
        assert own["sha256"] == house.dataset["sha256"]
        assert own["id"] != house.dataset["id"]
        assert [row["id"] for row in house.service.get("/datasets")["items"]] == [own["id"]]


def test_of_a_worker_that_all_share_each_sees_its_own_jobs_alone(house: House) -> None:
    with acting(house.service, house.mine[Role.SUBMITTER]):
        own = house.service.submit()["id"]
    with Session(house.service.engine) as session, session.begin():
        (row,) = session.scalars(select(WorkerRow))
        row.slots = [*row.slots, {"name": "w/1", "device": "1"}]
    house.service.set(own, status=Status.RUNNING, worker="w/1", attempt=1)
    try:
        seen = {}
        for whose in (house.mine[Role.VIEWER], house.theirs):
            with acting(house.service, whose):
                (shown,) = house.service.get("/workers")["items"]
            seen[whose] = [slot["job_id"] for slot in shown["slots"]]
        assert seen == {house.mine[Role.VIEWER]: [None, own], house.theirs: [house.running, None]}
    finally:
        with Session(house.service.engine) as session, session.begin():
            (row,) = session.scalars(select(WorkerRow))
            row.slots = row.slots[:1]


def test_without_a_key_nothing_of_it_is_told(house: House) -> None:
    for operation in OPERATIONS:
        for path in house.foreign(operation) if operation.parameters else [operation.path]:
            answer = house.service.http.request(operation.method, path)
            assert answer.status_code == 401, str(operation)
            assert CANARY not in answer.text


def test_theirs_are_jobs_that_could_be_stopped_and_fetched(house: House) -> None:
    """Else a 404 above would prove nothing."""
    finished, waiting = house.by_name["job_id"]
    with acting(house.service, house.theirs) as http:
        assert house.service.get(f"/jobs/{waiting}")["status"] == Status.QUEUED
        name = house.by_name["file"][0]
        assert http.get(f"/jobs/{finished}/adapter/{name}").status_code == 200
