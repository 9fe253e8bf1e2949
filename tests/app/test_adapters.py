"""Downloading what a job has made."""

import hashlib
import io
import itertools
import tarfile

import pytest

from app.adapters.archive import archive
from app.adapters.content import Content
from app.jobs.answers import Adapter, AdapterFile
from app.jobs.states import Status
from tests.app.service import FILES, Service, ok

WEIGHTS = "adapter_model.safetensors"


class TestArchive:
    def test_it_holds_every_file_and_nothing_of_where_it_was_made(self, service: Service) -> None:
        job = service.finished()
        response = service.http.get(f"/jobs/{job['id']}/adapter")
        assert response.headers["content-type"] == "application/x-tar"
        assert int(response.headers["content-length"]) == len(response.content)
        assert f"{job['id']}.tar" in response.headers["content-disposition"]
        with tarfile.open(fileobj=io.BytesIO(response.content)) as tar:
            members = tar.getmembers()
            held = {}
            for member in members:
                file = tar.extractfile(member)
                assert file is not None
                held[member.name] = file.read()
        assert held == {f"adapter/{name}": content for name, content in FILES.items()}
        assert list(held) == sorted(held)
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}

    def test_two_jobs_with_the_same_files_have_the_same_bytes(self, service: Service) -> None:
        one, two = service.finished(), service.finished(dict(reversed(FILES.items())))
        answers = [service.http.get(f"/jobs/{job['id']}/adapter") for job in (one, two)]
        assert answers[0].content == answers[1].content
        assert answers[0].headers["etag"] == answers[1].headers["etag"]

    def test_another_file_gives_another_etag(self, service: Service) -> None:
        one, two = service.finished(), service.finished(FILES | {"README.md": b"other"})
        etags = {
            service.http.get(f"/jobs/{job['id']}/adapter").headers["etag"] for job in (one, two)
        }
        assert len(etags) == 2

    def test_a_file_of_many_gigabytes_and_a_long_name_fit(self) -> None:
        file = AdapterFile(name="ä" * 120, size=20 << 30, sha256="0" * 64)
        content = archive(Adapter(files=[file], size=file.size), "x.tar")
        assert content.size % tarfile.RECORDSIZE == 0
        assert isinstance(content.parts[0], bytes)
        member = tarfile.TarInfo.frombuf(content.parts[0][-512:], "utf-8", "strict")
        assert member.isfile()

    def test_pieces_of_it_are_the_whole(self, service: Service) -> None:
        path = f"/jobs/{service.finished()['id']}/adapter"
        whole = service.http.get(path).content
        edges = [0, 1, 511, 512, 513, 2048, 5000, len(whole) - 1, len(whole)]
        pieces = b""
        for start, end in itertools.pairwise(edges):
            part = service.http.get(path, headers={"Range": f"bytes={start}-{end - 1}"})
            assert part.status_code == 206
            pieces += part.content
        assert pieces == whole


