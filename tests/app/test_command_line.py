"""The command line against the API alone: what it prints, and with which code it ends."""

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx2
import pytest
import typer
from sqlalchemy import text

from app.cli.client import connect, explained
from app.cli.profile import Profile
from app.cli.watch import until_over
from app.jobs.states import Reason, Status
from app.settings import Settings
from flatlora_client import is_loopback
from tests.app.service import Service, make_model, running
from tests.faults.procs import reserve_port

FLATLORA = [sys.executable, "-m", "app.cli.main"]
ODD_NAMES = ["[/]", "[bold]b[/] [red]", "back\\[/]", "\\", "[link=file:/x]"]
BAD_ROWS = '{"prompt": "1", "completion": "2"}\n{"prompt": 3, "completion": "[/]"}\n'

Done = subprocess.CompletedProcess[str]


def environment(**values: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if "FLATLORA" not in name}
    return own | values


@dataclass
class CommandLine:
    service: Service
    url: str

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        given = environment(FLATLORA_URL=self.url)
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*FLATLORA, *arguments], env=given, stdout=pipe, stderr=pipe, text=True
        )

    def __call__(self, *arguments: str, **values: str) -> Done:
        given = environment(FLATLORA_URL=self.url, **values)
        return subprocess.run(
            [*FLATLORA, *arguments], env=given, capture_output=True, text=True, check=False
        )


@pytest.fixture
def flatlora(settings: Settings) -> Iterator[CommandLine]:
    with running(settings) as url, httpx2.Client(base_url=url, timeout=30) as http:
        service = Service(http, settings)
        yield CommandLine(service, url)
        service.engine.dispose()


@pytest.fixture
def free_port() -> Iterator[int]:
    """On which nobody listens but who is told of it."""
    with reserve_port() as reserved:
        yield reserved.getsockname()[1]


def line_with(words: str, stream: IO[str] | None) -> str:
    assert stream is not None
    return next(line for line in stream if words in line)


