"""A full disk is recognised whoever says so."""

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx2
import obstore
import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from obstore.exceptions import BaseError
from obstore.store import LocalStore
from safetensors import SafetensorError
from safetensors.torch import save_file

from worker import download
from worker.trainer import explain
from worker.training.errors import (
    BaseModelUnavailable,
    DiskFull,
    JobError,
    LossDiverged,
    is_disk_full,
)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB; only root may make one."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder],
        check=False,
        capture_output=True,
    )
    if made.returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


class TestDiskFull:
    def test_python_says_so_by_number(self, small_disk: Path) -> None:
        with pytest.raises(OSError, match="No space left") as caught:
            (small_disk / "file").write_bytes(bytes(1 << 20))
        assert is_disk_full(caught.value)

    def test_safetensors_says_so_in_its_text_only(self, small_disk: Path) -> None:
        with pytest.raises(SafetensorError) as caught:
            save_file({"a": torch.zeros(1 << 20)}, small_disk / "a.safetensors")
        assert is_disk_full(caught.value)
        assert isinstance(explain(caught.value), DiskFull)

    def test_the_object_store_says_so_in_its_text_only(self, small_disk: Path) -> None:
        with pytest.raises(BaseError) as caught:
            obstore.put(LocalStore(prefix=small_disk), "a", bytes(1 << 20))
        assert is_disk_full(caught.value)

    def test_it_is_seen_behind_another_error(self) -> None:
        error = ValueError("could not save")
        error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
        assert is_disk_full(error)


def test_other_errors_are_told_by_their_kind_and_never_by_their_text() -> None:
    told = explain(RuntimeError("token hf_secret at /home/someone"))
    assert told.reason == "internal"
    assert "RuntimeError" in told.message
    assert "secret" not in told.message + str(told.hint)
    assert not is_disk_full(OSError(2, "No such file"))


def test_a_failure_that_is_explained_stays_as_it_is() -> None:
    failure: JobError = LossDiverged("NaN", "Lower the rate.")
    assert explain(failure) is failure


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFull),
        (httpx2.ReadTimeout("slow"), BaseModelUnavailable),
        (httpx2.ProxyError("no"), BaseModelUnavailable),
        (HFValidationError("bad name"), BaseModelUnavailable),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_a_download_that_fails_says_why(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[JobError]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(download, "snapshot_download", fail)
    monkeypatch.setattr(HfApi, "model_info", fail)
    with pytest.raises(kind):
        download.download_model("org/model", None, with_weights=True, max_bytes=1)
