"""A redirect gets no further than the URL that was given could have gone."""

import pytest

from app.net.client import MAX_REDIRECTS, PublicClient, chunks_of
from app.net.errors import NetError
from app.net.rules import Rules
from tests.app.net.world import NAME, PUBLIC, Forbidden, Site, answer_names, give, redirect

FORBIDDEN: dict[str, tuple[str, str]] = {
    "metadata": ("https://169.254.169.254/latest/meta-data/", "address_not_allowed"),
    "metadata over IPv6": ("https://[fd00:ec2::254]/", "address_not_allowed"),
    "loopback": ("https://127.0.0.1:{port}/", "address_not_allowed"),
    "loopback in another spelling": ("https://2130706433:{port}/", "address_not_allowed"),
    "loopback over IPv6": ("https://[::1]:{port}/", "address_not_allowed"),
    "loopback without a scheme": ("//127.0.0.1:{port}/", "address_not_allowed"),
    "localhost": ("https://localhost:{port}/", "address_not_allowed"),
    "a name of the inside": ("https://db.internal:{port}/", "address_not_allowed"),
    "a name of nothing": ("https://nowhere.test:{port}/", "host_not_found"),
    "a file": ("file:///etc/passwd", "redirect_not_allowed"),
    "http": ("http://127.0.0.1:{port}/", "redirect_not_allowed"),
    "http of the same site": ("http://" + PUBLIC + ":{site}/", "redirect_not_allowed"),
    "ftp": ("ftp://127.0.0.1:{port}/", "redirect_not_allowed"),
    "gopher": ("gopher://127.0.0.1:{port}/_", "redirect_not_allowed"),
    "data": ("data:text/plain,rows", "redirect_not_allowed"),
    "a bucket": ("s3://bucket/rows.jsonl", "redirect_not_allowed"),
    "another port": ("https://" + PUBLIC + ":22/", "port_not_allowed"),
    "a user": ("https://user@" + PUBLIC + ":{site}/", "uri_malformed"),
    "what is no URL": ("https://[/", "uri_malformed"),
    "a backslash": ("https://" + PUBLIC + ":{site}\\@127.0.0.1:{port}/", "uri_malformed"),
}


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    known = {NAME: [PUBLIC], "db.internal": ["127.0.0.1"]}
    return answer_names(monkeypatch, lambda name: known.get(name, []))


def fetch(url: str, rules: Rules) -> bytes:
    with PublicClient(rules, seconds=5) as client, client.get(url) as answer:
        return b"".join(chunks_of(answer))


@pytest.mark.parametrize(
    ("name", "status"),
    [*((name, 302) for name in FORBIDDEN), *(("loopback", n) for n in (301, 303, 307, 308))],
)
def test_what_is_forbidden_is_not_followed(
    rules: Rules, site: Site, forbidden: Forbidden, name: str, status: int
) -> None:
    location, code = FORBIDDEN[name]
    target = location.format(port=forbidden.port, site=site.port)
    site.routes["/rows"] = redirect(target, status)
    site.routes["/"] = give(b"followed")
    with pytest.raises(NetError) as caught:
        fetch(site.url("/rows", NAME), rules)
    assert caught.value.code == code
    assert [path for path, _ in site.asked] == ["/rows"]


def test_what_is_allowed_is_followed(rules: Rules, site: Site) -> None:
    site.routes |= {
        "/a": redirect("b"), "/b": redirect("/c", 307), "/c": redirect(site.url("/d", NAME), 308),
        "/d": give(b"rows"),
    }  # fmt: skip
    assert fetch(site.url("/a"), rules) == b"rows"
    hosts = [headers["host"] for _, headers in site.asked]
    assert hosts == [f"{PUBLIC}:{site.port}"] * 3 + [f"{NAME}:{site.port}"]


@pytest.mark.parametrize("location", ["/loop", "/hop"])
def test_no_more_than_three_are_followed(rules: Rules, site: Site, location: str) -> None:
    site.routes["/loop"] = redirect("/loop")
    for number in range(10):
        site.routes[f"/hop{number or ''}"] = redirect(f"/hop{number + 1}")
    site.routes["/hop10"] = give(b"rows")
    with pytest.raises(NetError) as caught:
        fetch(site.url(location), rules)
    assert caught.value.code == "redirect_not_allowed"
    assert len(site.asked) == 1 + MAX_REDIRECTS
