"""How often a key and a project may ask, how often somebody may guess, and what is said of it."""

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import pytest
from limits import WindowStats
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from app.access.keys import make_key as new_key
from app.access.principal import Principal, Role
from app.access.rates import Count, Guesses, Rates, network
from app.errors import RateLimited
from app.main import create_app
from app.quotas.limits import Limits
from app.quotas.repository import add_project, limiting
from app.settings import Settings
from tests.app.conftest import make_settings, serve
from tests.app.keys import acting, bearer, make_key, operator
from tests.app.listening import said
from tests.app.service import Service, ok
from tests.faults.procs import end, reserve_port, spawn
from tests.faults.servers import RedisServer
from tests.system.service import until

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def settings(tmp_path: Path, migrated_sqlite_url: str) -> Settings:
    return make_settings(
        tmp_path, migrated_sqlite_url, auth="key",
        key_requests_per_minute=5, requests_per_minute=8, failed_keys_per_minute=10,
    )  # fmt: skip


def stay_within_a_minute(seconds: float = 5) -> None:
    """What follows takes less. Where a minute of the clock ends, a window gives some back."""
    if (left := 60 - time.time() % 60) < seconds:
        time.sleep(left)


class TestRequests:
    def test_every_answer_says_what_is_left(self, service: Service) -> None:
        stay_within_a_minute()
        with acting(service, make_key(service, "search")["key"]) as http:
            job = service.submit()
            answers = [
                http.get("/jobs"),
                http.get(f"/jobs/{job['id']}"),
                http.get("/jobs/unknown"),
            ]
        for left, answer in zip((3, 2, 1), answers, strict=True):
            policy = answer.headers["ratelimit-policy"]
            assert policy == '"key";q=5;w=60, "project";q=8;w=60'
            form = rf'"key";r={left};t=\d+, "project";r={left + 3};t=\d+'
            assert re.fullmatch(form, answer.headers["ratelimit"]), answer.headers["ratelimit"]

    def test_one_too_many_is_refused_before_anything_is_done(self, service: Service) -> None:
        stay_within_a_minute()
        with acting(service, make_key(service, "search")["key"]):
            for _ in range(5):
                service.submit()
            with said("jobs") as statements:
                response = service.post(service.body)
            problem = ok(response, 429)
        assert problem["code"] == "rate_limited"
        assert problem["detail"] == "The key has sent its 5 requests of this minute."
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert response.headers["ratelimit"].startswith('"key";r=0;t=')
        assert statements == []

    def test_the_keys_of_a_project_share_its_limit_and_no_other_project_does(
        self, service: Service
    ) -> None:
        first, second = (bearer(make_key(service, "search")["key"]) for _ in range(2))
        other = bearer(make_key(service, "other")["key"])

        def ask(headers: dict[str, str], times: int) -> list[int]:
            asked = [service.http.get("/models", headers=headers) for _ in range(times)]
            return [answer.status_code for answer in asked]

        stay_within_a_minute()
        assert ask(first, 5) == [200] * 5
        assert ask(second, 4) == [200] * 3 + [429]
        refusal = service.http.get("/models", headers=second)
        assert refusal.json()["detail"].startswith("The project has sent its 8 requests")
        assert ask(other, 5) == [200] * 5

    def test_a_project_may_have_its_own_limit_or_none(self, service: Service) -> None:
        with Session(service.engine) as session, session.begin():
            for project, most in (("few", 2), ("any", -1)):
                session.execute(add_project("sqlite", project=project))
                session.execute(limiting(project, {"requests_per_minute": most}))
        asked = []
        stay_within_a_minute()
        for project, most in (("few", 2), ("any", 5)):  # of the key, in the end
            headers = bearer(make_key(service, project)["key"])
            asked = [service.http.get("/models", headers=headers) for _ in range(6)]
            assert [answer.status_code for answer in asked] == [200] * most + [429] * (6 - most)
        assert "project" not in asked[0].headers["ratelimit"]

    def test_the_operator_is_not_limited(self, service: Service) -> None:
        answers = [service.http.get("/models", headers=operator(service)) for _ in range(30)]
        assert {answer.status_code for answer in answers} == {200}
        assert "ratelimit" not in answers[0].headers

    def test_zero_is_no_limit(self, tmp_path: Path, migrated_sqlite_url: str) -> None:
        settings = make_settings(
            tmp_path, migrated_sqlite_url, auth="key",
            key_requests_per_minute=0, requests_per_minute=0,
        )  # fmt: skip
        for service in serve(settings):
            answer = service.http.get("/models", headers=bearer(make_key(service)["key"]))
            assert "ratelimit" not in answer.headers
            assert (
                service.http.get("/quota", headers=operator(service)).json()["requests_per_minute"]
                is None
            )

    def test_a_window_moves_and_what_is_taken_comes_back(self) -> None:
        rates, limits = Rates(Settings(key_requests_per_minute=6_000)), Limits()
        asking = Principal("p", Role.VIEWER, "x", key_id="k")
        stay_within_a_minute()
        for _ in range(6_000):
            rates.take(asking, limits)
        with pytest.raises(RateLimited) as refusal:
            rates.take(asking, limits)
        assert int(refusal.value.headers["Retry-After"]) <= 60

    def test_it_costs_a_request_little(self) -> None:
        rates, limits = Rates(Settings()), Limits(requests_per_minute=10**6)
        asking = [Principal("p", Role.VIEWER, "x", key_id=f"k{n}") for n in range(100)]
        started = time.perf_counter()
        for number in range(2_000):
            rates.take(asking[number % 100], limits)
        assert (time.perf_counter() - started) / 2_000 < 0.0005  # a tenth of a ms, when quiet


