"""What the tests say to the app, and what they put into its database and store."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx2
from sqlalchemy import Engine, update
from sqlalchemy.orm import Session

from app.db import make_engine, now
from app.jobs.states import Status
from app.settings import Settings
from app.storage import ArtifactStore, open_store
from app.tables import JobRow, MetricRow

Json = dict[str, Any]
FILES = {
    "README.md": b"# An adapter\n",
    "adapter_config.json": b'{"r": 16}',
    "adapter_model.safetensors": bytes(range(256)) * 100,
    "empty.txt": b"",
}


def make_model(folder: Path, *names: str, config: str = "{}") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config)
    for name in names or ("model.safetensors",):
        (folder / name).write_bytes(b"")
    return folder


@contextmanager
def running(settings: Settings, port: int = 0) -> Iterator[str]:
    """``uvicorn --factory app.main:make_app`` in a process of its own, on a socket of ours."""
    listening = socket.create_server(("127.0.0.1", port))
    environment = {
        **os.environ,
        "FLATLORA_DATA_DIR": str(settings.data_dir),
        "FLATLORA_DATABASE_URL": settings.database_url,
        "FLATLORA_AUTH": settings.auth,
        "FLATLORA_DATASET_ROOTS": str(settings.dataset_roots[0]),
        "FLATLORA_MODEL_ROOTS": str(settings.model_roots[0]),
    }
    command = [sys.executable, "-m", "uvicorn", "--factory", "app.main:make_app"]
    command += ["--fd", str(listening.fileno()), "--log-level", "warning"]
    with closing(listening):
        server = subprocess.Popen(command, env=environment, pass_fds=[listening.fileno()])
        try:
            # The socket listens already: a request waits until the server takes it.
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.terminate()
            assert server.wait(30) in {0, -15}


@dataclass
class Service:
    http: httpx2.Client
    settings: Settings
    body: Json = field(default_factory=dict)
    """A job that is accepted."""

    def __post_init__(self) -> None:
        make_model(self.models / "tiny")
        (self.rows / "train.jsonl").write_text("{}\n")
        self.body = {"base_model": "file:tiny", "dataset_uri": "file:train.jsonl"}

    @property
    def rows(self) -> Path:
        return self.settings.dataset_roots[0]

    @property
    def models(self) -> Path:
        return self.settings.model_roots[0]

    @cached_property
    def engine(self) -> Engine:
        return make_engine(self.settings.database).execution_options(writes=True)

    @cached_property
    def store(self) -> ArtifactStore:
        return open_store(self.settings)

    def post(self, body: Json, **headers: str) -> httpx2.Response:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        names["Content-Type"] = "application/json"
        return self.http.post("/jobs", content=json.dumps(body), headers=names)

    def submit(self, **values: Any) -> Json:
        return ok(self.post(self.body | values), 202)

    def get(self, path: str, **params: Any) -> Json:
        return ok(self.http.get(path, params=params), 200)

    def refused(self, body: Json) -> Json:
        return ok(self.post(body), 422)

    def set(self, job_id: str, **values: Any) -> None:
        """Change a row as a worker would."""
        with Session(self.engine) as session, session.begin():
            session.execute(update(JobRow).where(JobRow.id == job_id).values(**values))

    def add_metrics(self, job_id: str, series: str, steps: range) -> None:
        with Session(self.engine) as session, session.begin():
            session.add_all(
                MetricRow(job_id=job_id, series=series, step=step, data={"loss": 1 / step})
                for step in steps
            )

    def finished(self, files: dict[str, bytes] = FILES) -> Json:
        """A job that has succeeded, with its adapter in the store."""
        job_id = self.submit()["id"]
        scratch = self.settings.data_dir / "scratch"
        scratch.parent.mkdir(exist_ok=True)
        listed = []
        for name, content in files.items():
            scratch.write_bytes(content)
            sha256 = self.store.put_file(scratch)
            assert sha256 == hashlib.sha256(content).hexdigest()
            listed.append({"name": name, "size": len(content), "sha256": sha256})
        adapter = {"files": listed, "size": sum(map(len, files.values()))}
        self.set(job_id, status=Status.SUCCEEDED, adapter=adapter, finished_at=now())
        return self.get(f"/jobs/{job_id}")


def ok(response: httpx2.Response, status: int) -> Json:
    assert response.status_code == status, response.text
    is_problem = status >= 400
    expected = "application/problem+json" if is_problem else "application/json"
    assert response.headers["content-type"] == expected
    answer: Json = response.json()
    if is_problem:
        assert answer["status"] == status
        assert answer["request_id"] == response.headers["x-request-id"]
    return answer


def faults(problem: Json) -> dict[str, str]:
    return {fault["pointer"]: fault["detail"] for fault in problem["errors"]}
