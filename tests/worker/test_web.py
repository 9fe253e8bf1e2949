"""A dataset behind a URL arrives whole, under its hash and its name, or it is told why not."""

import hashlib
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from tests.app.net.conftest import authority as authority
from tests.app.net.conftest import forbidden as forbidden
from tests.app.net.conftest import site as site
from tests.app.net.world import Answer, Authority, Forbidden, Site, give, redirect, serving
from tests.worker.ordering import ROWS, order_of
from worker import web
from worker.training.errors import DatasetUnavailable
from worker.web import bring_url

SHA256 = hashlib.sha256(ROWS).hexdigest()
ETAG = f'"{SHA256}"'


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "FIRST_WAIT", 0.01)


def cut_off(*breaks: int, etag: str = ETAG, ranges: bool = True) -> Answer:
    """ROWS, whose connection breaks after so many more bytes at each request but the last."""
    left = list(breaks)

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range") if ranges else None
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if handler.headers.get("If-Range", etag) != etag:
            start, asked = 0, None
        handler.send_response(206 if asked else 200)
        if asked:
            handler.send_header("Content-Range", f"bytes {start}-{len(ROWS) - 1}/{len(ROWS)}")
        if etag:
            handler.send_header("ETag", etag)
        handler.send_header("Content-Length", str(len(ROWS) - start))
        handler.end_headers()
        end = start + left.pop(0) if left else len(ROWS)
        handler.wfile.write(ROWS[start:end])
        handler.close_connection = True

    return answer


def in_turn(*answers: Answer) -> Answer:
    left = list(answers)

    def answer(handler: BaseHTTPRequestHandler) -> None:
        left.pop(0)(handler)

    return answer


class TestArrived:
    def test_with_its_hash_and_its_name(self, site: Site, tmp_path: Path) -> None:
        site.routes["/data/rows.jsonl"] = give(ROWS)
        order = order_of(site.url("/data/rows.jsonl?sig=secret"), tmp_path, site)
        assert order.uri == site.url("/data/rows.jsonl")
        arrived = bring_url(order)
        assert (arrived.filename, arrived.sha256) == ("rows.jsonl", SHA256)
        assert (tmp_path / "train").read_bytes() == ROWS
        assert site.asked[0][0] == "/data/rows.jsonl?sig=secret"
        assert [path.name for path in tmp_path.iterdir()] == ["train"]

    def test_over_http_where_that_is_allowed(self, authority: Authority, tmp_path: Path) -> None:
        with serving() as site:
            site.routes["/rows.jsonl"] = give(ROWS)
            assert bring_url(order_of(site.url("/rows.jsonl"), tmp_path, site)).sha256 == SHA256

    @pytest.mark.parametrize(
        ("path", "headers", "expected"),
        [
            ("/a.csv", {}, "a.csv"),
            ("/a.csv", {"Content_Type": "application/json"}, "a.csv"),
            ("/a.jsonl.gz", {"Content_Type": "application/gzip"}, "a.jsonl.gz"),
            ("/a%20b.JSONL", {}, "a b.JSONL"),
            ("/download", {"Content_Disposition": 'attachment; filename="b.csv"'}, "b.csv"),
            ("/a.php", {"Content_Disposition": "inline; filename*=UTF-8''%C3%BC.tsv"}, "ü.tsv"),
            ("/x", {"Content_Disposition": 'attachment; filename="../../b.csv"'}, "b.csv"),
            ("/x", {"Content_Disposition": 'attachment; filename="..\\\\b.csv"'}, "b.csv"),
            ("/x", {"Content_Disposition": "attachment; filename=.."}, "x"),
            ("/rows", {"Content_Type": "text/csv; charset=utf-8"}, "rows.csv"),
            ("/v1.2", {"Content_Type": "application/x-ndjson"}, "v1.2.jsonl"),
            ("/", {"Content_Type": "application/json"}, "dataset.json"),
            ("/", {}, "dataset"),
            ("/..%2f..%2frows.jsonl", {}, "rows.jsonl"),
            ("/a.jsonl", {"Content_Encoding": "gzip"}, "a.jsonl.gz"),
            ("/a.jsonl.gz", {"Content_Encoding": "gzip"}, "a.jsonl.gz"),
            ("/a.jsonl", {"Content_Encoding": "zstd"}, "a.jsonl.zst"),
            ("/a.jsonl", {"Content_Encoding": "identity"}, "a.jsonl"),
        ],
    )
    def test_with_a_name_that_tells_the_format(
        self, site: Site, tmp_path: Path, path: str, headers: dict[str, Any], expected: str
    ) -> None:
        site.routes[path] = give(ROWS, **headers)
        assert bring_url(order_of(site.url(path), tmp_path, site)).filename == expected

    def test_with_the_name_at_the_end_of_a_redirect_where_the_first_tells_nothing(
        self, site: Site, tmp_path: Path
    ) -> None:
        site.routes |= {"/latest": redirect("/v2/rows.parquet"), "/v2/rows.parquet": give(ROWS)}
        assert bring_url(order_of(site.url("/latest"), tmp_path, site)).filename == "rows.parquet"


