"""One job through a running service, the way a client would do it, and every byte of it checked.

Waits until the service is ready, uploads a few rows, trains the tiny base model on them, follows
the job to its end, downloads the adapter and compares each file with its sha256. Needs Python
alone; the key is taken from FLATLORA_API_KEY, else from the .env of the compose stack.

    python examples/smoke.py [--url http://127.0.0.1:8321] [--steps 60] [--kill-worker]

With --kill-worker, `docker kill` ends the container whose worker holds the job, in the middle, and
the job has to be finished by another from the checkpoint that was handed over: start two workers,
on this machine's Docker.

Exit codes: 0 everything held, 1 something did not, 2 wrong usage.
"""

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "examples" / "data" / "train.jsonl"
TINY = "/tiny-base"
TERMINAL = {"succeeded", "failed", "cancelled"}
POLL_SECONDS = 0.5
TIMEOUT_SECONDS = 60
AWAY_SECONDS = 60  # how long a service that stops answering is asked again
CHECKPOINTS_BEFORE_KILL = 2


class Broken(Exception):
    """Something did not hold; the message says what was found and what was expected."""


class Service:
    def __init__(self, url: str, key: str) -> None:
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        is_here = urlsplit(url).hostname in {"127.0.0.1", "::1", "localhost"}
        self._opener = build_opener(*([ProxyHandler({})] if is_here else []))

    def get(self, path: str) -> Json:
        return self._json(path)

    def post(self, path: str, body: bytes, kind: str, **headers: str) -> Json:
        return self._json(path, body, {"Content-Type": kind, **headers})

    def download(self, path: str) -> bytes:
        return self._send(path)

    def wait_until_ready(self, seconds: float) -> None:
        deadline, trouble = time.monotonic() + seconds, ""
        while time.monotonic() < deadline:
            try:
                self._open("/readyz", None, {})
                return
            except HTTPError as error:
                trouble = f"HTTP {error.code}: {_detail(error)}"
            except OSError as error:
                trouble = str(error)
            time.sleep(POLL_SECONDS)
        raise Broken(f"{self._url}/readyz was not ready within {seconds:g} s: {trouble}")

    def _json(
        self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Json:
        found = json.loads(self._send(path, body, headers or {}))
        if not isinstance(found, dict):
            raise Broken(f"{path}: found {type(found).__name__}, expected one JSON object")
        return found

    def _send(
        self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> bytes:
        """A request that reads is repeated while nobody answers; one that writes is sent once."""
        deadline = time.monotonic() + (AWAY_SECONDS if body is None else 0)
        while True:
            try:
                return self._open(path, body, headers or {})
            except HTTPError as error:
                if error.code < 500 or time.monotonic() > deadline:
                    raise Broken(f"{path}: HTTP {error.code}: {_detail(error)}") from error
            except OSError as error:
                if time.monotonic() > deadline:
                    raise Broken(f"no answer from {self._url}{path}: {error}") from error
            time.sleep(POLL_SECONDS)

    def _open(self, path: str, body: bytes | None, headers: dict[str, str]) -> bytes:
        request = Request(self._url + path, data=body, headers={**self._headers, **headers})  # noqa: S310 - the caller's URL
        with self._opener.open(request, timeout=TIMEOUT_SECONDS) as response:
            found: bytes = response.read()
            return found


def _detail(error: HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        problem = json.loads(text)
        return f"{problem['detail']} {problem.get('hint') or ''}".strip()
    except (ValueError, KeyError, TypeError):
        return text[:200] or str(error.reason)


def choose_base_model(service: Service) -> str:
    names = [model["id"] for model in service.get("/models")["items"]]
    for name in names:
        if str(name).rstrip("/").endswith(TINY):
            return str(name)
    raise Broken(
        f"found the base models {names}, expected one that ends with {TINY}: mount examples/ "
        "below FLATLORA_MODEL_ROOTS, or name another with --base-model"
    )


def upload_rows(service: Service, rows: int) -> str:
    """The uri of a dataset made of the first rows of the example."""
    lines = ROWS.read_bytes().splitlines(keepends=True)[:rows]
    body = b"".join(lines)
    stored = service.post("/datasets?filename=smoke.jsonl", body, "application/octet-stream")
    expected = hashlib.sha256(body).hexdigest()
    if stored["sha256"] != expected:
        raise Broken(f"the upload has sha256 {stored['sha256']}, expected {expected}")
    say(f"uploaded {len(lines)} rows as {stored['uri']}")
    return str(stored["uri"])


def submit(service: Service, base_model: str, dataset: str, steps: int) -> str:
    body = {
        "base_model": base_model,
        "dataset_uri": dataset,
        "rank": 8,
        "sigma": 0.05,
        "name": "smoke",
        "data": {"max_length": 256},
        "training": {
            "max_steps": steps,
            "learning_rate": 3e-3,
            "checkpoint_steps": max(1, steps // 10),
        },
    }
    job = service.post(
        "/jobs",
        json.dumps(body).encode(),
        "application/json",
        **{"Idempotency-Key": uuid.uuid4().hex},
    )
    say(f"submitted {job['id']}")
    return str(job["id"])


def follow(service: Service, job_id: str, seconds: float) -> Iterator[Json]:
    """Each event of the job, as soon as it is there, until the job is over."""
    after, deadline = 0, time.monotonic() + seconds
    while True:
        is_over = service.get(f"/jobs/{job_id}")["status"] in TERMINAL
        page = service.get(f"/jobs/{job_id}/events?after={after}")
        after = page["next"]
        yield from page["items"]
        if is_over and not page["items"]:
            return
        if time.monotonic() > deadline:
            raise Broken(f"{job_id} was not over within {seconds:g} s")
        time.sleep(POLL_SECONDS)


def holder(service: Service, job_id: str) -> Json:
    """The worker that has the job."""
    for worker in service.get("/workers")["items"]:
        if any(slot["job_id"] == job_id for slot in worker["slots"]):
            found: Json = worker
            return found
    raise Broken(f"no worker of GET /workers holds {job_id}, which is running")


def check_that_two_work(service: Service) -> None:
    active = [one["host"] for one in service.get("/workers")["items"] if one["state"] == "active"]
    if len(set(active)) < 2:
        raise Broken(
            f"found the workers {active}, expected two on different hosts: start another, as "
            "with docker compose up -d --scale worker-cpu=2"
        )


def kill(worker: Json, docker: str) -> None:
    """As a power cut would, without a warning. A container's host name is its id."""
    command = [*docker.split(), "kill", worker["host"]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the caller's docker
    if done.returncode:
        raise Broken(f"{' '.join(command)}: {done.stderr.strip()}")
    say(f"killed the container {worker['host']}, whose worker {worker['name']} held the job")


def check_hand_over(service: Service, job_id: str, victim: Json) -> None:
    """Another worker went on where the killed one's checkpoint was."""
    events = service.get(f"/jobs/{job_id}/events?after=0")["items"]
    runs = [event["data"]["worker"] for event in events if event["type"] == "job.running"]
    lost = {slot["name"] for slot in victim["slots"]}
    if len(runs) < 2 or runs[0] not in lost or runs[-1] in lost:
        raise Broken(f"the job ran on {runs}, expected first on {sorted(lost)} and last on another")
    resumed = [event["data"]["step"] for event in events if event["type"] == "job.resumed"]
    if not resumed or resumed[-1] < 1:
        raise Broken(f"the job went on from the steps {resumed}, expected one after the start")
    say(f"{runs[-1]} went on from step {resumed[-1]}")


def check_adapter(service: Service, job: Json) -> None:
    expected = {file["name"]: (file["size"], file["sha256"]) for file in job["adapter"]["files"]}
    found: dict[str, tuple[int, str]] = {}
    config: Json = {}
    with tarfile.open(fileobj=io.BytesIO(service.download(f"/jobs/{job['id']}/adapter"))) as tar:
        for member in tar:
            source = tar.extractfile(member)
            if source is None:
                raise Broken(f"the tar holds {member.name}, which is no plain file")
            body = source.read()
            name = member.name.rpartition("/")[2]
            found[name] = (len(body), hashlib.sha256(body).hexdigest())
            if name == "adapter_config.json":
                config = json.loads(body)
    if found != expected:
        raise Broken(f"the tar holds {found}, expected {expected}")
    if config.get("peft_type") != "LORA":
        raise Broken(f"adapter_config.json says {config}, expected a PEFT LoRA")
    size = sum(size for size, _ in found.values())
    say(f"downloaded the adapter: {len(found)} files, {size} bytes, each with its sha256")


def run(service: Service, options: argparse.Namespace) -> None:
    service.wait_until_ready(options.ready_seconds)
    say(f"{options.url} is ready, version {service.get('/version')['version']}")
    if options.kill_worker:
        check_that_two_work(service)
    base_model = options.base_model or choose_base_model(service)
    job_id = submit(service, base_model, upload_rows(service, options.rows), options.steps)
    victim, checkpoints = None, 0
    for event in follow(service, job_id, options.seconds):
        say(f"  {event['at'][11:19]} {event['type']:<16} {event['message']} {_worker(event)}")
        checkpoints += event["type"] == "job.checkpoint"
        if options.kill_worker and victim is None and checkpoints == CHECKPOINTS_BEFORE_KILL:
            victim = holder(service, job_id)
            kill(victim, options.docker)
    job = service.get(f"/jobs/{job_id}")
    if job["status"] != "succeeded":
        raise Broken(f"{job_id} is {job['status']}, expected succeeded: {job['failure']}")
    if options.kill_worker:
        if victim is None:
            raise Broken("the job was over before its worker could be killed: raise --steps")
        check_hand_over(service, job_id, victim)
    losses = job["result"]["held_out"]
    say(f"held-out loss {losses['before']['loss']:.4f} → {losses['after']['loss']:.4f}")
    check_adapter(service, job)


def _worker(event: Json) -> str:
    worker = event["data"].get("worker")
    return f"({worker})" if worker else ""


def key_of_the_stack() -> str:
    """FLATLORA_API_KEY, else the one that docs/deploy/env.sh has written into .env."""
    if key := os.environ.get("FLATLORA_API_KEY"):
        return key
    try:
        lines = (ROOT / ".env").read_text().splitlines()
    except OSError:
        return ""
    return next((line[17:] for line in lines if line.startswith("FLATLORA_API_KEY=")), "")


def say(text: str) -> None:
    sys.stdout.write(text.rstrip() + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description="One job through a running service.")
    parser.add_argument("--url", default=os.environ.get("FLATLORA_URL", "http://127.0.0.1:8321"))
    parser.add_argument("--base-model", help="default: the tiny one among GET /models")
    parser.add_argument("--rows", type=int, default=200, help="of the example dataset")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=900, help="that the job may take")
    parser.add_argument("--ready-seconds", type=float, default=180, help="to wait for /readyz")
    parser.add_argument("--kill-worker", action="store_true", help="end it in the middle")
    parser.add_argument("--docker", default="docker", help="the command that --kill-worker calls")
    options = parser.parse_args()
    if urlsplit(options.url).scheme not in {"http", "https"}:
        parser.error(f"--url: found {options.url!r}, expected http://… or https://…")
    try:
        run(Service(options.url, key_of_the_stack()), options)
    except (Broken, URLError) as error:
        sys.stderr.write(f"FAILED: {error}\n")
        return 1
    say("PASSED")
    return 0


if __name__ == "__main__":
    sys.exit(main())
