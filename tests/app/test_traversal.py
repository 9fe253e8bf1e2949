"""No name leads out of the place where it is looked for, or to any place where it is only shown.

Paths of datasets and base models, keys, files of the hub and of adapters; uploads, jobs.
"""

import http.client
import json
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from app.datasets.uris import check_dataset_uri
from app.jobs.states import Status
from app.settings import Settings
from app.uris import UriError, file_uri, resolve_dataset_file, resolve_model_folder
from tests.app.conftest import make_settings
from tests.app.live import live
from tests.app.service import Service, faults, make_model

CORPUS: dict[str, list[str]] = json.loads((Path(__file__).with_name("traversal.json")).read_text())
NAMED = [(kind, uri) for kind in ("bucket keys", "hub paths") for uri in CORPUS[kind]]
PATHS = [uri.removeprefix("file:") for uri in CORPUS["dataset paths"]]
NAMES = [*CORPUS["upload names"], *PATHS]
HUB_IDS = {"org/name", "name/x.jsonl", "up/outside.jsonl"}
"""What is left of some paths of the corpus without their beginning, and leads nowhere else."""

BUCKETS = ["s3://rows", "gs://*", "az://*"]


@pytest.fixture
def settings(tmp_path: Path, migrated_sqlite_url: str) -> Settings:
    made = make_settings(tmp_path, migrated_sqlite_url, dataset_buckets=BUCKETS)
    furnish(made.dataset_roots[0])
    return made


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world") / "root"
    root.mkdir()
    furnish(root)
    return root


def furnish(root: Path) -> None:
    """A file beside the root, with links to it from within."""
    path = root.parent / "outside.jsonl"
    path.write_text('{"secret": true}\n')
    (root / "link.jsonl").symlink_to(path)
    (root / "up").symlink_to(root.parent)
    (root / "a" / "b").mkdir(parents=True)


def test_there_are_enough_of_them() -> None:
    assert len({text for texts in CORPUS.values() for text in texts}) >= 100


@pytest.mark.parametrize("uri", CORPUS["dataset paths"])
def test_a_path_stays_below_its_root(root: Path, uri: str) -> None:
    with pytest.raises(UriError) as caught:
        resolve_dataset_file(uri, [root])
    assert caught.value.code in {"path_not_allowed", "uri_malformed", "dataset_not_found"}
    assert caught.value.detail


@pytest.mark.parametrize(("kind", "uri"), NAMED)
def test_a_key_or_a_file_of_the_hub_is_one_thing_below_its_bucket_or_repository(
    kind: str, uri: str
) -> None:
    with pytest.raises(UriError) as caught:
        check_dataset_uri(uri, Settings(dataset_buckets=BUCKETS))
    assert caught.value.code in {"uri_malformed", "uri_scheme_unsupported"}


def test_the_service_refuses_all_of_them_at_once(service: Service) -> None:
    for kind in ("dataset paths", "bucket keys", "hub paths"):
        for uri in CORPUS[kind]:
            given: Any = service.body | {"dataset_uri": uri}
            assert set(faults(service.refused(given))) == {"/dataset_uri"}, uri


def test_an_upload_is_stored_under_its_hash_whatever_it_is_called(service: Service) -> None:
    before = everything(service.rows.parent)
    for name in CORPUS["upload names"]:
        headers = {"Content-Type": "application/x-ndjson"}
        answer = service.http.post(
            "/datasets", params={"filename": name}, content=b"{}\n", headers=headers
        )
        assert answer.status_code in {200, 201, 422}, (name, answer.text)
        if answer.is_success:
            filename = answer.json()["filename"]
            assert not {"/", "\\", "\0", "\n"} & set(filename)
            assert filename.isprintable()
            assert len(filename.encode()) <= 200
    data = service.settings.data_dir
    new = everything(service.rows.parent) - before
    stored = [path for path in new if "artifacts/blobs" in str(path)]
    assert [path.name for path in stored if path.is_file()] == [
        "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"
    ]
    assert {path for path in new if not path.is_relative_to(data)} <= {
        path for path in new if path.name.startswith("flatlora.db")
    }