class TestFile:
    @pytest.mark.parametrize("name", FILES)
    def test_it_is_the_bytes_under_their_hash(self, service: Service, name: str) -> None:
        job = service.finished()
        response = service.http.get(f"/jobs/{job['id']}/adapter/{name}")
        assert response.status_code == 200
        assert response.content == FILES[name]
        headers = response.headers
        assert headers["etag"] == f'"{hashlib.sha256(FILES[name]).hexdigest()}"'
        assert int(headers["content-length"]) == len(FILES[name])
        assert headers["content-disposition"] == f"attachment; filename*=UTF-8''{name}"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["accept-ranges"] == "bytes"

    @pytest.mark.parametrize("name", ["nope", "%2e%2e%2fadapter_config.json", "README.md%00"])
    def test_an_unknown_file_is_404_and_lists_the_others(self, service: Service, name: str) -> None:
        job_id = service.finished()["id"]
        problem = ok(service.http.get(f"/jobs/{job_id}/adapter/{name}"), 404)
        if problem["code"] == "file_not_in_adapter":
            assert ", ".join(FILES) in problem["hint"]

    @pytest.mark.parametrize(
        ("asked", "start", "end"),
        [
            ("bytes=0-0", 0, 1),
            ("bytes=10-19", 10, 20),
            ("bytes=25590-", 25590, 25600),
            ("bytes=25590-99999", 25590, 25600),
            ("bytes=-5", 25595, 25600),
            ("bytes=-99999", 0, 25600),
        ],
    )
    def test_a_range(self, service: Service, asked: str, start: int, end: int) -> None:
        path = f"/jobs/{service.finished()['id']}/adapter/{WEIGHTS}"
        response = service.http.get(path, headers={"Range": asked})
        assert response.status_code == 206
        assert response.content == FILES[WEIGHTS][start:end]
        assert response.headers["content-range"] == f"bytes {start}-{end - 1}/25600"
        assert int(response.headers["content-length"]) == end - start

    @pytest.mark.parametrize("asked", ["bytes=25600-", "bytes=99999-100000", "bytes=-0"])
    def test_a_range_past_the_end_is_416(self, service: Service, asked: str) -> None:
        path = f"/jobs/{service.finished()['id']}/adapter/{WEIGHTS}"
        response = service.http.get(path, headers={"Range": asked})
        assert ok(response, 416)["code"] == "range_not_satisfiable"
        assert response.headers["content-range"] == "bytes */25600"

    @pytest.mark.parametrize(
        "asked", ["bytes=5-1", "bytes=-", "bytes=a-b", "rows=0-1", "bytes=0-1,5-6",
                  "bytes=" + "9" * 5000 + "-"],
    )  # fmt: skip
    def test_a_range_that_cannot_be_read_is_ignored(self, service: Service, asked: str) -> None:
        path = f"/jobs/{service.finished()['id']}/adapter/{WEIGHTS}"
        response = service.http.get(path, headers={"Range": asked})
        assert (response.status_code, len(response.content)) == (200, 25600)

    def test_if_range_gives_the_whole_of_what_has_changed(self, service: Service) -> None:
        path = f"/jobs/{service.finished()['id']}/adapter/{WEIGHTS}"
        etag = service.http.head(path).headers["etag"]
        ask = {"Range": "bytes=0-0"}
        assert service.http.get(path, headers=ask | {"If-Range": etag}).status_code == 206
        for other in ('"other"', f"W/{etag}", "Tue, 24 Nov 2026 00:00:00 GMT"):
            assert service.http.get(path, headers=ask | {"If-Range": other}).status_code == 200


class TestBoth:
    @pytest.fixture(params=["adapter", f"adapter/{WEIGHTS}"])
    def path(self, request: pytest.FixtureRequest, service: Service) -> str:
        return f"/jobs/{service.finished()['id']}/{request.param}"

    def test_head_is_get_without_the_bytes(self, service: Service, path: str) -> None:
        got, head = service.http.get(path), service.http.head(path)
        assert head.status_code == 200
        assert head.content == b""
        different = {"x-request-id"}
        assert {k: v for k, v in got.headers.items() if k not in different} == {
            k: v for k, v in head.headers.items() if k not in different
        }

    def test_a_client_that_has_it_is_told_so(self, service: Service, path: str) -> None:
        etag = service.http.head(path).headers["etag"]
        for given in (etag, f"W/{etag}", f'"other", {etag}', "*"):
            response = service.http.get(path, headers={"If-None-Match": given})
            assert (response.status_code, response.content) == (304, b"")
            assert response.headers["etag"] == etag
        assert service.http.get(path, headers={"If-None-Match": '"other"'}).status_code == 200

    @pytest.mark.parametrize("status", [s for s in Status if s is not Status.SUCCEEDED])
    @pytest.mark.parametrize("path", ["adapter", "adapter/x"])
    def test_before_success_it_is_409(self, service: Service, status: Status, path: str) -> None:
        job_id = service.submit()["id"]
        service.set(job_id, status=status)
        problem = ok(service.http.get(f"/jobs/{job_id}/{path}"), 409)
        assert problem["code"] == "adapter_not_ready"
        assert status in problem["detail"]

    def test_a_dry_run_has_none(self, service: Service) -> None:
        job_id = service.submit(dry_run=True)["id"]
        service.set(job_id, status=Status.SUCCEEDED)
        assert "dry run" in ok(service.http.get(f"/jobs/{job_id}/adapter"), 409)["hint"]


def test_content_is_the_sum_of_its_parts() -> None:
    assert Content([b"ab", b"", b"c"], '"e"', "f", "text/plain").size == 3
