"""No name leads out of the place where it is looked for: paths, keys, files of the hub, uploads."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.datasets.uris import check_dataset_uri
from app.settings import Settings
from app.uris import UriError, resolve_dataset_file
from tests.app.conftest import make_settings
from tests.app.service import Service, faults

CORPUS: dict[str, list[str]] = json.loads((Path(__file__).with_name("traversal.json")).read_text())
NAMED = [(kind, uri) for kind in ("bucket keys", "hub paths") for uri in CORPUS[kind]]


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


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))
