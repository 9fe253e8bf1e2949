"""No URL leads to an address that is not public: not by its spelling, not by its name."""

import asyncio
import json
from pathlib import Path

import httpx2
import pytest

from app.datasets.uris import check_dataset_uri
from app.net.backends import Deadline, PublicBackend
from app.net.client import AsyncPublicClient, PublicClient, _Transport
from app.net.errors import AddressNotAllowed, HostNotFound, NetError
from app.net.rules import Rules
from app.net.urls import check_url
from app.settings import Settings
from app.uris import UriError
from tests.app.net.world import Authority, Forbidden, answer_names

CORPUS = json.loads((Path(__file__).parent / "hostile_urls.json").read_text())
AT_SUBMIT = [(code, uri) for code, uris in CORPUS["refused_at_submit"].items() for uri in uris]
LOOKED_UP = CORPUS["refused_when_looked_up"]
NAMES = CORPUS["names"]


def with_port(uri: str, forbidden: Forbidden) -> str:
    return uri.replace("{port}", str(forbidden.port))


def test_there_are_enough_of_them() -> None:
    assert len(set(LOOKED_UP) | {uri for _, uri in AT_SUBMIT}) >= 150


@pytest.fixture
def settings(forbidden: Forbidden, tmp_path: Path) -> Settings:
    """The listener's port is no reason to refuse; its address is."""
    return Settings(data_dir=tmp_path, allowed_ports=[forbidden.port])


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch, authority: Authority) -> list[str]:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
    return answer_names(monkeypatch, lambda name: NAMES.get(name, []))


@pytest.mark.parametrize(("code", "uri"), AT_SUBMIT)
def test_it_is_refused_without_a_look_at_the_network(
    settings: Settings, forbidden: Forbidden, names: list[str], code: str, uri: str
) -> None:
    with pytest.raises(UriError) as caught:
        check_dataset_uri(with_port(uri, forbidden), settings)
    assert caught.value.code == code
    assert caught.value.hint
    assert names == []


@pytest.mark.parametrize("uri", LOOKED_UP)
def test_it_is_refused_once_its_name_is_looked_up(
    settings: Settings, forbidden: Forbidden, uri: str
) -> None:
    url = with_port(uri, forbidden)
    check_dataset_uri(url, settings)
    with (
        pytest.raises(NetError) as caught,
        PublicClient(Rules.of(settings), seconds=5) as client,
        client.get(url),
    ):
        pass
    assert isinstance(caught.value, AddressNotAllowed | HostNotFound)
    assert not any(address in caught.value.detail for found in NAMES.values() for address in found)


def test_the_connection_itself_refuses_them_where_nobody_has_looked_at_the_url(
    settings: Settings, forbidden: Forbidden
) -> None:
    rules = Rules.from_plain({**Rules.of(settings).as_plain(), "allow_http": True})
    transport = _Transport(PublicBackend(rules, Deadline(60)))
    with httpx2.Client(transport=transport, trust_env=False) as client:
        for uri in [*LOOKED_UP, *(uri for _, uri in AT_SUBMIT)]:
            for scheme in ("https", "http"):
                url = with_port(uri, forbidden).replace("https:", f"{scheme}:", 1)
                with pytest.raises((NetError, httpx2.HTTPError, httpx2.InvalidURL, UnicodeError)):
                    client.get(url)
                assert not forbidden.was_reached, url


def test_so_does_that_of_asyncio(settings: Settings, forbidden: Forbidden) -> None:
    async def send_all() -> None:
        async with AsyncPublicClient(Rules.of(settings), seconds=5) as client:
            for uri in [*LOOKED_UP, *(uri for _, uri in AT_SUBMIT)]:
                with pytest.raises(NetError):
                    await client.post(with_port(uri, forbidden), b"{}")

    asyncio.run(send_all())


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/rows.jsonl", "https://example.org", "https://example.org:443/a?b=c#d",
        "https://8.8.8.8/", "https://[2606:4700::1111]/", "https://[64:ff9b::808:808]/",
        "https://a_b.example.org/", "https://bücher.example/ü.jsonl", "https://example.org./",
        "https://1e100.net/", "https://0x.example/", "https://example.org/a@b", "https://x/%20",
    ],
)  # fmt: skip
def test_what_is_public_is_not_refused(url: str) -> None:
    assert check_url(url, Rules()).scheme == "https"


def test_nothing_secret_of_a_url_is_repeated() -> None:
    for url in ("https://u:secret@host/a", "ftp://host/a?sig=secret", "https://h:1/#secret"):
        with pytest.raises(NetError) as caught:
            check_url(url, Rules())
        assert "secret" not in caught.value.detail
