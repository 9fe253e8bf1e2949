"""What a URL from outside may look like: all that can be told before its name is looked up."""

import re

import httpx2

from app.net.addresses import literal
from app.net.errors import AddressNotAllowed, PortNotAllowed, SchemeNotAllowed, UrlMalformed
from app.net.rules import Rules

MAX_LENGTH, MAX_SHOWN = 8192, 300
SHAPE = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?#]+)(?:[/?#].*)?")
AUTHORITY = re.compile(r"(?:\[[^\]@]*\]|[^\[\]:@]+)(?::(?P<port>\d{1,5})?)?", re.ASCII)
NAME = re.compile(r"(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_-]{1,63}")
LOOPBACK = "127.0.0.1"
HIDDEN = "?[hidden]"
HINT = "Expected a URL such as https://host/rows.jsonl, without user, password or odd signs."


def check_url(text: str, rules: Rules) -> httpx2.URL:
    """The URL, with its host as it will be looked up. Raises a ``NetError``; sends nothing."""
    match = SHAPE.fullmatch(text) if _is_plain(text) else None
    if match is None:
        raise UrlMalformed(f"{shown(text)} is no URL.", HINT)
    if text.endswith(HIDDEN):
        raise UrlMalformed(
            f"{shown(text)} comes from an answer, which hides what stands after the question mark.",
            "Give the URL with its own query.",
        )
    scheme = match["scheme"].lower()
    if scheme not in rules.schemes:
        raise _scheme_not_allowed(scheme)
    if not AUTHORITY.fullmatch(match["authority"]):
        raise UrlMalformed(
            f"{shown(text)} has, between the slashes, more than a host and a port.", HINT
        )
    try:
        url = httpx2.URL(text)
    except (httpx2.InvalidURL, UnicodeError) as error:
        raise UrlMalformed(f"{shown(text)} is no URL.", HINT) from error
    host = _host(url, text)
    url = url.copy_with(host=host, fragment=None)
    check_literal(host, rules)
    if port_of(url) not in rules.ports:
        raise PortNotAllowed(host, port_of(url), rules.ports_told)
    return url


def check_literal(host: str, rules: Rules) -> None:
    """That a host is no forbidden address. Of names only those of the loopback are known here."""
    if host == "localhost" or host.endswith(".localhost"):
        host_address = literal(LOOPBACK)
    else:
        host_address = literal(host)
    if host_address is not None and not rules.admit(host_address):
        raise AddressNotAllowed(host)


def port_of(url: httpx2.URL) -> int:
    return url.port if url.port is not None else {"http": 80, "https": 443}[url.scheme]


def bare(uri: str) -> str:
    """A URI without what may be secret in it: user, password, and a query, which may sign it."""
    return re.sub(r"(?<=//)[^/]*@", "", re.split(r"[?#]", uri, maxsplit=1)[0])


def without_query(uri: str) -> str:
    """A URI as answers show it: the query of a URL may sign it, and is as good as a password."""
    found, mark, _ = uri.partition("?")
    return f"{found}{HIDDEN}" if mark and found.lower().startswith(("https:", "http:")) else uri


def shown(uri: str) -> str:
    """The same in quotes, and cut where it is long."""
    found = bare(uri)
    return repr(found) if len(found) <= MAX_SHOWN else f"{found[:MAX_SHOWN]!r}…"


def _is_plain(text: str) -> bool:
    """No sign that one reader of URLs drops or takes for another, and another does not."""
    return len(text) <= MAX_LENGTH and text.isprintable() and not re.search(r"[\s\\]", text)


def _host(url: httpx2.URL, text: str) -> str:
    host = url.raw_host.decode("ascii").removesuffix(".")
    if ":" in host:
        return host
    if not NAME.fullmatch(host) or len(host) > 253:
        raise UrlMalformed(f"{shown(text)} has no host that could be looked up.", HINT)
    return host


def _scheme_not_allowed(scheme: str) -> SchemeNotAllowed:
    if scheme == "http":
        return SchemeNotAllowed(
            "An http: URL can be read and changed by whoever stands in between.",
            "Write https:, or let the operator set FLATLORA_ALLOW_HTTP for a private network.",
        )
    return SchemeNotAllowed(f"{scheme}: is not fetched from there.", "Write an https: URL.")