class TestBroken:
    def test_it_goes_on_where_it_broke_off(self, site: Site, tmp_path: Path) -> None:
        site.routes["/rows.jsonl"] = cut_off(10, 10_000, 10, 0, 7)
        arrived = bring_url(order_of(site.url("/rows.jsonl"), tmp_path, site))
        assert arrived.sha256 == SHA256
        assert (tmp_path / "train").read_bytes() == ROWS
        ranges = [headers.get("range") for _, headers in site.asked]
        assert ranges == [None, "bytes=10-", "bytes=10010-", "bytes=10020-", "bytes=10020-",
                          "bytes=10027-"]  # fmt: skip
        assert {headers.get("if-range") for _, headers in site.asked[1:]} == {ETAG}

    @pytest.mark.parametrize("etag", ['W/"weak"', "", "unquoted"])
    def test_it_begins_anew_where_the_server_cannot_tell_that_it_is_the_same(
        self, site: Site, tmp_path: Path, etag: str
    ) -> None:
        site.routes["/rows.jsonl"] = cut_off(10_000, etag=etag)
        arrived = bring_url(order_of(site.url("/rows.jsonl"), tmp_path, site))
        assert arrived.sha256 == SHA256
        assert all("range" not in headers for _, headers in site.asked)

    def test_it_begins_anew_where_the_file_has_changed(self, site: Site, tmp_path: Path) -> None:
        first, second = cut_off(10_000, etag='"old"'), cut_off(etag=ETAG)
        site.routes["/rows.jsonl"] = in_turn(first, second)
        assert bring_url(order_of(site.url("/rows.jsonl"), tmp_path, site)).sha256 == SHA256
        assert site.asked[1][1]["if-range"] == '"old"'

    @pytest.mark.parametrize("wrong", ["bytes 5-9/35000", "bytes 0-9/10", "nonsense", ""])
    def test_another_part_than_asked_for_is_not_taken(
        self, site: Site, tmp_path: Path, wrong: str
    ) -> None:
        site.routes["/rows.jsonl"] = in_turn(
            cut_off(10_000), give(b"x" * 10, 206, Content_Range=wrong, ETag=ETAG), give(ROWS)
        )
        assert bring_url(order_of(site.url("/rows.jsonl"), tmp_path, site)).sha256 == SHA256

    @pytest.mark.parametrize("status", [500, 502, 503, 429])
    def test_a_server_in_trouble_is_asked_again(
        self, site: Site, tmp_path: Path, status: int
    ) -> None:
        trouble = give(b"", status)
        site.routes["/rows.jsonl"] = in_turn(trouble, trouble, trouble, give(ROWS))
        assert bring_url(order_of(site.url("/rows.jsonl"), tmp_path, site)).sha256 == SHA256

    def test_but_not_for_ever(self, site: Site, tmp_path: Path) -> None:
        site.routes["/rows.jsonl"] = give(b"", 503)
        with pytest.raises(DatasetUnavailable, match="answers with 503"):
            bring_url(order_of(site.url("/rows.jsonl"), tmp_path, site))
        assert len(site.asked) == web.TRIES


class TestRefused:
    def why(self, site: Site, folder: Path, url: str, **settings: Any) -> str:
        with pytest.raises(DatasetUnavailable) as caught:
            bring_url(order_of(url, folder, site, **settings))
        assert caught.value.hint
        assert "secret" not in caught.value.message
        assert not (folder / "train").exists()
        return caught.value.message

    @pytest.mark.parametrize(
        ("status", "words"),
        [(404, "404: there is nothing"), (410, "there is nothing"), (403, "403: it wants to know"),
         (401, "who asks"), (400, "answers with 400"), (304, "304"), (204, "204"), (416, "416"),
         (206, "206")],
    )  # fmt: skip
    def test_the_status_is_told(self, site: Site, tmp_path: Path, status: int, words: str) -> None:
        site.routes["/rows.jsonl"] = give(b"", status)
        assert words in self.why(site, tmp_path, site.url("/rows.jsonl?sig=secret"))

    def test_what_is_too_large_is_not_even_begun(self, site: Site, tmp_path: Path) -> None:
        site.routes["/rows.jsonl"] = give(ROWS)
        limit = len(ROWS) - 1
        url = site.url("/rows.jsonl")
        told = self.why(site, tmp_path, url, max_dataset_bytes=limit)
        assert f"more than {limit:,} bytes" in told
        assert bring_url(order_of(url, tmp_path, site, max_dataset_bytes=len(ROWS))).sha256

    def test_nor_read_to_its_end_where_it_does_not_say_how_long_it_is(
        self, site: Site, tmp_path: Path
    ) -> None:
        def endless(handler: BaseHTTPRequestHandler) -> None:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            while True:
                handler.wfile.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")

        site.routes["/rows.jsonl"] = endless
        url = site.url("/rows.jsonl")
        assert "more than 1,000,000" in self.why(site, tmp_path, url, max_dataset_bytes=10**6)
        assert (tmp_path / "train.part").stat().st_size <= 10**6

    def test_what_comes_too_slowly(self, site: Site, tmp_path: Path) -> None:
        site.routes["/rows.jsonl"] = cut_off(*[1] * 100_000)
        url = site.url("/rows.jsonl")
        assert "within 0.5 seconds" in self.why(site, tmp_path, url, dataset_seconds=0.5)

    def test_an_encoding_that_nobody_asked_for(self, site: Site, tmp_path: Path) -> None:
        site.routes["/rows.jsonl"] = give(ROWS, Content_Encoding="br")
        assert "encoded as 'br'" in self.why(site, tmp_path, site.url("/rows.jsonl"))

    def test_a_redirect_to_an_address_of_the_inside(
        self, site: Site, forbidden: Forbidden, tmp_path: Path
    ) -> None:
        site.routes["/rows.jsonl"] = redirect(f"https://127.0.0.1:{forbidden.port}/")
        ports = [site.port, forbidden.port]
        told = self.why(site, tmp_path, site.url("/rows.jsonl"), allowed_ports=ports)
        assert "redirects. 127.0.0.1 is, or stands for, an address that is not public" in told
        assert len(site.asked) == 1

    def test_a_name_of_nothing(self, site: Site, tmp_path: Path) -> None:
        url = f"https://nowhere.invalid:{site.port}/rows.jsonl"
        assert "There is no host nowhere.invalid" in self.why(site, tmp_path, url)
