"""The command line against the real service."""

import json
from pathlib import Path

import pytest

from tests.system.service import EXAMPLES, Json, Service

QUICK = ["--set", "training.max_steps=3", "--set", "evaluation.max_rows=4", "--max-length", "192"]
MODEL = ["--base-model", str(EXAMPLES / "tiny-base")]
DATASET = ["--dataset", str(EXAMPLES / "data" / "train.jsonl")]


def submit(service: Service, *more: str) -> Json:
    done = service.flatlora("jobs", "submit", *MODEL, *DATASET, *QUICK, "--json", *more)
    assert done.returncode == 0, done.stderr
    answer: Json = json.loads(done.stdout)
    return answer


class TestSubmit:
    def test_it_uploads_a_file_and_follows_the_job_to_its_adapter(
        self, shared_service: Service, tmp_path: Path
    ) -> None:
        done = shared_service.flatlora(
            "jobs", "submit", *MODEL, *DATASET, *QUICK, "--sigma", "0.1", "--watch"
        )
        assert done.returncode == 0, done.stderr
        assert "held-out loss:" in done.stdout
        assert "σ" in done.stderr
        job_id = next(word for word in done.stdout.split() if word.startswith("job_"))
        assert shared_service.job(job_id)["spec"]["sigma"] == 0.1

        fetched = shared_service.flatlora("jobs", "download", job_id, "--to", str(tmp_path / "a"))
        assert fetched.returncode == 0, fetched.stderr
        assert (tmp_path / "a" / "adapter_model.safetensors").exists()

        again = shared_service.flatlora("jobs", "download", job_id, "--to", str(tmp_path / "a"))
        assert again.returncode == 2
        assert "exists already" in again.stderr

    def test_a_refused_job_shows_each_fault_and_ends_with_1(self, shared_service: Service) -> None:
        done = shared_service.flatlora("jobs", "submit", *MODEL, *DATASET, "--rank", "0")
        assert done.returncode == 1
        assert "/rank" in done.stderr

    @pytest.mark.torture
    def test_a_failed_job_ends_with_1(self, shared_service: Service, tmp_path: Path) -> None:
        rows = tmp_path / "rows.jsonl"
        rows.write_text('{"messages": []}\n')
        done = shared_service.flatlora("jobs", "submit", *MODEL, "-d", str(rows), "--watch")
        assert done.returncode == 1
        assert "dataset_invalid" in done.stdout
        assert "line 1" in done.stdout


class TestOtherCommands:
    @pytest.mark.torture
    def test_list_show_watch_and_cancel(self, shared_service: Service) -> None:
        job_id = submit(shared_service, "--dry-run", "--name", "[bold]odd[/] name")["id"]
        watched = shared_service.flatlora("jobs", "watch", job_id, "--json")
        assert json.loads(watched.stdout)["status"] == "succeeded"
        assert "[bold]odd[/] name" in shared_service.flatlora("jobs", "show", job_id).stdout
        listed = json.loads(shared_service.flatlora("jobs", "list", "--json").stdout)
        assert job_id in [job["id"] for job in listed["items"]]
        refused = shared_service.flatlora("jobs", "cancel", job_id)
        assert refused.returncode == 1
        assert "succeeded" in refused.stderr

    @pytest.mark.torture
    def test_a_cancelled_job_ends_with_3(self, service: Service) -> None:
        job_id = submit(service, "--set", "training.max_steps=5000")["id"]
        cancelled = service.flatlora("jobs", "cancel", job_id)
        assert cancelled.returncode == 0
        assert service.flatlora("jobs", "watch", job_id).returncode == 3

    def test_without_a_service_it_says_how_to_start_one_and_ends_with_4(
        self, tmp_path: Path
    ) -> None:
        done = Service(tmp_path).flatlora("jobs", "list")
        assert done.returncode == 4
        assert "flatlora up" in done.stderr


class TestValidate:
    @pytest.mark.torture
    def test_good_rows_give_a_report(self, shared_service: Service) -> None:
        rows = str(EXAMPLES / "data" / "train.jsonl")
        done = shared_service.flatlora("validate", rows, *MODEL, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["format"]["name"] == "chat"

    def test_a_bad_row_is_named_and_ends_with_1(
        self, shared_service: Service, broken_rows: Path
    ) -> None:
        done = shared_service.flatlora("validate", str(broken_rows), *MODEL)
        assert done.returncode == 1
        assert "line 37" in done.stdout + done.stderr


class TestUp:
    @pytest.mark.torture
    def test_it_tells_where_it_is_and_forgets_that_when_it_stops(self, service: Service) -> None:
        url = service.data_dir / "url"
        assert url.read_text() == f"http://127.0.0.1:{service.port}"
        service.stop()
        assert not url.exists()

    @pytest.mark.parametrize(
        ("setting", "value", "words"),
        [
            ("FLATLORA_DATA_DIR", "/dev/null/folder", "FLATLORA_DATA_DIR"),
            ("FLATLORA_DATABASE_URL", "no-url", "FLATLORA_DATABASE_URL"),
            (
                "FLATLORA_DATABASE_URL",
                "postgresql://nobody:hidden@127.0.0.1:9/none",
                "FLATLORA_DATABASE_URL",
            ),
            ("FLATLORA_PORT", "abc", "found 'abc'"),
        ],
    )
    def test_a_setting_that_is_wrong_is_named_without_a_traceback(
        self, tmp_path: Path, setting: str, value: str, words: str
    ) -> None:
        service = Service(tmp_path)
        service.environment[setting] = value
        done = service.flatlora("up")
        assert done.returncode in {1, 2}
        assert words in done.stderr
        assert "Traceback" not in done.stderr
        assert "hidden" not in done.stderr
