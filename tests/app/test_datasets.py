"""Uploads."""

import base64
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app.garbage import references
from app.jobs.states import Status
from app.settings import Settings
from app.tables import DatasetRow, JobRow
from tests.app.conftest import make_settings, serve
from tests.app.service import Json, Service, faults, ok
from tests.system.service import until

ROWS = b'{"prompt": "1 + 1", "completion": "2"}\n'


@pytest.fixture
def settings(tmp_path: Path, migrated_sqlite_url: str) -> Settings:
    return make_settings(tmp_path, migrated_sqlite_url, max_dataset_bytes=3 << 20)


def upload(
    service: Service,
    content: bytes | Iterator[bytes] = ROWS,
    name: str | None = "rows.jsonl",
    **headers: str,
) -> httpx2.Response:
    given = {"Content-Type": "application/octet-stream"}
    given |= {key.replace("_", "-"): value for key, value in headers.items()}
    params = {"filename": name} if name is not None else {}
    return service.http.post("/datasets", params=params, content=content, headers=given)


def left_behind(service: Service) -> list[Path]:
    folder = service.settings.uploads_dir
    return list(folder.iterdir()) if folder.exists() else []


class TestUpload:
    def test_the_answer_says_how_a_job_names_it(self, any_service: Service) -> None:
        response = upload(any_service)
        dataset = ok(response, 201)
        assert response.headers["location"] == f"/datasets/{dataset['id']}"
        assert dataset["uri"] == f"dataset:{dataset['id']}"
        assert dataset["sha256"] == hashlib.sha256(ROWS).hexdigest()
        assert (dataset["size"], dataset["filename"]) == (len(ROWS), "rows.jsonl")
        assert any_service.get(f"/datasets/{dataset['id']}") == dataset
        assert b"".join(any_service.store.stream(dataset["sha256"])) == ROWS
        assert left_behind(any_service) == []

    def test_the_same_file_again_is_the_same_dataset(self, any_service: Service) -> None:
        first = ok(upload(any_service), 201)
        assert ok(upload(any_service), 200) == first

    def test_the_same_bytes_under_another_name_are_another_dataset(self, service: Service) -> None:
        """The suffix tells the format: a wrong one must not stick."""
        first = ok(upload(service, name="rows.txt"), 201)
        second = ok(upload(service, name="rows.jsonl"), 201)
        assert first["id"] != second["id"]
        assert first["sha256"] == second["sha256"]

    def test_many_at_once_make_one_dataset(self, any_service: Service) -> None:
        with ThreadPoolExecutor(30) as pool:
            answers = list(pool.map(lambda _: upload(any_service), range(30)))
        assert {answer.status_code for answer in answers} <= {200, 201}
        assert len({answer.json()["id"] for answer in answers}) == 1

    def test_a_form_with_a_file(self, service: Service) -> None:
        response = service.http.post("/datasets", files={"file": ("rows.csv", ROWS, "text/csv")})
        assert ok(response, 201)["filename"] == "rows.csv"
        assert left_behind(service) == []

    def test_a_media_type_is_the_same_in_capitals(self, service: Service) -> None:
        head = b'Content-Disposition: form-data; name="file"; filename="a.tsv"'
        body = b"--b\r\n" + head + b"\r\n\r\nx\r\n--b--"
        for given in ("Multipart/Form-Data; boundary=b", "MULTIPART/FORM-DATA; Boundary=b"):
            form = service.http.post("/datasets", content=body, headers={"Content-Type": given})
            assert form.json()["filename"] == "a.tsv"
        for name in ("Text/CSV", "TEXT/csv; Charset=UTF-8"):
            assert upload(service, Content_Type=name).is_success

    def test_chunks_of_unknown_number(self, service: Service) -> None:
        dataset = ok(upload(service, iter([ROWS] * 1000)), 201)
        assert dataset["sha256"] == hashlib.sha256(ROWS * 1000).hexdigest()

    def test_it_may_be_larger_than_other_bodies(self, service: Service) -> None:
        assert ok(upload(service, b"x" * (3 << 20)), 201)["size"] == 3 << 20


