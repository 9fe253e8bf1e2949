"""A base model of the hub is measured before it is fetched, and its time is limited."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests.app.conftest import make_settings, serve
from tests.worker.hub import COMMITS, Hub, point_library_at, small_hub
from tests.worker.test_remote import attempt
from worker.download import download_model
from worker.training.errors import BaseModelUnavailable

WANTED = {"config.json": b"{}" * 50, "tokenizer.json": b"{}" * 100}
WEIGHTS = {"model.safetensors": bytes(1000)}
UNWANTED = {
    "pytorch_model.bin": bytes(5000), "modeling_evil.py": bytes(700), "tokenizer.py": bytes(90),
    "README.md": b"#",
}  # fmt: skip
SIZE = 100 + 200 + 1000


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with small_hub() as hub:
        for commit in COMMITS:
            for path, body in (WANTED | WEIGHTS | UNWANTED).items():
                hub.files[commit, path] = body
        point_library_at(hub, tmp_path, monkeypatch)
        yield hub


def fetch(revision: str | None = None, *, max_bytes: int = SIZE, **values: Any) -> Path:
    given = {"with_weights": True} | values
    return download_model("org/name", revision, max_bytes=max_bytes, **given)


def why(revision: str | None = None, **values: Any) -> BaseModelUnavailable:
    with pytest.raises(BaseModelUnavailable) as caught:
        fetch(revision, **values)
    return caught.value


class TestSize:
    def test_what_just_fits_is_fetched_and_only_what_is_fetched_counts(self, hub: Hub) -> None:
        folder = fetch()
        assert folder.name == COMMITS[0]
        assert {path.name for path in folder.iterdir()} == {*WANTED, *WEIGHTS}
        assert hub.fetched() == {*WANTED, *WEIGHTS}

    def test_a_byte_more_and_nothing_is_fetched(self, hub: Hub, tmp_path: Path) -> None:
        failure = why(max_bytes=SIZE - 1)
        assert failure.reason == "base_model_unavailable"
        assert "1,300 bytes to fetch, and this service fetches 1,299" in failure.message
        assert failure.hint
        assert "FLATLORA_MAX_MODEL_BYTES" in failure.hint
        assert hub.fetched() == set()
        assert not (tmp_path / "cache").exists()

    def test_of_a_dry_run_the_weights_do_not_count(self, hub: Hub) -> None:
        folder = fetch(with_weights=False, max_bytes=300)
        assert {path.name for path in folder.iterdir()} == set(WANTED)

    def test_what_is_fetched_is_what_was_measured(
        self, hub: Hub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The branch moves to something larger as soon as it was measured."""
        hub.files[COMMITS[1], "model.safetensors"] = bytes(9000)
        describe = hub.describe

        def moving(handler: Any) -> None:
            describe(handler)
            hub.main = COMMITS[1]

        monkeypatch.setattr(hub, "describe", moving)
        assert fetch("main").name == COMMITS[0]
        assert "9,300 bytes" in why("main").message

    def test_halves_that_an_ended_process_has_left_do_not_fill_the_disk(
        self, hub: Hub, tmp_path: Path
    ) -> None:
        blobs = tmp_path / "cache" / "models--org--name" / "blobs"
        blobs.mkdir(parents=True)
        for name, hours in {"old.incomplete": 2, "young.incomplete": 0, "whole": 2}.items():
            (blobs / name).write_bytes(b"half")
            then = time.time() - 3600 * hours
            os.utime(blobs / name, (then, then))
        fetch()
        left = {path.name for path in blobs.iterdir()}
        assert left & {"old.incomplete", "young.incomplete", "whole"} == {
            "young.incomplete",
            "whole",
        }

    @pytest.mark.parametrize("revision", [None, "main", COMMITS[0]])
    def test_when_the_hub_is_away_the_cache_is_used(
        self, hub: Hub, revision: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = fetch(revision)
        hub.fails = 1000
        assert fetch(revision) == folder
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert fetch(revision) == folder

    def test_when_the_hub_is_away_and_comes_back_nothing_is_fetched_unmeasured(
        self, hub: Hub
    ) -> None:
        hub.fails = 1
        assert "cannot get org/name from the hub (HfHubHTTPError)" in why().message
        assert hub.fetched() == set()

    def test_what_is_not_there_is_told(self, hub: Hub) -> None:
        assert "no revision v9" in why("v9").message
        with pytest.raises(BaseModelUnavailable, match="The hub has no model org/other"):
            download_model("org/other", None, with_weights=True, max_bytes=SIZE)


class TestAsAJob:
    @pytest.fixture
    def failure_of(
        self, hub: Hub, tmp_path: Path, migrated_sqlite_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> Any:
        """How a job ends under the settings, the fetching being real."""
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))

        def failure_of(**values: Any) -> Any:
            settings = make_settings(tmp_path, migrated_sqlite_url, **values)
            with contextmanager(serve)(settings) as service:
                job_id = service.submit(base_model="org/name")["id"]
                attempt(service)
                job = service.get(f"/jobs/{job_id}")
            assert (job["status"], job["attempt"]) == ("failed", 1)
            return job["failure"]

        return failure_of

    def test_the_settings_limit_its_size(self, failure_of: Any, hub: Hub) -> None:
        failure = failure_of(max_model_bytes=SIZE - 1)
        assert failure["reason"] == "base_model_unavailable"
        assert failure["yours_to_fix"] is True
        assert "this service fetches 1,299" in failure["message"]
        assert hub.fetched() == set()

    def test_the_settings_limit_its_time(self, failure_of: Any, hub: Hub) -> None:
        hub.stuck = "model.safetensors"
        failure = failure_of(model_seconds=8)
        assert failure["reason"] == "base_model_unavailable"
        assert "org/name could not be fetched from the hub within 8 seconds" in failure["message"]
        assert "FLATLORA_MODEL_SECONDS" in failure["hint"]
        assert "model.safetensors" in hub.fetched()  # it was under way
