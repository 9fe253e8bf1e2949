"""The service as the command line sees it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from app.cli.output import UNREACHABLE, fail, fail_with_problem
from app.cli.profile import Profile

Json = dict[str, Any]


class Client:
    """One connection to the service; a refused request ends the command with its problem."""

    def __init__(self, profile: Profile) -> None:
        headers = {"Authorization": f"Bearer {profile.key}"} if profile.key else {}
        self._http = httpx2.Client(base_url=profile.url, headers=headers, timeout=60)
        self._url = profile.url

    def get(self, path: str, **params: Any) -> Json:
        given = {name: value for name, value in params.items() if value is not None}
        return self._json("GET", path, params=given)

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
                self._refuse(response)
            with partial.open("wb") as file:
                for chunk in response.iter_bytes(1 << 20):
                    file.write(chunk)
        partial.rename(target)

    def _json(self, method: str, path: str, **options: Any) -> Json:
        with self._reaching():
            response = self._http.request(method, path, **options)
        if response.is_error:
            self._refuse(response)
        answer: Json = response.json()
        return answer

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx2.TransportError as error:
            fail(
                f"no answer from {self._url}: {error}",
                "Start the service with `flatlora up`, or set FLATLORA_URL.",
                code=UNREACHABLE,
            )

    @staticmethod
    def _refuse(response: httpx2.Response) -> None:
        try:
            problem = response.json()
        except ValueError:
            problem = {"detail": f"HTTP {response.status_code} {response.reason_phrase}"}
        fail_with_problem(problem)
