"""The service as the command line sees it."""

import ipaddress
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import httpx2

from app.cli.output import UNREACHABLE, USAGE, err, fail, fail_with_problem
from app.cli.profile import Profile

Json = dict[str, Any]

PATIENCE_SECONDS = 60
POLL_TIMEOUT_SECONDS = 10
MAX_PAUSE_SECONDS = 5.0


class Client:
    """One connection to the service; a refused request ends the command with its problem."""

    def __init__(
        self, profile: Profile, *, as_json: bool = False, patience: float = PATIENCE_SECONDS
    ) -> None:
        headers = {"Authorization": f"Bearer {profile.key}"} if profile.key else {}
        try:
            self._http = httpx2.Client(
                base_url=profile.url,
                headers=headers,
                timeout=60,
                trust_env=not is_loopback(profile.url),  # no proxy reaches our own machine
            )
        except httpx2.InvalidURL as error:
            fail(f"FLATLORA_URL: found {profile.url!r}, expected a URL: {error}", code=USAGE)
        self._url = profile.url
        self._as_json = as_json
        self._patience = patience

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, **params: Any) -> Json:
        given = {name: value for name, value in params.items() if value is not None}
        return self._json("GET", path, params=given)

    def poll(self, path: str) -> Json:
        """As ``get``, but a service that is away or ill for a while is waited for."""
        deadline, pause = None, 0.5
        while True:
            try:
                response = self._http.get(path, timeout=POLL_TIMEOUT_SECONDS)
                if not response.is_server_error:
                    return self._answer(response)
                trouble = _status_line(response)
            except httpx2.TransportError as error:
                trouble = str(error)
            now = time.monotonic()
            if deadline is None:
                deadline = now + self._patience
                err.print(
                    f"no answer from {self._url}: {trouble}; trying again for {self._patience:g} s",
                    markup=False,
                    highlight=False,
                )
            if now + pause > deadline:
                self._give_up(trouble)
            time.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE_SECONDS)

    def post(self, path: str, body: Json | None = None, **headers: str) -> Json:
        return self._json("POST", path, json=body, headers=headers)

    def upload(self, path: Path) -> Json:
        with path.open("rb") as file:
            return self._json(
                "POST",
                "/datasets",
                params={"filename": path.name},
                content=file,
                headers={"Content-Type": "application/octet-stream"},
            )

    def download(self, path: str, target: Path) -> None:
        """Write a response to a file, whole or not at all."""
        partial = target.with_name(target.name + ".part")
        with self._reaching(), self._http.stream("GET", path) as response:
            if response.is_error:
                response.read()
                self._answer(response)
            with partial.open("wb") as file:
                for chunk in response.iter_bytes(1 << 20):
                    file.write(chunk)
        partial.rename(target)

    def _json(self, method: str, path: str, **options: Any) -> Json:
        with self._reaching():
            response = self._http.request(method, path, **options)
        return self._answer(response)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx2.TransportError as error:
            self._give_up(str(error))

    def _give_up(self, trouble: str) -> NoReturn:
        problem = {
            "code": "unreachable",
            "detail": f"no answer from {self._url}: {trouble}",
            "hint": "Start the service with `flatlora up`, or set FLATLORA_URL.",
        }
        fail_with_problem(problem, as_json=self._as_json, code=UNREACHABLE)

    def _answer(self, response: httpx2.Response) -> Json:
        found = _json_object(response)
        if found is None:
            self._give_up(f"{_status_line(response)} without JSON, which is no answer of flatlora")
        if response.is_error:
            fail_with_problem(found, as_json=self._as_json)
        return found


def _json_object(response: httpx2.Response) -> Json | None:
    try:
        found = response.json()
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _status_line(response: httpx2.Response) -> str:
    return f"HTTP {response.status_code} {response.reason_phrase}"


def is_loopback(url: str) -> bool:
    host = httpx2.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
