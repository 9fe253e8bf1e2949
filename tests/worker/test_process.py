"""Trainer processes: one to a folder, told nothing that they need not know, and never left over."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.procs import is_alive
from tests.system.service import until
from tests.worker.scripted_trainer import told_environment
from worker import process
from worker.process import FolderBusy, TrainerProcess

MODULE = "tests.worker.scripted_trainer"
SECRETS = {
    "FLATLORA_DATABASE_URL": "postgresql://user:password@host/db",
    "FLATLORA_BROKER_URL": "redis://:password@host",
    "FLATLORA_API_KEY": "flk_secret",
    "AWS_ACCESS_KEY_ID": "id",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_SESSION_TOKEN": "token",
    "GOOGLE_APPLICATION_CREDENTIALS": "/key.json",
    "AZURE_STORAGE_ACCOUNT_KEY": "secret",
    "OTEL_EXPORTER_OTLP_HEADERS": "key=secret",
    "PROMETHEUS_MULTIPROC_DIR": "/metrics",
    "HF_TOKEN": "hf_secret",
    "PYTHONPATH": "/elsewhere",
}


def script(folder: Path, then: str = "hang", *, follows: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "script.json").write_text(json.dumps({"then": then, "follows": follows}))
    return folder


def start(folder: Path, **environment: str) -> TrainerProcess:
    """One that has begun to work."""
    trainer = TrainerProcess("train", folder, module=MODULE, environment=environment)
    assert next(trainer.messages())["kind"] == "phase"
    return trainer


def descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return script(tmp_path / "job")


class TestEnvironment:
    @pytest.fixture
    def secrets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in SECRETS.items():
            monkeypatch.setenv(name, value)

    def environment(self, folder: Path, **more: str) -> dict[str, str]:
        with start(folder, **more):
            return told_environment(folder)

    def test_it_holds_no_secret_and_no_way_to_a_database(self, folder: Path, secrets: None) -> None:
        found = self.environment(folder)
        assert not found.keys() & SECRETS.keys()
        assert not [name for name in found if name.startswith(("AWS_", "FLATLORA_", "HF_TOKEN"))]
        assert not set(found.values()) & set(SECRETS.values())

    def test_only_what_downloads_a_model_gets_the_hubs_token(
        self, folder: Path, secrets: None
    ) -> None:
        with TrainerProcess("download", folder, module=MODULE) as trainer:
            next(trainer.messages())
            found = told_environment(folder)
        assert found["HF_TOKEN"] == SECRETS["HF_TOKEN"]
        assert found.keys() & SECRETS.keys() == {"HF_TOKEN"}

    def test_what_is_set_for_the_exchange_between_gpus_reaches_it(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = {"NCCL_DEBUG": "INFO", "TORCH_NCCL_BLOCKING_WAIT": "1", "NVSHMEM_DISABLE_NVLS": "1"}
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        assert self.environment(folder).items() >= given.items()

    def test_training_stays_offline(self, folder: Path) -> None:
        assert self.environment(folder)["HF_HUB_OFFLINE"] == "1"

    def test_what_is_given_for_one_attempt_wins(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        assert self.environment(folder)["CUDA_VISIBLE_DEVICES"] == "0,1"
        found = self.environment(folder, CUDA_VISIBLE_DEVICES="1", FLATLORA_ATTEMPT="3")
        assert (found["CUDA_VISIBLE_DEVICES"], found["FLATLORA_ATTEMPT"]) == ("1", "3")


class TestFolder:
    def test_an_older_trainer_that_still_works_in_it_is_killed(self, folder: Path) -> None:
        script(folder, then="deaf")
        older = start(folder)
        with start(folder) as newer:
            assert not is_alive(older.pid)
            assert is_alive(newer.pid)
        assert older.wait() == -signal.SIGKILL

    def test_one_of_a_later_attempt_is_left_alone(self, folder: Path) -> None:
        """Whoever comes late has lost the job, and not noticed yet."""
        with start(folder, FLATLORA_FENCE="3") as newer:
            with pytest.raises(FolderBusy, match=f"works in {folder}"):
                start(folder, FLATLORA_FENCE="2")
            assert is_alive(newer.pid)
            with start(folder, FLATLORA_FENCE="4"):
                assert not is_alive(newer.pid)

    def test_also_one_whose_supervisor_is_gone_without_it(self, folder: Path) -> None:
        """As after a SIGKILL where the kernel cannot be asked to send it on."""
        script(folder, follows=False)
        code = (
            "import os, sys; from pathlib import Path; from worker.process import TrainerProcess;"
            "trainer = TrainerProcess('train', Path(sys.argv[1]), module=sys.argv[2]);"
            "next(trainer.messages()); print(trainer.pid, flush=True); os._exit(0)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder), MODULE],
            capture_output=True,
            text=True,
            check=True,
        )
        older = int(done.stdout)
        assert is_alive(older)
        with start(folder):
            assert not is_alive(older)

    def test_what_a_dead_trainer_has_started_is_killed_too(self, folder: Path) -> None:
        child = self.abandoned(folder)
        with start(folder):
            assert not is_alive(child)

    def abandoned(self, folder: Path) -> int:
        """A process of a dead trainer's group, as a data loader is, that holds its lock."""
        code = (
            "import fcntl, os, signal, sys; os.setsid(); pid = os.getpid();"
            "lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT);"
            "fcntl.flock(lock, fcntl.LOCK_EX); os.pwrite(lock, f'{pid} 0\\n'.encode(), 0);"
            "child = os.fork();"
            "print(child, flush=True) if child else os.close(1);"
            "os._exit(0) if child else signal.pause()"
        )
        command = [sys.executable, "-c", code, str(folder / process.LOCK_FILE)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return int(done.stdout)

    def test_one_that_cannot_be_killed_is_told_of(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(process, "LOCK_SECONDS", 0.2)
        with start(folder) as older:
            (folder / process.LOCK_FILE).write_text("")  # so that nobody knows whom to kill
            with pytest.raises(FolderBusy, match=f"works in {folder}"):
                TrainerProcess("train", folder, module=MODULE)
            assert is_alive(older.pid)

    def test_an_old_number_in_the_lock_kills_nobody(self, folder: Path) -> None:
        """Its process has ended, and another has the number now."""
        with subprocess.Popen(["sleep", "60"], start_new_session=True) as innocent:
            (folder / process.LOCK_FILE).write_text(f"{innocent.pid} 0\n")
            with start(folder):
                assert innocent.poll() is None
            innocent.kill()


class TestEnd:
    def test_whoever_leaves_the_block_leaves_no_process(self, folder: Path) -> None:
        with start(folder) as trainer:
            assert is_alive(trainer.pid)
        assert not is_alive(trainer.pid)

    def test_it_ends_with_its_supervisor(self, folder: Path) -> None:
        code = (
            "import sys, time; from pathlib import Path; from worker.process import TrainerProcess;"
            "trainer = TrainerProcess('train', Path(sys.argv[1]), module=sys.argv[2]);"
            "next(trainer.messages()); print(trainer.pid, flush=True); time.sleep(60)"
        )
        command = [sys.executable, "-c", code, str(folder), MODULE]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor:
            assert supervisor.stdout
            trainer = int(supervisor.stdout.readline())
            assert is_alive(trainer)
            supervisor.kill()
        until(lambda: not is_alive(trainer), seconds=10)

    def test_a_signal_reaches_it_and_its_code_is_told(self, folder: Path) -> None:
        for number, code in ((signal.SIGTERM, 75), (signal.SIGUSR1, 76)):
            with start(folder) as trainer:
                trainer.signal(number)
                assert trainer.wait() == code

    def test_one_that_cannot_be_started_leaves_nothing_open(self, folder: Path) -> None:
        (folder / "trainer.log").mkdir()
        before = descriptors()
        with pytest.raises(IsADirectoryError):
            TrainerProcess("train", folder, module=MODULE)
        assert descriptors() == before