class TestFilename:
    @pytest.mark.parametrize(
        ("given", "kept"),
        [
            ("rows.jsonl.gz", "rows.jsonl.gz"),
            ("../../etc/rows.csv", "rows.csv"),
            (r"C:\data\rows.csv", "rows.csv"),
            ("a\n\x1b[31m.csv", "a[31m.csv"),
            ("żółw.parquet", "żółw.parquet"),
            ("a" * 500 + ".csv", "a" * 196 + ".csv"),
        ],
    )
    def test_it_is_the_last_part_without_control_characters(
        self, service: Service, given: str, kept: str
    ) -> None:
        assert ok(upload(service, name=given), 201)["filename"] == kept

    @pytest.mark.parametrize(
        ("media_type", "name"),
        [
            ("application/x-ndjson", "dataset.jsonl"),
            ("application/json", "dataset.json"),
            ("text/csv; charset=utf-8", "dataset.csv"),
            ("application/vnd.apache.parquet", "dataset.parquet"),
        ],
    )
    def test_without_one_the_media_type_names_it(
        self, service: Service, media_type: str, name: str
    ) -> None:
        assert ok(upload(service, name=None, Content_Type=media_type), 201)["filename"] == name

    def test_content_disposition_names_it(self, service: Service) -> None:
        header = 'attachment; filename="rows.csv"'
        assert (
            ok(upload(service, name=None, Content_Disposition=header), 201)["filename"]
            == "rows.csv"
        )

    @pytest.mark.parametrize("charset", ["idna", "punycode", "undefined", "a%00", "nonsense"])
    def test_one_in_a_charset_that_does_not_hold_it_is_no_name(
        self, service: Service, charset: str
    ) -> None:
        header = f"attachment; filename*={charset}''%ff%41"
        problem = ok(upload(service, name=None, Content_Disposition=header), 422)
        assert problem["code"] == "filename_missing"
        named = upload(service, name=None, Content_Disposition=header, Content_Type="text/csv")
        assert ok(named, 201)["filename"].endswith(".csv")

    @pytest.mark.parametrize("name", [None, "", "..", "rows", "/"])
    def test_without_any_sign_of_the_format_it_is_refused(
        self, service: Service, name: str | None
    ) -> None:
        problem = ok(upload(service, name=name), 422)
        assert problem["code"] == "filename_missing"
        assert "?filename=rows.jsonl" in problem["hint"]


class TestRefused:
    def test_no_bytes(self, service: Service) -> None:
        assert ok(upload(service, b""), 422)["code"] == "dataset_empty"

    @pytest.mark.parametrize("declared", [True, False])
    def test_too_many_bytes(self, service: Service, declared: bool) -> None:
        content = b"x" * (4 << 20)
        problem = ok(upload(service, content if declared else iter([content])), 413)
        assert problem["code"] == "too_large"
        assert left_behind(service) == []

    def test_too_many_bytes_in_a_form(self, service: Service) -> None:
        files = {"file": ("rows.csv", b"x" * ((3 << 20) + 1))}
        problem = ok(service.http.post("/datasets", files=files), 413)
        assert "FLATLORA_MAX_DATASET_BYTES" in problem["hint"]

    @pytest.mark.parametrize(
        "media_type", ["application/x-www-form-urlencoded", "image/png", "nonsense"]
    )
    def test_another_media_type(self, service: Service, media_type: str) -> None:
        problem = ok(upload(service, Content_Type=media_type), 415)
        assert "application/x-ndjson" in problem["hint"]

    def test_a_content_encoding(self, service: Service) -> None:
        assert "rows.jsonl.gz" in ok(upload(service, Content_Encoding="gzip"), 415)["hint"]

    def test_a_form_without_a_file(self, service: Service) -> None:
        forms: list[Any] = [{"rows": ("a.csv", ROWS)}, {"file": (None, "text")}]
        for form in forms:
            problem = ok(service.http.post("/datasets", files=form), 422)
            assert faults(problem) == {"/file": "This part is required."}

    def test_a_form_that_cannot_be_read(self, service: Service) -> None:
        for given in ("multipart/form-data", "multipart/form-data; boundary=b"):
            response = service.http.post(
                "/datasets", content=b"--x\r\nnonsense", headers={"Content-Type": given}
            )
            assert response.status_code in {400, 422}
            assert response.headers["content-type"] == "application/problem+json"

    def test_an_unknown_parameter(self, service: Service) -> None:
        response = service.http.post(
            "/datasets?name=a.csv", content=ROWS, headers={"Content-Type": "text/csv"}
        )
        assert "Known are filename, sha256." in faults(ok(response, 422))["name"]


