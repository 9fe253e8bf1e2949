"""A client of public addresses: what it says, whom it trusts, and for how long it waits."""

import asyncio
import socket
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import httpcore2
import pytest

from app.net.backends import AsyncPublicBackend, Deadline, PublicBackend
from app.net.client import Answer, AsyncPublicClient, PublicClient, chunks_of
from app.net.errors import NetError
from app.net.rules import Rules
from app.settings import Settings
from tests.app.net.world import (
    NAME,
    NETWORK,
    PUBLIC,
    Authority,
    Forbidden,
    Site,
    answer_names,
    give,
    serving,
)


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return answer_names(monkeypatch, lambda name: [PUBLIC] if name == NAME else [])


def fetch(url: str, rules: Rules, seconds: float = 5) -> bytes:
    with PublicClient(rules, seconds=seconds) as client, client.get(url) as answer:
        return b"".join(chunks_of(answer))


def post(url: str, rules: Rules, seconds: float = 5) -> Answer:
    async def send() -> Answer:
        async with AsyncPublicClient(rules, seconds=seconds, max_bytes=1000) as client:
            return await client.post(url, b'{"a": 1}', {"webhook-id": "1"})

    return asyncio.run(send())


def code_of(call: object, *arguments: object) -> str:
    with pytest.raises(NetError) as caught:
        call(*arguments)  # type: ignore[operator]
    assert caught.value.detail
    return caught.value.code


def test_it_asks_for_the_name_and_names_it_to_tls(rules: Rules, site: Site) -> None:
    site.routes["/a"] = give(b"rows")
    assert fetch(site.url("/a?b=c", NAME), rules) == b"rows"
    path, headers = site.asked[0]
    assert (path, headers["host"]) == ("/a?b=c", f"{NAME}:{site.port}")
    assert headers["accept-encoding"] == "identity"
    assert post(site.url("/a", NAME), rules).body == b"rows"


def test_a_certificate_of_another_name_is_not_trusted(
    rules: Rules, authority: Authority, site: Site
) -> None:
    with serving(authority.stranger) as stranger:
        ports = Rules(rules.networks, True, (stranger.port,))
        url = stranger.url("/", NAME)
        assert code_of(fetch, url, ports) == code_of(post, url, ports) == "tls_failed"
        assert stranger.asked == []


def test_nor_is_one_of_an_unknown_authority(
    rules: Rules, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    assert code_of(fetch, site.url(), rules) == code_of(post, site.url(), rules) == "tls_failed"


def test_a_site_that_speaks_no_tls_is_told(rules: Rules, site: Site) -> None:
    with serving() as plain:
        url = f"https://{PUBLIC}:{plain.port}/"
        assert code_of(fetch, url, Rules(rules.networks, False, (plain.port,))) == "tls_failed"


def test_proxies_of_the_environment_see_nothing(
    rules: Rules, site: Site, forbidden: Forbidden, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{forbidden.port}")
    site.routes["/"] = give(b"rows")
    assert fetch(site.url(), rules) == post(site.url(), rules).body == b"rows"


def test_no_password_is_looked_for_in_a_netrc(
    rules: Rules, site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text(f"default login a password b\nmachine {PUBLIC} login a\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    site.routes["/"] = give(b"rows")
    fetch(site.url(), rules)
    assert "authorization" not in site.asked[0][1]


def test_nothing_is_decompressed(rules: Rules, site: Site) -> None:
    site.routes["/"] = give(b"not gzip at all", Content_Encoding="gzip")
    assert fetch(site.url(), rules) == post(site.url(), rules).body == b"not gzip at all"


def test_of_a_long_answer_to_a_webhook_the_beginning_is_kept(rules: Rules, site: Site) -> None:
    site.routes["/"] = give(b"x" * 100_000, status=500)
    answer = post(site.url(), rules)
    assert (answer.status, answer.body) == (500, b"x" * 1000)
    assert site.asked[0][1]["webhook-id"] == "1"


def test_a_webhook_is_not_redirected(rules: Rules, site: Site, forbidden: Forbidden) -> None:
    target = f"https://127.0.0.1:{forbidden.port}/"
    site.routes["/"] = give(b"", status=307, Location=target)
    assert post(site.url(), rules).status == 307


def drip(handler: BaseHTTPRequestHandler) -> None:
    """A header now and then, for ever."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(1000):
        handler.wfile.write(f"X-{number}: 1\r\n".encode())
        time.sleep(0.02)


def trickle(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    for _ in range(1000):
        handler.wfile.write(b"x")
        time.sleep(0.02)


@pytest.mark.parametrize("answer", [drip, trickle])
def test_the_time_is_limited_however_much_comes_meanwhile(
    rules: Rules, site: Site, answer: object
) -> None:
    site.routes["/"] = answer  # type: ignore[assignment]
    for send in (fetch, post):
        began = time.monotonic()
        assert code_of(send, site.url(), rules, 0.3) == "timed_out"
        assert time.monotonic() - began < 10


def test_one_who_takes_the_connection_and_says_nothing_is_not_waited_for(site: Site) -> None:
    with socket.create_server((PUBLIC, 0)) as silent:
        port = silent.getsockname()[1]
        rules = Rules.from_plain({"networks": [NETWORK], "allow_http": False, "ports": [port]})
        for send in (fetch, post):
            began = time.monotonic()
            assert code_of(send, f"https://{PUBLIC}:{port}/", rules, 0.3) == "timed_out"
            assert time.monotonic() - began < 10


def test_a_second_address_is_tried_where_the_first_refuses(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_names(monkeypatch, lambda _: ["127.0.0.4", PUBLIC])
    networks = ["127.0.0.4/32", NETWORK]
    rules = Rules.from_plain({"networks": networks, "allow_http": False, "ports": [site.port]})
    site.routes["/"] = give(b"rows")
    assert fetch(site.url(host=NAME), rules) == post(site.url(host=NAME), rules).body == b"rows"


def test_sockets_of_the_file_system_are_not_opened(rules: Rules, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with pytest.raises(NotImplementedError):
        PublicBackend(rules, Deadline(1)).connect_unix_socket(path)
    with pytest.raises(NotImplementedError):
        asyncio.run(AsyncPublicBackend(rules).connect_unix_socket(path))


def test_httpx2_still_opens_its_connections_with_our_backend(rules: Rules) -> None:
    """Its transports are given a pool in a place that they do not promise to keep."""
    with PublicClient(rules, seconds=1) as client:
        pool = client._client._transport._pool  # type: ignore[attr-defined]
        assert isinstance(pool, httpcore2.ConnectionPool)
        assert isinstance(pool._network_backend, PublicBackend)
        assert client._client._mounts == {}


def test_rules_are_those_of_the_settings_and_survive_the_way_to_another_process() -> None:
    settings = Settings.model_validate(
        {"allowed_networks": "10.0.0.0/8,fd00::/8", "allowed_ports": "8443", "allow_http": True}
    )
    rules = Rules.of(settings)
    assert rules.ports == (80, 443, 8443)
    assert Rules.from_plain(rules.as_plain()) == rules
    assert Rules.of(Settings()) == Rules()