class TestTogether:
    """Two API processes of a cluster."""

    @pytest.fixture
    def redis(self, tmp_path: Path) -> Iterator[RedisServer]:
        with RedisServer(tmp_path / "redis") as server:
            yield server

    @pytest.fixture
    def apps(
        self, tmp_path: Path, migrated_postgres_url: str, redis: RedisServer
    ) -> Iterator[tuple[Service, TestClient]]:
        settings = make_settings(
            tmp_path, migrated_postgres_url, auth="key", broker_url=redis.url(),
            relay_seconds=10_000, key_requests_per_minute=40,
        )  # fmt: skip
        for service in serve(settings):
            with TestClient(create_app(settings), base_url="http://localhost") as other:
                yield service, other

    def test_what_one_has_counted_the_other_knows_and_without_redis_each_goes_by_its_own(
        self, apps: tuple[Service, TestClient], redis: RedisServer
    ) -> None:
        service, other = apps
        headers = bearer(make_key(service)["key"])

        def ask(http: httpx2.Client | TestClient) -> int:
            return int(http.get("/models", headers=headers).status_code)

        stay_within_a_minute(15)
        assert [ask(service.http) for _ in range(40)] == [200] * 40
        until(lambda: ask(other) == 429, seconds=10)
        assert ask(service.http) == 429
        with redis.client() as client:
            keys = client.keys("flatlora:rates*")
            assert keys
            assert all(0 < client.ttl(key) <= 120 for key in keys)  # nothing is left behind
        redis.kill()
        until(lambda: ask(other) == 200, seconds=15)
        assert ask(service.http) == 429  # its own count says so
        redis.start()


class TestElsewhere:
    class Others:
        """What is known of other processes, as a test says it."""

        def __init__(self) -> None:
            self.left: WindowStats | None = None
            self.told: list[int] = []

        def add(self, count: Count, number: int) -> None:
            self.told.append(number)

        def known(self, count: Count) -> WindowStats | None:
            return self.left

    def test_the_smaller_rest_counts_and_a_refusal_asks_again(self) -> None:
        others = self.Others()
        rates = Rates(Settings(key_requests_per_minute=5), others)
        asking, limits = Principal("p", Role.VIEWER, "x", key_id="k"), Limits()
        assert rates.take(asking, limits)["RateLimit"].startswith('"key";r=4;')
        others.left = WindowStats(time.time() + 7, 2)
        assert rates.take(asking, limits)["RateLimit"] == '"key";r=2;t=7'
        others.left = WindowStats(time.time() + 7, 0)
        with pytest.raises(RateLimited):
            rates.take(asking, limits)
        assert others.told == [1, 1, 0]


