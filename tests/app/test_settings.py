"""Settings that do not fit together are refused at the start."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from app.settings import Settings
from app.uris import UriError, resolve_dataset_file, resolve_model_folder
from tests.app.service import make_model


class TestLease:
    @pytest.mark.parametrize(("lease", "heartbeat"), [(60, 20), (0.3, 0.1), (3, 1)])
    def test_it_may_be_three_heartbeats_long(self, lease: float, heartbeat: float) -> None:
        Settings(lease_seconds=lease, heartbeat_seconds=heartbeat)

    @pytest.mark.parametrize("values", [
        {"lease_seconds": 60, "heartbeat_seconds": 21}, {"lease_seconds": 29},
        {"heartbeat_seconds": 60},
    ])  # fmt: skip
    def test_a_shorter_one_is_refused(self, values: dict[str, float]) -> None:
        with pytest.raises(ValidationError, match="at most a third of FLATLORA_LEASE_SECONDS"):
            Settings.model_validate(values)


class TestDataFolder:
    @pytest.fixture
    def settings(self, tmp_path: Path) -> Settings:
        """The data folder lies below the roots, as it does by default."""
        roots = {"dataset_roots": [tmp_path], "model_roots": [tmp_path]}
        return Settings.model_validate({"data_dir": tmp_path / "data", **roots})

    @pytest.mark.parametrize("name", ["data/api_key", "link/api_key", "data", "key", "a/../data/x"])
    def test_no_uri_leads_into_it(self, settings: Settings, tmp_path: Path, name: str) -> None:
        settings.data_dir.mkdir()
        settings.key_file.write_text("flk_secret")
        (tmp_path / "link").symlink_to(settings.data_dir)
        (tmp_path / "key").symlink_to(settings.key_file)
        for uri in (f"file:{name}", f"file:{tmp_path}/{name}"):
            with pytest.raises(UriError, match="own data folder") as caught:
                resolve_dataset_file(uri, settings.dataset_roots)
            assert caught.value.code == "path_not_allowed"

    def test_no_model_is_taken_from_it(self, settings: Settings) -> None:
        make_model(settings.data_dir / "model")
        with pytest.raises(UriError, match="own data folder"):
            resolve_model_folder("file:data/model", settings.model_roots)

    def test_beside_it_everything_is_as_before(self, settings: Settings, tmp_path: Path) -> None:
        rows = tmp_path / "data-too" / "rows.jsonl"
        rows.parent.mkdir()
        rows.touch()
        assert resolve_dataset_file("file:data-too/rows.jsonl", settings.dataset_roots) == rows
