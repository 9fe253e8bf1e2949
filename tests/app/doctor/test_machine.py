"""What is wrong with a machine: its folder, disk, port, and the GPUs."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from app import __version__
from app.doctor import machine
from app.doctor.finding import Level
from app.doctor.gpu import GPU
from app.doctor.machine import DISK, FILES, FOLDER, PORT
from app.doctor.store import STORE
from tests.app.doctor.patients import FAKE_TORCH, Make, answering, empty, levels, look, silent
from tests.app.service import running


class TestMachine:
    def test_a_folder_that_others_may_enter(self, make: Make) -> None:
        settings = make()
        settings.data_dir.mkdir(mode=0o755)
        settings.key_file.touch(mode=0o644)
        found = look(FOLDER, settings)
        assert levels(found) == {"data folder": "warn", "API key": "warn"}
        assert found["data folder"].mend == f"chmod 700 {settings.data_dir}"
        settings.data_dir.chmod(0o700)
        settings.key_file.chmod(0o600)
        assert levels(look(FOLDER, settings)) == {"data folder": "ok"}

    @pytest.mark.parametrize("where", ["/proc", "/proc/new", "file", "file/new"])
    def test_a_folder_that_cannot_be_written(self, make: Make, tmp_path: Path, where: str) -> None:
        (tmp_path / "file").touch()
        found = look(FOLDER, make(data_dir=tmp_path / where))
        assert levels(found) == {"data folder": "fail"}
        assert "FLATLORA_DATA_DIR" in found["data folder"].mend

    def test_one_that_is_not_there_yet_is_not_made(self, make: Make) -> None:
        settings = make()
        for check in (FOLDER, DISK, STORE):
            assert set(levels(look(check, settings)).values()) == {"ok"}
        assert not settings.data_dir.exists()

    def test_a_disk_too_small_for_the_largest_dataset(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert levels(look(DISK, make(max_dataset_bytes=1 << 20))) == {"disk": "ok"}
        assert levels(look(DISK, make(max_dataset_bytes=1 << 60))) == {"disk": "warn"}
        monkeypatch.setattr(machine, "CHECKPOINT_BYTES", 1 << 60)
        assert levels(look(DISK, make())) == {"disk": "fail"}

    def test_a_low_limit_of_open_files(self) -> None:
        code = (
            "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\n"
            "from app.doctor.machine import files; from app.settings import Settings\n"
            "(found,) = files(Settings()); print(found.level, found.mend)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith("warn ulimit -n 256")

    def test_a_cluster_needs_more_of_them(self, make: Make, migrated_postgres_url: str) -> None:
        url = "redis://127.0.0.1:1/0"
        cluster = make(database_url=migrated_postgres_url, broker_url=url)
        (embedded,), (many,) = look(FILES, make()).values(), look(FILES, cluster).values()
        assert (embedded.expected[:3], many.expected[:4]) == ("256", "4096")


class TestPort:
    def test_free_ours_and_somebody_elses(self, make: Make, tmp_path: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            free = probe.getsockname()[1]
        assert "free" in look(PORT, make(port=free))["port"].found
        with running(make()) as url:
            port = httpx2.URL(url).port
            httpx2.get(f"{url}/version", timeout=30)
            assert f"flatlora {__version__} answers" in look(PORT, make(port=port))["port"].found
        with answering(empty) as url:
            found = look(PORT, make(port=httpx2.URL(url).port))
            assert levels(found) == {"port": "fail"}
            assert "something else listens" in found["port"].found
        with silent() as port:
            assert levels(look(PORT, make(port=port))) == {"port": "fail"}

    def test_an_address_that_is_not_of_this_machine(self, make: Make) -> None:
        found = look(PORT, make(host="192.0.2.1"))
        assert levels(found) == {"port": "fail"}
        assert "FLATLORA_HOST" in found["port"].mend


class TestGpu:
    """Torch and the driver as they are on machines that are not at hand."""

    @pytest.fixture
    def torch(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        def install(source: str) -> None:
            (tmp_path / "fake" / "torch.py").write_text(source)

        (tmp_path / "fake").mkdir()
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        return install

    @pytest.fixture
    def driver(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir()
        program.write_text("#!/bin/sh\necho 'NVIDIA H100, 535.104, 81559 MiB'\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    def test_gpus_that_compute(self, make: Make, torch: Callable[[str], None]) -> None:
        torch(f"GPUS, BROKEN = 2, None\n{FAKE_TORCH}")
        found = look(GPU, make(devices="0,1"))
        assert levels(found) == {"torch": "ok", "gpu 0": "ok", "gpu 1": "ok"}
        assert "70.0 GiB of 80.0 GiB free" in found["gpu 0"].found

    def test_one_that_does_not(self, make: Make, torch: Callable[[str], None]) -> None:
        torch(f"GPUS, BROKEN = 2, 1\n{FAKE_TORCH}")
        found = look(GPU, make())
        assert levels(found) == {"torch": "ok", "gpu 0": "ok", "gpu 1": "fail"}
        assert "no kernel image" in found["gpu 1"].found

    def test_one_that_is_asked_for_and_not_there(
        self, make: Make, torch: Callable[[str], None]
    ) -> None:
        torch(f"GPUS, BROKEN = 1, None\n{FAKE_TORCH}")
        found = look(GPU, make(devices="0,1"))
        assert levels(found) == {"torch": "ok", "gpu 0": "ok", "gpu": "fail"}
        assert "FLATLORA_DEVICES" in found["gpu"].mend

    @pytest.mark.parametrize(("devices", "level"), [("", "ok"), ("cpu,cpu", "ok"), ("0", "warn")])
    def test_none_is_well_unless_one_is_asked_for(
        self, make: Make, torch: Callable[[str], None], devices: str, level: str
    ) -> None:
        torch(f"GPUS, BROKEN = 0, None\n{FAKE_TORCH}")
        assert levels(look(GPU, make(devices=devices)))["gpu"] == level

    def test_one_that_torch_cannot_use(
        self, make: Make, torch: Callable[[str], None], driver: None
    ) -> None:
        complaint = "UserWarning: CUDA initialization: The NVIDIA driver is too old (found 12020)"
        torch(
            f"import sys; sys.stderr.write('{complaint}\\n')\nGPUS, BROKEN = 0, None\n{FAKE_TORCH}"
        )
        found = look(GPU, make())["gpu"]
        assert found.level is Level.WARN
        assert "NVIDIA H100, 535.104" in found.found
        assert "too old" in found.found
        assert "driver" in found.mend

    @pytest.mark.parametrize(
        ("source", "said"),
        [
            ("raise OSError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
            ("import os; os.kill(os.getpid(), 11)", "ended with -11"),
        ],
    )
    def test_a_broken_torch(
        self, make: Make, torch: Callable[[str], None], source: str, said: str
    ) -> None:
        torch(source)
        found = look(GPU, make())
        assert levels(found) == {"torch": "fail"}
        assert said in found["torch"].found

    def test_without_torch_an_api_is_well_and_an_embedded_service_is_not(
        self, make: Make, migrated_postgres_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        url = "redis://127.0.0.1:1/0"
        cluster = make(database_url=migrated_postgres_url, broker_url=url)
        assert levels(look(GPU, cluster)) == {"torch": "ok"}
        assert levels(look(GPU, make())) == {"torch": "fail"}

    def test_the_torch_that_is_here(self, make: Make) -> None:
        assert look(GPU, make())["torch"].level is Level.OK