class TestText:
    def test_a_name_is_shown_as_it_is(self, flatlora: CommandLine) -> None:
        ids = [flatlora.service.submit(name=name)["id"] for name in ODD_NAMES]
        listed = flatlora("jobs", "list")
        assert listed.returncode == 0, listed.stderr
        for job_id, name in zip(ids, ODD_NAMES, strict=True):
            (line,) = [line for line in listed.stdout.splitlines() if job_id in line]
            assert f" {name} " in line
        for job_id, name in zip(ids[:3], ODD_NAMES, strict=False):
            assert name in flatlora("jobs", "show", job_id).stdout
        flatlora.service.set(
            ids[0], status=Status.FAILED, reason=Reason.INTERNAL, message="[/]", hint="[/b]"
        )
        watched = flatlora("jobs", "watch", ids[0])
        assert (watched.returncode, watched.stderr) == (1, "")
        assert watched.stdout.splitlines()[1:] == ["[/]", "hint: [/b]"]

    def test_an_empty_list_says_so(self, flatlora: CommandLine) -> None:
        assert flatlora("jobs", "list").stdout == "no jobs yet\n"
        assert flatlora("jobs", "list", "--status", "failed").stdout == "no jobs here\n"

    def test_a_folder_with_an_odd_name_is_a_base_model(self, flatlora: CommandLine) -> None:
        folder = make_model(flatlora.service.models / "odd 100%x#")
        rows = flatlora.service.rows / "odd [x] #.jsonl"
        rows.write_text("{}\n")
        done = flatlora("jobs", "submit", "-m", str(folder), "-d", str(rows), "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["spec"]["base_model"].endswith("odd%20100%25x%23")
        assert "uploaded odd [x] #.jsonl as dataset:" in done.stderr


class TestUsage:
    @pytest.mark.parametrize(
        "settings",
        [
            ["training=3", "training.max_steps=5"],
            ["training.max_steps=5", "training.max_steps.x=1"],
        ],
    )
    def test_a_field_is_no_group_of_fields(self, settings: list[str]) -> None:
        options = [word for setting in settings for word in ("--set", setting)]
        done = run("jobs", "submit", *options)
        assert done.returncode == 2
        assert "expected a group of fields" in done.stderr
        assert "Traceback" not in done.stderr

    def test_a_format_that_is_none_names_those_that_are(self) -> None:
        done = run("validate", "rows.jsonl", "--format", "foo")
        assert done.returncode == 2
        for word in ("'foo'", "'auto'", "'sharegpt'"):
            assert word in done.stderr

    def test_a_url_that_is_none(self) -> None:
        done = run("jobs", "list", FLATLORA_URL="http://localhost:port")
        assert done.returncode == 2
        assert "FLATLORA_URL: found 'http://localhost:port'" in done.stderr


class TestJson:
    def test_a_refused_request_prints_its_problem(self, flatlora: CommandLine) -> None:
        refused = flatlora("jobs", "submit", "-m", "file:tiny", "--rank", "0", "--json")
        assert refused.returncode == 1
        problem = json.loads(refused.stdout)["error"]
        assert (problem["code"], problem["status"]) == ("invalid_request", 422)
        assert "/rank" in refused.stderr
        for command in (["show", "x"], ["cancel", "x"], ["watch", "x"], ["download", "x"],
                        ["list", "--status", "x"]):  # fmt: skip
            done = flatlora("jobs", *command, "--json")
            assert done.returncode == 1
            assert json.loads(done.stdout)["error"]["status"] in {404, 422}

    def test_no_service_is_an_error_too(self, free_port: int) -> None:
        done = run("jobs", "list", "--json", FLATLORA_URL=f"http://127.0.0.1:{free_port}")
        assert done.returncode == 4
        assert json.loads(done.stdout)["error"]["code"] == "unreachable"

    def test_version(self) -> None:
        assert json.loads(run("version", "--json").stdout).keys() == {"version"}

    @pytest.mark.parametrize(
        ("rows", "code", "reason", "words"),
        [
            (BAD_ROWS, 1, "dataset_invalid", "line 2: prompt"),
            ("", 1, "dataset_invalid", "is empty"),
            (None, 2, "dataset_unavailable", "no file"),
        ],
    )
    def test_rows_that_cannot_be_used(
        self, tmp_path: Path, rows: str | None, code: int, reason: str, words: str
    ) -> None:
        path = tmp_path / "odd [/] 100%.jsonl"
        if rows is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(rows)
        done = run("validate", str(path), "--json")
        assert done.returncode == code, done.stderr
        error = json.loads(done.stdout)["error"]
        assert error.keys() == {"reason", "message", "hint"}
        assert error["reason"] == reason
        assert words in error["message"]
        assert words in done.stderr


class TestWatch:
    def test_ctrl_c_ends_it_with_130_and_leaves_the_job(self, flatlora: CommandLine) -> None:
        job_id = flatlora.service.submit()["id"]
        watching = flatlora.start("jobs", "watch", job_id, "--json")
        line_with("queued", watching.stderr)
        watching.send_signal(signal.SIGINT)
        said, told = watching.communicate(timeout=30)
        assert watching.returncode == 130
        assert (said, f"flatlora jobs watch {job_id}" in told) == ("", True)
        assert flatlora.service.get(f"/jobs/{job_id}")["status"] == "queued"

    def test_a_service_that_comes_back_is_waited_for(
        self, settings: Settings, free_port: int
    ) -> None:
        with running(settings, free_port) as url, httpx2.Client(base_url=url, timeout=30) as http:
            service = Service(http, settings)
            job_id = service.submit()["id"]
            watching = CommandLine(service, url).start("jobs", "watch", job_id)
            line_with("queued", watching.stderr)
        line_with("trying again for 60 s", watching.stderr)
        service.set(job_id, status=Status.CANCELLED)
        service.engine.dispose()
        with running(settings, free_port):
            said, _ = watching.communicate(timeout=60)
        assert watching.returncode == 3
        assert said == f"cancelled {job_id}\n"

    def test_one_that_stays_away_or_ill_ends_it_with_4(
        self, flatlora: CommandLine, free_port: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with flatlora.service.engine.begin() as connection:
            connection.execute(text("ALTER TABLE jobs RENAME TO hidden"))
        away = f"http://127.0.0.1:{free_port}"
        for url, words in [(flatlora.url, "HTTP 503"), (away, "refused")]:
            with (
                connect(Profile(url, None)) as client,
                pytest.raises(typer.Exit) as caught,
                explained(as_json=False),
            ):
                until_over(client, f"job_{'0' * 32}", print, patience=1)
            assert caught.value.exit_code == 4
            note, error, _ = capsys.readouterr().err.splitlines()
            assert "trying again for 1 s" in note
            assert words in error

    def test_a_refusal_is_not_waited_for(self, flatlora: CommandLine) -> None:
        with (
            connect(Profile(flatlora.url, None)) as client,
            pytest.raises(typer.Exit) as caught,
            explained(as_json=False),
        ):
            until_over(client, "x", print)
        assert caught.value.exit_code == 1


class TestProfile:
    @pytest.fixture
    def settings(self, tmp_path: Path) -> Settings:
        settings = Settings(data_dir=tmp_path)
        settings.key_file.write_text("flk_local\n")
        settings.url_file.write_text("http://127.0.0.1:8456")
        return settings

    @pytest.mark.parametrize(
        ("values", "key"),
        [
            ({}, "flk_local"),
            ({"FLATLORA_URL": ""}, "flk_local"),
            ({"FLATLORA_URL": "http://127.0.0.1:8456/"}, "flk_local"),
            ({"FLATLORA_URL": "http://127.0.0.1:8321"}, None),
            ({"FLATLORA_URL": "https://flatlora.example"}, None),
            ({"FLATLORA_URL": "https://a.example", "FLATLORA_API_KEY": "flk_a"}, "flk_a"),
        ],
    )
    def test_the_key_of_this_folder_is_sent_to_its_service_alone(
        self,
        settings: Settings,
        monkeypatch: pytest.MonkeyPatch,
        values: dict[str, str],
        key: str | None,
    ) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        assert Profile.load(settings).key == key

    def test_without_a_service_on_this_folder_no_key_is_sent(self, settings: Settings) -> None:
        """Whoever listens on the default port need not be ours."""
        settings.url_file.unlink()
        assert Profile.load(settings) == Profile(settings.base_url, None)

    def test_it_finds_the_service_of_this_folder_whatever_its_port(
        self, settings: Settings
    ) -> None:
        assert Profile.load(settings).url == "http://127.0.0.1:8456"


class TestProxy:
    def test_none_is_asked_for_this_machine(self, flatlora: CommandLine, free_port: int) -> None:
        proxy = f"http://127.0.0.1:{free_port}"
        done = flatlora("jobs", "list", HTTP_PROXY=proxy, http_proxy=proxy, ALL_PROXY=proxy)
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize(
        ("url", "is_ours"),
        [
            ("http://localhost:1", True), ("http://127.0.0.1", True), ("http://[::1]:8321", True),
            ("http://127.8.8.8", True), ("http://10.0.0.1", False), ("https://a.example", False),
            ("http://localhost.example", False),
        ],
    )  # fmt: skip
    def test_which_machine_that_is(self, url: str, is_ours: bool) -> None:
        assert is_loopback(url) is is_ours


THROWAWAY = """
import json, os, sys
from pathlib import Path
from examples.throwaway import throwaway_service

with throwaway_service(Path(sys.argv[1]), []) as client:
    jobs = client.jobs.page().raw
ours = sorted(name for name in os.environ if name.startswith("FLATLORA_"))
print(json.dumps([jobs, ours]))
"""


def test_a_throwaway_service_knows_nothing_of_the_users_own(tmp_path: Path) -> None:
    theirs = environment(
        FLATLORA_URL="http://127.0.0.1:1",
        FLATLORA_API_KEY="flk_theirs",
        FLATLORA_DATABASE_URL="postgresql://nobody@127.0.0.1:1/theirs",
        FLATLORA_HOST="127.0.0.2",
        FLATLORA_MAX_ATTEMPTS="none",
        HTTP_PROXY="http://127.0.0.1:1",
    )
    done = subprocess.run(
        [sys.executable, "-c", THROWAWAY, tmp_path / "odd 100%x#"],
        env=theirs, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE((tmp_path / "odd 100%x#" / "service").stat().st_mode) == 0o700
    jobs, ours = json.loads(done.stdout)
    assert jobs["items"] == []
    assert "FLATLORA_DATABASE_URL" not in ours
    assert "FLATLORA_DATA_DIR" in ours


def run(*arguments: str, **values: Any) -> Done:
    """Where no service is needed."""
    return subprocess.run(
        [*FLATLORA, *arguments],
        env=environment(**values), capture_output=True, text=True, check=False,
    )  # fmt: skip