@pytest.mark.parametrize("uri", CORPUS["dataset paths"])
def test_a_base_model_stays_below_its_root(models: Path, uri: str) -> None:
    with pytest.raises(UriError) as caught:
        resolve_model_folder(uri, [models])
    assert caught.value.code in {
        "path_not_allowed", "uri_malformed", "base_model_not_found", "base_model_unusable",
    }  # fmt: skip
    assert caught.value.detail


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a model beside it that could be used, and links to it from within."""
    root = tmp_path_factory.mktemp("models") / "root"
    (root / "a" / "b").mkdir(parents=True)
    outside = make_model(root.parent / "outside.jsonl")
    assert resolve_model_folder(file_uri(outside), [root.parent]) == outside
    (root / "link.jsonl").symlink_to(outside)
    (root / "up").symlink_to(root.parent)
    return root


def test_the_service_takes_none_of_them_for_a_base_model(service: Service) -> None:
    beheaded = {uri.removeprefix("hf://datasets/") for uri in CORPUS["hub paths"]}
    asked = {uri for texts in CORPUS.values() for uri in texts} | beheaded | set(PATHS)
    for name in asked - HUB_IDS:
        given: Any = service.body | {"base_model": name}
        assert set(faults(service.refused(given))) == {"/base_model"}, name


class TestFilesOfAnAdapter:
    def test_none_is_found_by_another_name_than_its_own(self, settings: Settings) -> None:
        """However it is written: clients that tidy paths up are not what is feared."""
        with live(settings) as service:
            connection = http.client.HTTPConnection(service.http.base_url.netloc.decode())
            with closing(connection):
                self.check(service, connection)

    def check(self, service: Service, served: http.client.HTTPConnection) -> None:
        before = everything(service.rows.parent)
        path = f"/jobs/{service.finished()['id']}/adapter"
        assert self.status(served, f"{path}/adapter_config.json") == 200
        own = {"adapter_config.json", "README.md"}
        ways = {way for name in own for way in (f"../adapter/{name}", f"./{name}", f"{name}/.")}
        for name in {*NAMES, *ways}:
            for written in {quote(name, safe=""), quote(name, safe="/\\%$`;~")}:
                assert self.status(served, f"{path}/{written}") == 404, written
        new = everything(service.rows.parent) - before
        assert [path for path in new if "outside" in path.name] == []

    def status(self, connection: http.client.HTTPConnection, path: str) -> int:
        """Of the path as it is, to the byte."""
        connection.putrequest("GET", path)
        connection.endheaders()
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert json.loads(body)["code"] in {"file_not_in_adapter", "not_found"}
        return answer.status


def test_a_jobs_name_is_shown_and_reaches_no_path(service: Service) -> None:
    """The archive of an adapter is the same to the byte, whatever its job is called."""
    plain = service.finished()
    expected = service.http.get(f"/jobs/{plain['id']}/adapter").content
    before = everything(service.rows.parent)
    names = [name for name in CORPUS["upload names"] if "\0" not in name and len(name) <= 128]
    assert len(names) > 30
    for name in [*names, 'x"; filename="y', "a\r\nSet-Cookie: b=c"]:
        job = service.submit(name=name)
        assert job["name"] == name
        service.set(job["id"], status=Status.SUCCEEDED, adapter=plain["adapter"])
        archive = service.http.get(f"/jobs/{job['id']}/adapter")
        assert archive.content == expected
        file = service.http.get(f"/jobs/{job['id']}/adapter/README.md")
        for answer, called in ((archive, f"{job['id']}.tar"), (file, "README.md")):
            disposition = answer.headers["content-disposition"]
            assert disposition == f"attachment; filename*=UTF-8''{called}"
            assert "set-cookie" not in answer.headers
    assert everything(service.rows.parent) == before


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))
