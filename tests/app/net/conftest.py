from collections.abc import Iterator

import pytest

from app.net.rules import Rules
from tests.app.net.world import NETWORK, Authority, Forbidden, Site, listening, make_authority
from tests.app.net.world import serving as serving_site


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def site(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """With TLS, and trusted."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
    with serving_site(authority.server) as site:
        yield site


@pytest.fixture
def forbidden() -> Iterator[Forbidden]:
    with listening() as found:
        yield found
        assert not found.was_reached


@pytest.fixture
def rules(site: Site, forbidden: Forbidden) -> Rules:
    """That let the site be reached, and do not care for ports."""
    return Rules.from_plain(
        {"networks": [NETWORK], "allow_http": True, "ports": [80, 443, site.port, forbidden.port]}
    )
