"""The package: alone in its environment, the same for both kinds, and one with the service."""

import asyncio
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints, is_typeddict

import pytest
from packaging.requirements import Requirement
from pydantic import BaseModel

import app
import flatlora_client
from app.jobs.schemas import JobCreate
from flatlora_client import (
    AsyncFlatLora,
    AsyncJob,
    ConfigurationError,
    FlatLora,
    Job,
    JobFields,
    Profile,
    is_loopback,
)

ALONE = """
import importlib.abc, sys

OURS = {"flatlora_client", "httpx2", "httpcore2", "h11", "anyio", "sniffio", "idna", "certifi",
        "truststore", "typing_extensions", "exceptiongroup"}

class Wall(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in OURS and top not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"{top} is not there")

sys.meta_path.insert(0, Wall())
import flatlora_client
with flatlora_client.FlatLora("http://127.0.0.1:1", max_retries=0) as client:
    try:
        client.version()
    except flatlora_client.ConnectionFailed:
        print("fine")
"""


def test_it_needs_nothing_but_its_http_client() -> None:
    """Neither the service's packages nor the trainer's."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def test_it_says_so_and_has_the_version_of_the_service() -> None:
    written = (Path(__file__).parents[2] / "client" / "pyproject.toml").read_text()
    project = tomllib.loads(written)["project"]
    assert [Requirement(line).name for line in project["dependencies"]] == ["httpx2"]
    assert project["version"] == flatlora_client.__version__ == app.__version__


def surface(kind: type) -> dict[str, Any]:
    """Public methods, as they are called, and what they give."""
    return {
        name: inspect.signature(value)
        for name, value in vars(kind).items()
        if not name.startswith("_") and inspect.isfunction(value)
    }


def resources(client: object) -> dict[str, type]:
    return {name: type(value) for name, value in vars(client).items() if name[0] != "_"}


def test_both_kinds_have_the_same_surface() -> None:
    """Of what is given an iterator differs, and a job; the rest is the same operation."""
    client, other = FlatLora("http://a"), AsyncFlatLora("http://a")
    pairs: list[tuple[type, type]] = [(FlatLora, AsyncFlatLora), (Job, AsyncJob)]
    theirs = resources(other)
    for name, kind in resources(client).items():
        pairs.append((kind, theirs.pop(name)))
    assert theirs == {}
    for kind, twin in pairs:
        assert surface(kind).keys() == surface(twin).keys()
        for name, signature in surface(kind).items():
            assert signature.parameters.keys() == surface(twin)[name].parameters.keys()
    client.close()
    asyncio.run(other.close())


def test_its_readme_names_every_method() -> None:
    readme = (Path(__file__).parents[2] / "client" / "README.md").read_text()
    with FlatLora("http://a") as client:
        for name, kind in resources(client).items():
            if name == "url":
                continue
            [row] = [line for line in readme.splitlines() if line.startswith("|") and name in line]
            told = set(re.findall(r"`(?:client\.)?(\w+)`", row))
            assert surface(kind).keys() <= told, name


def test_its_names_are_sorted_and_there() -> None:
    assert sorted(flatlora_client.__all__) == flatlora_client.__all__
    assert all(hasattr(flatlora_client, name) for name in flatlora_client.__all__)


def fields_of_the_service(group: type[BaseModel]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in group.model_fields.items():
        kind: Any = field.annotation
        is_group = isinstance(kind, type) and issubclass(kind, BaseModel)
        found[name] = fields_of_the_service(kind) if is_group else None
    return found


def fields_of_the_client(group: type) -> dict[str, Any]:
    hints = get_type_hints(group)
    return {
        name: fields_of_the_client(hint) if is_typeddict(hint) else None
        for name, hint in hints.items()
    }


def test_every_field_of_a_job_has_a_name_here() -> None:
    ours, theirs = fields_of_the_client(JobFields), fields_of_the_service(JobCreate)
    missing = {
        f"{name}.{inner}" if inner else name
        for name, group in theirs.items()
        for inner in (group or [""])
        if name not in ours or (inner and inner not in (ours[name] or {}))
    }
    assert missing == set()


def choices(hint: Any) -> set[Any]:
    inner = [choices(part) for part in get_args(hint) if get_origin(part) or part is None]
    return set(get_args(hint)).union(*inner)


def test_every_choice_of_a_field_is_one_here() -> None:
    groups = get_type_hints(JobFields)
    for name in ("lora", "data", "training", "evaluation", "resources"):
        model: Any = JobCreate.model_fields[name].annotation
        ours = get_type_hints(groups[name])
        for field, found in model.model_fields.items():
            words = {word for word in choices(found.annotation) if isinstance(word, str)}
            assert words <= choices(ours[field]), field


class TestConfiguration:
    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        for name in ("FLATLORA_URL", "FLATLORA_API_KEY", "FLATLORA_DATA_DIR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.chdir(tmp_path)
        folder = tmp_path / "flatlora-data"
        folder.mkdir()
        (folder / "url").write_text("http://127.0.0.1:8456\n")
        (folder / "api_key").write_text("flk_local\n")
        return folder

    def test_the_service_of_this_folder_is_found(self, folder: Path) -> None:
        assert Profile.load() == Profile("http://127.0.0.1:8456", "flk_local")
        assert Profile.load(data_dir=folder.parent) == Profile("http://127.0.0.1:8321", None)

    def test_its_key_is_sent_to_it_alone(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert Profile.load("http://127.0.0.1:8456/").key == "flk_local"
        assert Profile.load("https://flatlora.example").key is None
        monkeypatch.setenv("FLATLORA_URL", "https://flatlora.example")
        assert Profile.load() == Profile("https://flatlora.example", None)
        monkeypatch.setenv("FLATLORA_API_KEY", "flk_theirs")
        assert Profile.load() == Profile("https://flatlora.example", "flk_theirs")

    def test_what_is_given_goes_before_the_environment(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FLATLORA_URL", "https://flatlora.example")
        monkeypatch.setenv("FLATLORA_API_KEY", "flk_theirs")
        assert Profile.load("http://a", "flk_a") == Profile("http://a", "flk_a")

    @pytest.mark.parametrize("url", ["http://localhost:port", "localhost:8321", "ftp://a", "x"])
    def test_a_url_that_is_none_is_told(self, folder: Path, url: str) -> None:
        with pytest.raises(ConfigurationError, match=f"found '{url}', expected a URL"):
            FlatLora(url)

    def test_no_proxy_is_asked_for_this_machine(self) -> None:
        assert is_loopback("http://localhost:1")
        assert not is_loopback("http://localhost.example")
