"""Who may ask, and what is said to those who may not."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.access.shared_key import ensure_key
from app.main import create_app
from app.settings import Settings
from tests.app.conftest import make_settings
from tests.app.service import Service, ok

OPEN = {"/healthz", "/readyz", "/version"}


@pytest.fixture
def settings(tmp_path: Path, migrated_sqlite_url: str) -> Settings:
    return make_settings(tmp_path, migrated_sqlite_url, auth="key")


class TestKey:
    def test_every_route_but_the_service_pages_asks_for_it(self, service: Service) -> None:
        paths = service.get("/openapi.json")["paths"]
        for path in paths.keys() - OPEN:
            for method in paths[path]:
                response = service.http.request(method, path)
                if path.startswith("/v1/"):
                    assert response.status_code == 401
                    assert response.json()["error"]["code"] == "invalid_api_key"
                else:
                    assert ok(response, 401)["code"] == "unauthenticated"
                assert response.headers["www-authenticate"] == "Bearer"
        assert "/jobs/{job_id}/adapter" in paths

    @pytest.mark.parametrize(
        "path",
        [
            "/docs", "/docs/assets/swagger-ui.css", "/openapi.json", "/healthz", "/readyz",
            "/version",
        ],
    )  # fmt: skip
    def test_the_service_pages_are_open(self, service: Service, path: str) -> None:
        assert service.http.get(path).status_code == 200

    def test_the_right_key_opens(self, service: Service, settings: Settings) -> None:
        key = settings.key_file.read_text().strip()
        for scheme in ("Bearer", "bearer"):
            headers = {"Authorization": f"{scheme} {key}"}
            assert service.http.get("/jobs", headers=headers).status_code == 200

    @pytest.mark.parametrize(
        "given", ["Bearer flk_wrong", "Bearer ", "Bearer", "Basic abc", "flk_x", "Bearer é"]
    )
    def test_another_key_does_not(self, service: Service, given: str) -> None:
        response = service.http.get("/jobs", headers={b"Authorization": given.encode("latin-1")})
        assert "api_key" in ok(response, 401)["hint"]

    def test_without_a_key_nothing_is_said_of_the_body(self, service: Service) -> None:
        ok(service.post({"rank": 0}), 401)

    def test_none_switches_it_off(self, tmp_path: Path, migrated_sqlite_url: str) -> None:
        settings = make_settings(tmp_path, migrated_sqlite_url, auth="none")
        with TestClient(create_app(settings), base_url="http://localhost") as http:
            assert http.get("/jobs").status_code == 200
        assert not settings.key_file.exists()


class TestEnsureKey:
    def test_it_is_made_once_and_only_its_owner_may_read_it(self, settings: Settings) -> None:
        key, is_new = ensure_key(settings)
        assert key.startswith("flk_")
        assert len(key) > 40
        assert is_new
        assert ensure_key(settings) == (key, False)
        assert stat.S_IMODE(settings.key_file.stat().st_mode) == 0o600
        assert [path.name for path in settings.data_dir.iterdir()] == ["api_key"]

    def test_many_at_once_agree(self, settings: Settings) -> None:
        with ThreadPoolExecutor(20) as pool:
            made = list(pool.map(lambda _: ensure_key(settings), range(20)))
        assert len({key for key, _ in made}) == 1
        assert [is_new for _, is_new in made].count(True) == 1

    def test_an_empty_file_opens_nothing(self, settings: Settings) -> None:
        settings.data_dir.mkdir()
        settings.key_file.touch()
        with pytest.raises(ValueError, match="is empty: remove it"):
            ensure_key(settings)


class TestOtherSites:
    @pytest.fixture
    def settings(self, tmp_path: Path, migrated_sqlite_url: str) -> Settings:
        return make_settings(tmp_path, migrated_sqlite_url)

    @pytest.mark.parametrize("host", ["evil.example", "evil.example:8321", "", "localhost.evil"])
    def test_a_foreign_host_is_421_on_the_loopback(self, service: Service, host: str) -> None:
        problem = ok(service.http.get("/jobs", headers={"Host": host}), 421)
        assert problem["code"] == "host_not_allowed"
        assert "FLATLORA_ALLOWED_HOSTS" in problem["hint"]

    @pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8321", "[::1]:8321"])
    def test_its_own_names_are_taken(self, service: Service, host: str) -> None:
        assert service.http.get("/jobs", headers={"Host": host}).status_code == 200

    @pytest.mark.parametrize(
        ("values", "host", "status"),
        [
            ({"host": "0.0.0.0"}, "any.example", 200),  # noqa: S104 - a setting, nothing listens
            ({"host": "::1"}, "any.example", 421),
            ({"host": "0.0.0.0", "allowed_hosts": "a.example,b.example"}, "b.example", 200),  # noqa: S104
            ({"host": "0.0.0.0", "allowed_hosts": "a.example"}, "b.example", 421),  # noqa: S104
        ],
    )
    def test_elsewhere_the_settings_say(
        self,
        tmp_path: Path,
        migrated_sqlite_url: str,
        values: dict[str, str],
        host: str,
        status: int,
    ) -> None:
        settings = make_settings(tmp_path, migrated_sqlite_url, **values)
        with TestClient(create_app(settings), base_url=f"http://{host}") as http:
            assert http.get("/version").status_code == status

    def test_a_page_of_another_site_may_not_write(self, service: Service) -> None:
        for site in ("cross-site", "same-site"):
            headers = {"Sec-Fetch-Site": site, "Content-Type": "text/plain"}
            response = service.http.post("/datasets", params={"filename": "a.csv"}, content=b"x",
                                         headers=headers)  # fmt: skip
            assert ok(response, 403)["code"] == "cross_site"
            assert service.http.get("/version", headers=headers).status_code == 200
        same = {"Sec-Fetch-Site": "same-origin", "Content-Type": "text/plain"}
        response = service.http.post("/datasets?filename=a.csv", content=b"x", headers=same)
        assert response.status_code == 201