class TestHash:
    """What a client says of its bytes is compared with what has arrived."""

    def test_the_right_one_is_taken_and_a_wrong_one_leaves_nothing(self, service: Service) -> None:
        right, wrong = hashlib.sha256(ROWS).hexdigest(), hashlib.sha256(b"").hexdigest()

        def post(sha256: str, **headers: str) -> httpx2.Response:
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            given = {"Content-Type": "text/csv"} | names
            query = {"sha256": sha256} if sha256 else {}
            return service.http.post("/datasets", params=query, content=ROWS, headers=given)

        for refused in (
            post(wrong),
            post("", Repr_Digest=_digest(b"")),
            post("", Content_Digest=_digest(b"")),
            post(right, Repr_Digest=_digest(b"")),
        ):
            problem = ok(refused, 422)
            assert problem["code"] == "hash_mismatch"
            assert right in problem["detail"]
            assert wrong in problem["detail"]
        assert list(service.store.blobs()) in ([], [[]])
        assert left_behind(service) == []
        assert ok(post(right, Repr_Digest=_digest(ROWS)), 201)["sha256"] == right

    def test_that_of_a_file_in_a_form(self, service: Service) -> None:
        def post(sha256: str, **headers: str) -> httpx2.Response:
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            files, query = {"file": ("a.csv", ROWS)}, {"sha256": sha256}
            return service.http.post("/datasets", params=query, files=files, headers=names)

        right = hashlib.sha256(ROWS).hexdigest()
        assert ok(post("0" * 64), 422)["code"] == "hash_mismatch"
        refused = ok(post(right, Repr_Digest=_digest(ROWS)), 422)
        assert (refused["code"], "of the form" in refused["detail"]) == ("digest_malformed", True)
        assert ok(post(right), 201)["sha256"] == right

    @pytest.mark.parametrize("sha256", ["", "abc", "A" * 64, "0" * 65])
    def test_what_is_none_is_refused(self, service: Service, sha256: str) -> None:
        query = {"sha256": sha256, "filename": "a.csv"}
        response = service.http.post(
            "/datasets", params=query, content=ROWS, headers={"Content-Type": "text/csv"}
        )
        assert set(faults(ok(response, 422))) == {"sha256"}


def _digest(content: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(content).digest()).decode()}:"


