"""A name whose address changes with every look is looked up once, and that address is taken."""

import asyncio
from collections.abc import Iterator, Sequence
from itertools import cycle

import httpx2
import pytest

from app.net.client import AsyncPublicClient, PublicClient, chunks_of
from app.net.errors import AddressNotAllowed
from app.net.rules import Rules
from tests.app.net.world import (
    NAME,
    PUBLIC,
    Authority,
    Forbidden,
    Site,
    answer_names,
    give,
    listening,
    serving,
)

TRIES = 1000


@pytest.fixture
def forbidden(site: Site) -> Iterator[Forbidden]:
    """On the port of the site: only the address tells them apart."""
    with listening(site.port) as found:
        yield found
        assert not found.was_reached


@pytest.fixture
def site(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
    with serving() as site:
        site.routes["/"] = give(b"rows")
        yield site


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch, forbidden: Forbidden) -> list[str]:
    """Public at one look, forbidden at the next."""
    addresses = cycle([[PUBLIC], ["127.0.0.1"]])
    return answer_names(monkeypatch, lambda _: next(addresses))


def test_a_thousand_times(rules: Rules, site: Site, looks: list[str], forbidden: Forbidden) -> None:
    outcomes = []
    for _ in range(TRIES):
        with PublicClient(rules, seconds=5) as client:
            try:
                with client.get(site.url(host=NAME)) as answer:
                    outcomes.append(b"".join(chunks_of(answer)))
            except AddressNotAllowed:
                outcomes.append(b"")
    assert outcomes == [b"rows", b""] * (TRIES // 2)
    assert len(looks) == TRIES
    assert not forbidden.was_reached


def test_with_asyncio_too(rules: Rules, site: Site, looks: list[str]) -> None:
    async def send() -> bytes:
        async with AsyncPublicClient(rules, seconds=5) as client:
            try:
                return (await client.post(site.url(host=NAME), b"{}")).body
            except AddressNotAllowed:
                return b""

    async def send_all() -> Sequence[bytes]:
        return [await send() for _ in range(200)]

    assert asyncio.run(send_all()) == [b"rows", b""] * 100
    assert len(looks) == 200


def test_whoever_checks_a_name_and_connects_to_it_afterwards_is_caught(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tests above would see if it were done so here."""
    import socket

    addresses = cycle([[PUBLIC], ["127.0.0.1"]])
    answer_names(monkeypatch, lambda _: next(addresses))
    with listening(site.port) as forbidden:
        assert socket.getaddrinfo(NAME, site.port)[0][4][0] == PUBLIC
        with pytest.raises(httpx2.HTTPError):
            httpx2.get(site.url(host=NAME), timeout=0.2, trust_env=False)
        assert forbidden.was_reached
