"""What is deployed is what the program has: settings, commands, limits, and no needless rights."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from app.cli.main import cli
from app.settings import Settings
from worker.main import STOP_MARGIN_SECONDS

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "docs" / "deploy"
COMPOSE_TEXT = (ROOT / "docker-compose.yml").read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE_TEXT)["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
OBJECTS: list[dict[str, Any]] = list(
    yaml.safe_load_all((DEPLOY / "kubernetes" / "flatlora.yaml").read_text())
)
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FILES = [
    ROOT / "docker-compose.yml",
    ROOT / "Dockerfile",
    *sorted(path for path in DEPLOY.rglob("*") if path.is_file()),
]
COMMANDS = set(typer.main.get_command(cli).commands)  # type: ignore[attr-defined] # it is a group
DRAIN_SECONDS = Settings.model_fields["drain_grace_seconds"].default + STOP_MARGIN_SECONDS


def is_once(service: dict[str, Any]) -> bool:
    return bool(service["restart"] == "no")


def is_ours(service: dict[str, Any]) -> bool:
    return "build" in service


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for item in OBJECTS:
        if item["kind"] in {"Deployment", "Job"}:
            yield item["metadata"]["name"], item["spec"]["template"]["spec"]


def title(item: dict[str, Any]) -> str:
    return f"{item['kind']}-{item['metadata']['name']}"


def seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+)(s|min)?", text)
    assert found, text
    return int(found[1]) * (60 if found[2] == "min" else 1)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_setting_that_is_set_exists(path: Path) -> None:
    names = set(re.findall(r"\bFLATLORA_[A-Z_]+\b", path.read_text()))

    assert names <= {f"FLATLORA_{name.upper()}" for name in Settings.model_fields}


def test_every_command_that_is_run_exists() -> None:
    compose = [service["command"][0] for service in SERVICES.values() if is_ours(service)]
    kubernetes = [pod["containers"][0]["args"][0] for _, pod in pods()]
    images = re.findall(r'^CMD \["(\w+)"\]', DOCKERFILE, re.MULTILINE)
    units = [
        line.split()[1]
        for unit in UNITS
        for line in unit.read_text().splitlines()
        if line.startswith("ExecStart=")
    ]

    for commands in (compose, kubernetes, images, units):
        assert {"api", "worker"} <= set(commands) <= COMMANDS


class TestCompose:
    @pytest.mark.parametrize("name", SERVICES)
    def test_a_service_is_watched_or_runs_once(self, name: str) -> None:
        service = SERVICES[name]
        built = is_ours(service) and "HEALTHCHECK" in stage(service["build"]["target"])
        check = service.get("healthcheck", built)

        assert (check == {"disable": True}) if is_once(service) else check

    @pytest.mark.parametrize("name", SERVICES)
    def test_a_service_has_no_more_rights_than_it_needs(self, name: str) -> None:
        service = SERVICES[name]

        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert is_ours(service) or service["user"] not in {"root", "0"}
        if service.get("user") == "0:0":  # it hands a new volume to its user, and ends
            assert is_once(service)
            assert service["cap_add"] == ["CHOWN"]
        else:
            assert "cap_add" not in service

    @pytest.mark.parametrize("name", SERVICES)
    def test_a_service_has_limits(self, name: str) -> None:
        service = SERVICES[name]

        assert {"mem_limit", "cpus", "pids_limit"} <= set(service)
        assert service["logging"]["options"]["max-size"]

    @pytest.mark.parametrize("name", SERVICES)
    def test_the_image_of_another_is_pinned(self, name: str) -> None:
        service = SERVICES[name]

        assert is_ours(service) or re.search(r":v?\d+\.?\d*\S*$", service["image"])

    def test_nothing_but_the_api_is_published_and_only_to_this_machine(self) -> None:
        ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}

        assert list(ports) == ["api"]
        assert all(port.startswith("${API_BIND:-127.0.0.1}:") for port in ports["api"])

    def test_databases_and_store_have_no_way_out(self) -> None:
        assert yaml.safe_load(COMPOSE_TEXT)["networks"]["inside"] == {"internal": True}
        for name in ("postgres", "redis", "objects", "migrate"):
            assert SERVICES[name]["networks"] == ["inside"]

    def test_no_secret_has_a_default(self) -> None:
        used = set(re.findall(r"\$\{(\w*(?:PASSWORD|KEY)\w*)(:?[-?]?)", COMPOSE_TEXT))

        assert {operator for _, operator in used} == {":?"}

    def test_the_api_and_the_workers_read_the_same_files_at_the_same_place(self) -> None:
        mounts = [
            {volume for volume in SERVICES[name]["volumes"] if "/srv/flatlora" in volume}
            for name in ("api", "worker", "worker-cpu")
        ]

        assert mounts[0] == mounts[1] == mounts[2]
        assert len(mounts[0]) == 1

    def test_each_worker_has_a_data_folder_of_its_own(self) -> None:
        """One that two containers share would be locked by the first."""
        assert "/var/lib/flatlora" in SERVICES["worker"]["volumes"]
        assert "/var/lib/flatlora" in SERVICES["worker-cpu"]["volumes"]

    def test_a_worker_may_write_its_last_checkpoint(self) -> None:
        for name in ("worker", "worker-cpu"):
            assert seconds(SERVICES[name]["stop_grace_period"]) > DRAIN_SECONDS

    @pytest.mark.skipif(
        shutil.which("docker") is None
        or subprocess.call(["docker", "compose", "version"], stdout=subprocess.DEVNULL) != 0,
        reason="needs docker compose",
    )
    @pytest.mark.parametrize("profile", ["cpu", "gpu"])
    def test_compose_takes_the_file(self, profile: str, tmp_path: Path) -> None:
        env = write_env(tmp_path, profile)
        command = ["docker", "compose", "--env-file", str(env), "-f", "docker-compose.yml"]
        done = subprocess.run(
            [*command, "config", "--services"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

        assert done.returncode == 0, done.stderr
        assert ("worker" if profile == "gpu" else "worker-cpu") in done.stdout.split()


def write_env(folder: Path, *arguments: str) -> Path:
    """What env.sh writes where docs/deploy lies in this folder."""
    script = folder / "docs" / "deploy" / "env.sh"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_bytes((DEPLOY / "env.sh").read_bytes())
    subprocess.run(["sh", script, *arguments], check=True, capture_output=True)
    return folder / ".env"


def values(env: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in env.read_text().splitlines())


class TestEnv:
    def test_it_sets_all_that_compose_asks_for(self, tmp_path: Path) -> None:
        asked = set(re.findall(r"\$\{(\w+):\?", COMPOSE_TEXT))

        assert asked <= set(values(write_env(tmp_path, "cpu")))

    def test_its_secrets_are_random_and_nobody_elses(self, tmp_path: Path) -> None:
        files = [write_env(tmp_path / name, "cpu") for name in ("a", "b")]
        one, other = map(values, files)

        assert files[0].stat().st_mode & 0o777 == 0o600
        assert one["FLATLORA_API_KEY"].startswith("flk_")
        names = ("FLATLORA_API_KEY", "FLATLORA_SECRET_KEY", "POSTGRES_PASSWORD", "REDIS_PASSWORD")
        for name in names:
            assert len(one[name]) >= 32
            assert one[name] != other[name]

    def test_it_never_replaces_passwords_that_databases_know(self, tmp_path: Path) -> None:
        before = write_env(tmp_path, "cpu").read_text()
        again = subprocess.call(
            ["sh", tmp_path / "docs/deploy/env.sh", "cpu"], stderr=subprocess.DEVNULL
        )

        assert again == 1
        assert (tmp_path / ".env").read_text() == before


def stage(name: str) -> str:
    """The lines of one stage of the Dockerfile."""
    found = re.search(rf"^FROM \S+ AS {name}\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.M | re.S)
    assert found, name
    return found[1]


def closure(*roots: str) -> set[str]:
    """The names of all packages that these requirements bring, as installed here."""
    found: set[str] = set()
    waiting = [Requirement(root) for root in roots]
    seen: set[str] = set()
    while waiting:
        wanted = waiting.pop()
        if str(wanted) in seen:
            continue
        seen.add(str(wanted))
        name = canonicalize_name(wanted.name)
        found.add(name)
        needed = own(wanted.extras) if name == "flatlora-service" else needs(wanted)
        waiting += needed
    return found


def own(extras: set[str]) -> list[Requirement]:
    groups = PYPROJECT["project"]["optional-dependencies"]
    return [Requirement(line) for extra in extras for line in groups[extra]]


def needs(wanted: Requirement) -> list[Requirement]:
    try:
        lines = requires(wanted.name) or []
    except PackageNotFoundError:
        return []  # for another platform
    environments = [{"extra": extra} for extra in ("", *wanted.extras)]
    found = map(Requirement, lines)
    return [
        one
        for one in found
        if one.marker is None or any(one.marker.evaluate(each) for each in environments)
    ]


class TestImages:
    def test_the_api_brings_no_torch(self) -> None:
        [extras] = re.findall(r'"\.\[(api[\w,]*)\]"', DOCKERFILE)

        assert not closure(f"flatlora-service[{extras}]") & {"torch", "transformers", "peft"}

    def test_the_library_alone_brings_torch_and_nothing_of_the_service(self) -> None:
        brought = closure("flatlora")

        assert "torch" in brought
        service = {canonicalize_name(one.name) for one in own({"api", "cluster", "telemetry"})}
        assert not brought & (service | {"transformers", "peft", "accelerate"})

    def test_the_worker_brings_torch_and_all_that_the_api_has(self) -> None:
        [api] = re.findall(r'"\.\[(api[\w,]*)\]"', DOCKERFILE)
        [worker] = re.findall(r'"\.\[(worker[\w,]*)\]"', DOCKERFILE)

        brought = closure(f"flatlora-service[{worker}]")
        assert "torch" in brought
        assert closure(f"flatlora-service[{api}]") <= brought

    def test_they_run_as_nobody_special_and_are_told_of_signals(self) -> None:
        runtime = stage("runtime")

        assert "USER 10001:10001" in runtime
        assert 'ENTRYPOINT ["tini", "--", "flatlora"]' in runtime
        assert "USER" not in stage("api") + stage("worker")

    def test_the_small_one_is_built_where_none_is_named(self) -> None:
        assert re.findall(r"^FROM \S+ AS (\S+)", DOCKERFILE, re.MULTILINE)[-1] == "api"

    def test_they_are_built_from_all_that_is_installed(self) -> None:
        let_in = set(re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
        packages = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]

        files = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
        assert {*packages, "client", "flatlora"} | files == let_in


class TestKubernetes:
    @pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
    @pytest.mark.parametrize("item", OBJECTS, ids=title)
    def test_an_object_is_one_of_kubernetes(self, item: dict[str, Any], version: str) -> None:
        kubernetes_validate.validate(item, version, strict=True)

    def test_a_field_that_does_not_exist_would_be_found(self) -> None:
        [service] = [item for item in OBJECTS if item["kind"] == "Service"]
        wrong = {**service, "spec": {**service["spec"], "selektor": {}}}

        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, "1.30", strict=True)

    @pytest.mark.parametrize(("name", "pod"), list(pods()), ids=lambda value: str(value)[:20])
    def test_a_pod_has_no_more_rights_than_it_needs(self, name: str, pod: dict[str, Any]) -> None:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]

    def test_selectors_find_their_pods(self) -> None:
        templates = {
            item["metadata"]["name"]: item["spec"]["template"]["metadata"]["labels"]
            for item in OBJECTS
            if item["kind"] in {"Deployment", "Job"}
        }
        for item in OBJECTS:
            spec = item.get("spec", {})
            selector = spec.get("selector") or spec.get("podSelector")
            if selector is None:
                continue
            labels = selector.get("matchLabels", selector)
            name = item["metadata"]["name"]
            pod = templates[name if name in templates else "flatlora-api"]
            assert labels.items() <= pod.items(), name

    def test_a_worker_asks_for_a_gpu_and_for_the_time_to_drain(self) -> None:
        pod = dict(pods())["flatlora-worker"]
        resources = pod["containers"][0]["resources"]

        assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == 1
        assert pod["terminationGracePeriodSeconds"] > DRAIN_SECONDS

    def test_no_secret_is_in_the_manifest(self) -> None:
        assert "Secret" not in {item["kind"] for item in OBJECTS}
        for _, pod in pods():
            assert {"secretRef": {"name": "flatlora"}} in pod["containers"][0]["envFrom"]


class TestSystemd:
    @pytest.mark.skipif(
        shutil.which("systemd-analyze") is None, reason="needs systemd-analyze, of systemd"
    )
    def test_systemd_understands_every_line(self, tmp_path: Path) -> None:
        for unit in UNITS:
            text = unit.read_text().replace("/opt/flatlora/bin/flatlora", sys.executable)
            (tmp_path / unit.name).write_text(text)
        done = subprocess.run(
            ["systemd-analyze", "verify", *(tmp_path / unit.name for unit in UNITS)],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": os.environ["PATH"]},
        )

        # Units of the machine itself are looked at too, and may have faults of their own.
        assert [line for line in done.stderr.splitlines() if "flatlora" in line] == []
        assert UNITS

    @pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
    def test_a_unit_has_no_more_rights_than_it_needs(self, unit: Path) -> None:
        lines = set(unit.read_text().splitlines())

        assert {
            "User=flatlora",
            "NoNewPrivileges=yes",
            "CapabilityBoundingSet=",
            "ProtectSystem=strict",
            "ProtectHome=yes",
        } <= lines

    @pytest.mark.parametrize("name", ["flatlora", "flatlora-worker"])
    def test_trainers_may_write_their_last_checkpoint(self, name: str) -> None:
        text = (DEPLOY / "systemd" / f"{name}.service").read_text()
        [stop] = re.findall(r"^TimeoutStopSec=(\S+)$", text, re.MULTILINE)

        assert seconds(stop) > DRAIN_SECONDS
        assert "KillMode=mixed" in text  # the parent alone is told, and ends the others in order
        assert "OOMPolicy=continue" in text  # else one trainer's end would be the whole unit's