class TestDelete:
    def test_it_is_gone_and_its_bytes_are_garbage(self, any_service: Service) -> None:
        dataset = ok(upload(any_service), 201)
        other = ok(upload(any_service, name="other.jsonl"), 201)
        path = f"/datasets/{dataset['id']}"
        assert any_service.http.delete(path).status_code == 204
        for method in ("GET", "DELETE"):
            assert ok(any_service.http.request(method, path), 404)["code"] == "dataset_not_found"
        needed = [page for page in references(any_service.engine, any_service.store) if page]
        assert needed == [[dataset["sha256"]]]  # of the other name
        assert any_service.http.delete(f"/datasets/{other['id']}").status_code == 204
        assert not any(references(any_service.engine, any_service.store))

    @pytest.mark.parametrize("by", ["dataset_uri", "validation_uri"])
    def test_not_while_a_job_that_is_not_over_names_it(self, any_service: Service, by: str) -> None:
        dataset = ok(upload(any_service), 201)
        uri = dataset["uri"]
        body = {"dataset_uri": uri} if by == "dataset_uri" else {"evaluation": {by: uri}}
        job_id = any_service.submit(**body)["id"]
        for status in (Status.QUEUED, Status.RUNNING, Status.PAUSED, Status.CANCELLING):
            any_service.set(job_id, status=status)
            problem = ok(any_service.http.delete(f"/datasets/{dataset['id']}"), 409)
            assert (problem["code"], job_id in problem["detail"]) == ("dataset_in_use", True)
        any_service.set(job_id, status=Status.FAILED)
        assert any_service.http.delete(f"/datasets/{dataset['id']}").status_code == 204

    def test_a_job_that_is_being_submitted_is_waited_for(
        self, tmp_path: Path, migrated_postgres_url: str
    ) -> None:
        """Postgres; SQLite has one writer at a time."""

        def waits() -> bool:
            query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            with watching.connect() as connection:
                return bool(connection.exec_driver_sql(query).scalar())

        for service in serve(make_settings(tmp_path, migrated_postgres_url)):
            watching = service.engine
            dataset = ok(upload(service), 201)
            job_id = service.submit()["id"]
            held = select(DatasetRow).with_for_update(read=True, key_share=True)
            with ThreadPoolExecutor(1) as pool:
                with Session(service.engine) as session, session.begin():
                    session.execute(held)
                    session.execute(update(JobRow).values(dataset_uri=dataset["uri"]))
                    gone = pool.submit(service.http.delete, f"/datasets/{dataset['id']}")
                    until(waits)
                assert job_id in ok(gone.result(), 409)["detail"]


class TestRead:
    def test_those_with_a_hash_or_a_name(self, any_service: Service) -> None:
        one = ok(upload(any_service, name="a.csv"), 201)
        same = ok(upload(any_service, name="b.csv"), 201)
        other = ok(upload(any_service, b"other", name="a.csv"), 201)

        def found(**query: str) -> list[str]:
            return [item["id"] for item in any_service.get("/datasets", **query)["items"]]

        assert found(sha256=one["sha256"]) == [same["id"], one["id"]]
        assert found(filename="a.csv") == [other["id"], one["id"]]
        assert found(filename="a.csv", sha256=other["sha256"]) == [other["id"]]
        assert found(sha256="0" * 64) == []

    def test_pages_hold_every_dataset_once_newest_first(self, any_service: Service) -> None:
        made = [ok(upload(any_service, name=f"{n}.csv"), 201)["id"] for n in range(5)]
        seen: list[str] = []
        query: Json = {"limit": 2}
        while True:
            page = any_service.get("/datasets", **query)
            seen += [dataset["id"] for dataset in page["items"]]
            if page["next"] is None:
                break
            query["after"] = page["next"]
        assert seen == made[::-1]

    @pytest.mark.parametrize("dataset_id", ["ds_" + "0" * 32, "x", "%00"])
    def test_an_unknown_id_is_404(self, any_service: Service, dataset_id: str) -> None:
        problem = ok(any_service.http.get(f"/datasets/{dataset_id}"), 404)
        assert problem["code"] == "dataset_not_found"

    @pytest.mark.parametrize(
        "query", ["after=x", "after=%00", "limit=0", "x=1", "sha256=x", "filename=%00"]
    )
    def test_what_cannot_be_asked_is_422(self, service: Service, query: str) -> None:
        name: Any = query.partition("=")[0]
        assert set(faults(ok(service.http.get(f"/datasets?{query}"), 422))) == {name}
