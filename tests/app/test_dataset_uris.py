"""What a dataset URI may name: listed buckets, listed datasets of the hub, public URLs."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from app.datasets.uris import BucketFile, HubFile, bucket_file, check_dataset_uri, hub_file
from app.jobs.states import Status
from app.settings import Settings
from app.tables import JobRow
from app.uris import UriError
from tests.app.conftest import make_settings
from tests.app.service import Service, faults, ok

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def code_of(uri: str, **settings: Any) -> str | None:
    try:
        check_dataset_uri(uri, Settings.model_validate(settings))
    except UriError as error:
        return error.code
    return None


class TestBuckets:
    @pytest.mark.parametrize(
        ("listed", "uri", "is_allowed"),
        [
            ("", "s3://rows/a.jsonl", False),
            ("s3://rows", "s3://rows/a.jsonl", True),
            ("s3://rows", "s3://rows/a/b/c.jsonl", True),
            ("s3://rows/", "s3://rows/a.jsonl", True),
            ("s3://rows", "s3://rows2/a.jsonl", False),
            ("s3://rows", "s3://row/a.jsonl", False),
            ("s3://rows", "gs://rows/a.jsonl", False),
            ("gs://rows,az://rows", "az://rows/a.jsonl", True),
            ("s3://rows/team", "s3://rows/team/a.jsonl", True),
            ("s3://rows/team", "s3://rows/team2/a.jsonl", False),
            ("s3://rows/team", "s3://rows/a/team/a.jsonl", False),
            ("s3://rows/team/a.jsonl", "s3://rows/team/a.jsonl", True),
            ("s3://rows/team/a.jsonl", "s3://rows/team/a.jsonl.gz", False),
            ("s3://team-*/rows", "s3://team-a/rows/x.jsonl", True),
            ("s3://team-*/rows", "s3://team-a/b/rows/x.jsonl", False),
            ("s3://team-*/rows", "s3://other/rows/x.jsonl", False),
            ("s3://*", "s3://any/x.jsonl", True),
            ("s3://rows/*/public", "s3://rows/a/public/x.jsonl", True),
            ("s3://rows/*/public", "s3://rows/a/b/public/x.jsonl", False),
            ("s3://ro.s", "s3://rows/x.jsonl", False),
        ],
    )
    def test_only_what_is_listed_is_read(self, listed: str, uri: str, is_allowed: bool) -> None:
        code = code_of(uri, dataset_buckets=listed)
        assert code == (None if is_allowed else "bucket_not_allowed")

    def test_the_services_own_store_is_never_read(self) -> None:
        listed = {"dataset_buckets": "s3://*", "store_url": "s3://flatlora/runs"}
        assert code_of("s3://flatlora/runs/blobs/ab/abcd", **listed) == "path_not_allowed"
        assert code_of("s3://flatlora/runs2/a.jsonl", **listed) is None
        whole = {"dataset_buckets": "s3://*", "store_url": "s3://flatlora"}
        assert code_of("s3://flatlora/a.jsonl", **whole) == "path_not_allowed"

    def test_a_key_is_taken_as_it_is(self) -> None:
        settings = Settings(dataset_buckets=["s3://rows"])
        found = bucket_file("s3://rows/a b/ü%20+?#=&.jsonl", settings)
        assert found == BucketFile("s3://rows", "a b/ü%20+?#=&.jsonl")

    @pytest.mark.parametrize("listed", ["rows", "s3://", "s3:rows", "https://rows", "s3:///a"])
    def test_a_list_of_something_else_is_refused(self, listed: str) -> None:
        with pytest.raises(ValueError, match="expected s3://bucket or s3://bucket/prefix"):
            Settings(dataset_buckets=[listed])


class TestHub:
    @pytest.mark.parametrize(
        ("uri", "expected"),
        [
            ("hf://datasets/org/name/a.jsonl", HubFile("org/name", None, "a.jsonl")),
            ("hf://datasets/o.g/n_m-e/a/b c.parquet", HubFile("o.g/n_m-e", None, "a/b c.parquet")),
            ("hf://datasets/org/name@main/a.jsonl", HubFile("org/name", "main", "a.jsonl")),
            ("hf://datasets/org/name@v1.0/d/a.csv", HubFile("org/name", "v1.0", "d/a.csv")),
            (f"hf://datasets/org/name@{COMMIT}/a", HubFile("org/name", COMMIT, "a")),
            ("hf://datasets/org/name@a%2Fb/c.json", HubFile("org/name", "a/b", "c.json")),
            ("hf://datasets/org/name@refs/pr/3/a", HubFile("org/name", "refs/pr/3", "a")),
            (
                "hf://datasets/org/name@refs/convert/parquet/default/train/0000.parquet",
                HubFile("org/name", "refs/convert/parquet", "default/train/0000.parquet"),
            ),
        ],
    )  # fmt: skip
    def test_it_is_read_as_the_hubs_own_library_reads_it(self, uri: str, expected: HubFile) -> None:
        from huggingface_hub import parse_hf_uri

        assert hub_file(uri, Settings()) == expected
        theirs = parse_hf_uri(uri)
        assert (theirs.type, theirs.id) == ("dataset", expected.repo)
        assert (theirs.revision, theirs.path_in_repo) == (expected.revision, expected.path)

    @pytest.mark.parametrize(
        ("listed", "is_allowed"),
        [("*", True), ("org/*", True), ("org/name", True), ("org/nam", False), ("", False),
         ("other/*,org/n*", True), ("orgXname", False)],
    )  # fmt: skip
    def test_only_what_is_listed_is_read(self, listed: str, is_allowed: bool) -> None:
        code = code_of("hf://datasets/org/name/a.jsonl", hub_datasets=listed)
        assert code == (None if is_allowed else "dataset_not_allowed")


class TestService:
    @pytest.fixture
    def settings(self, tmp_path: Path, migrated_sqlite_url: str) -> Settings:
        return make_settings(tmp_path, migrated_sqlite_url, dataset_buckets="s3://rows")

    @pytest.mark.parametrize(
        "uri",
        ["https://example.org/rows.jsonl", "s3://rows/a.jsonl?b", "hf://datasets/a/b/c.jsonl"],
    )
    def test_it_takes_what_is_allowed_and_says_it_again(self, service: Service, uri: str) -> None:
        job = service.submit(dataset_uri=uri, evaluation={"validation_uri": uri})
        assert job["spec"]["dataset_uri"] == job["spec"]["evaluation"]["validation_uri"] == uri

    def test_the_query_of_a_url_is_kept_for_the_worker_and_shown_to_nobody(
        self, service: Service
    ) -> None:
        """It may sign the URL: who may see the job must not be able to read what it reads."""
        url = "https://example.org/{}?sig=canary"
        named = {
            "dataset_uri": url.format("rows.jsonl"),
            "webhook_url": url.format("hook"),
            "evaluation": {"validation_uri": url.format("held-out.jsonl")},
        }
        job = service.submit(**named)
        assert job["spec"]["dataset_uri"] == "https://example.org/rows.jsonl?[hidden]"
        service.set(job["id"], status=Status.FAILED)
        paths = ["/jobs", f"/jobs/{job['id']}", f"/jobs/{job['id']}/events", "/audit"]
        paths += ["/v1/fine_tuning/jobs", f"/v1/fine_tuning/jobs/{job['id']}"]
        for path in paths:
            assert "canary" not in service.http.get(path).text
        retried = ok(service.http.post(f"/jobs/{job['id']}/retry"), 202)
        with Session(service.engine) as session:
            kept = session.get(JobRow, retried["id"])
            assert kept is not None
            assert kept.spec["dataset_uri"] == named["dataset_uri"]
            assert kept.spec["webhook_url"] == named["webhook_url"]

    def test_what_an_answer_has_hidden_is_asked_for_again(self, service: Service) -> None:
        hidden = "https://example.org/rows.jsonl?[hidden]"
        problem = service.refused(service.body | {"dataset_uri": hidden})
        assert problem["code"] == "uri_malformed"
        assert "hides what stands after the question mark" in problem["detail"]

    @pytest.mark.parametrize(
        ("uri", "code"),
        [
            ("https://127.0.0.1/rows.jsonl", "address_not_allowed"),
            ("https://example.org:8080/rows.jsonl", "port_not_allowed"),
            ("http://example.org/rows.jsonl", "uri_scheme_unsupported"),
            ("https://user@example.org/rows.jsonl", "uri_malformed"),
            ("s3://other/rows.jsonl", "bucket_not_allowed"),
            ("hf://datasets/org/name", "uri_malformed"),
        ],
    )
    def test_it_refuses_at_once_what_is_not(self, service: Service, uri: str, code: str) -> None:
        body = service.body | {"dataset_uri": uri, "evaluation": {"validation_uri": uri}}
        problem = service.refused(body)
        assert set(faults(problem)) == {"/dataset_uri", "/evaluation/validation_uri"}
        assert {fault["code"] for fault in problem["errors"]} == {code}
        assert problem["code"] == code