class TestGuesses:
    def test_after_some_wrong_keys_no_other_is_looked_up(self, service: Service) -> None:
        headers = bearer(make_key(service, "search")["key"])
        unknown = make_key(service, "other")["key"]
        assert service.http.get("/models", headers=headers).status_code == 200
        with said("FROM api_keys") as statements:
            guesses = [
                service.http.get("/models", headers=bearer(new_key().key)) for _ in range(200)
            ]
        assert [guess.status_code for guess in guesses] == [401] * 10 + [429] * 190
        assert len(statements) <= 11
        assert ok(guesses[-1], 429)["code"] == "rate_limited"
        assert 1 <= int(guesses[-1].headers["retry-after"]) <= 60
        # Who was known before goes on, though it shares the address.
        assert service.http.get("/models", headers=headers).status_code == 200
        # Who was not has to wait, also with the right key: it might be a guess.
        assert service.http.get("/models", headers=bearer(unknown)).status_code == 429

    def test_a_request_without_a_key_is_no_guess(self, service: Service) -> None:
        for _ in range(30):
            ok(service.http.get("/models"), 401)
        assert service.http.get("/models", headers=operator(service)).status_code == 200

    def test_a_short_key_of_the_operators_cannot_be_tried_out(
        self, tmp_path: Path, migrated_sqlite_url: str
    ) -> None:
        """Known keys pass where others are not looked at: one that can be guessed must not."""
        for key, status in (("hunter2", 429), ("flk_" + "a" * 40, 200)):
            (tmp_path / key).mkdir()
            settings = make_settings(
                tmp_path / key, migrated_sqlite_url, auth="key", api_key=key,
                failed_keys_per_minute=3,
            )  # fmt: skip
            with TestClient(create_app(settings), base_url="http://localhost") as http:
                assert http.get("/models", headers=bearer(key)).status_code == 200
                for number in range(5):
                    http.get("/models", headers=bearer(f"hunter{number + 3}"))
                assert http.get("/models", headers=bearer(key)).status_code == status

    def test_an_address_of_version_6_is_the_network_of_its_owner(self) -> None:
        same = {network("2001:db8:0:1::1"), network("2001:db8:0:1:ffff::2")}
        assert len(same) == 1
        assert network("2001:db8:0:2::1") not in same
        assert network("192.0.2.1") == "192.0.2.1"
        assert network("::ffff:192.0.2.1") != network("::ffff:192.0.2.2")
        assert network("testclient") == "testclient"

    @pytest.mark.torture
    def test_a_hundred_thousand_are_cheap(self) -> None:
        guesses = Guesses(60)
        started, refused = time.perf_counter(), 0
        for _ in range(100_000):
            try:
                guesses.check("192.0.2.1")
            except RateLimited:
                refused += 1
            else:
                guesses.count("192.0.2.1")
        assert refused >= 100_000 - 60 * (2 + (time.perf_counter() - started) / 60)
        assert time.perf_counter() - started < 60

    @pytest.mark.parametrize(("trusted", "status"), [("127.0.0.1", 401), ("192.0.2.9", 429)])
    def test_a_forwarded_address_is_believed_of_a_trusted_proxy_alone(
        self, settings: Settings, trusted: str, status: int
    ) -> None:
        with serving(settings, FLATLORA_TRUSTED_PROXIES=trusted) as http:

            def guess(address: str) -> int:
                headers = {"Authorization": "Bearer wrong", "X-Forwarded-For": address}
                return http.get("/models", headers=headers).status_code

            assert [guess("198.51.100.1") for _ in range(11)] == [401] * 10 + [429]
            assert guess("198.51.100.2") == status


@contextmanager
def serving(settings: Settings, **environment: str) -> Iterator[httpx2.Client]:
    """The API process as ``flatlora up`` starts it."""
    with reserve_port() as reserved:
        port = reserved.getsockname()[1]
        log = settings.data_dir.parent / "api.log"
        mine = {
            "FLATLORA_DATA_DIR": str(settings.data_dir),
            "FLATLORA_DATABASE_URL": settings.database_url,
            "FLATLORA_FAILED_KEYS_PER_MINUTE": str(settings.failed_keys_per_minute),
            "FLATLORA_PORT": str(port),
        }
        command = [sys.executable, "-m", "app.serve"]
        environment = {**os.environ, **mine, **environment}
        process = spawn(command, log=log, environment=environment, folder=ROOT)
        try:
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}") as http:

                def answers() -> bool:
                    assert process.poll() is None, log.read_text()
                    with suppress(httpx2.TransportError):
                        return http.get("/healthz").is_success
                    return False

                until(answers)
                yield http
        finally:
            end([process.pid])
            process.wait()
