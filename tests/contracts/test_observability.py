"""Dashboard, alerts and page speak of metrics that exist, and leave none out."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from prometheus_client.metrics_core import Metric
from sqlalchemy import insert
from sqlalchemy.orm import Session

from app.db import make_engine, now
from app.ids import new_id
from app.jobs.states import Status
from app.metrics import WEBHOOK_OUTCOMES
from app.migrate import upgrade
from app.tables import WorkerRow
from tests.app.conftest import make_settings, serve
from tests.app.scraping import scrape
from worker.metrics import OUTCOMES, Numbers

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "observability"
PAGE = (ROOT / "docs" / "observability.md").read_text()

NAMED = {  # as scrapers all over the world have them by now
    "flatlora_jobs", "flatlora_job_queue_seconds", "flatlora_job_run_seconds",
    "flatlora_job_attempts", "flatlora_lease_expired", "flatlora_outbox_lag_seconds",
    "flatlora_worker_heartbeat_age_seconds", "flatlora_gpu_memory_bytes", "flatlora_tokens",
    "flatlora_http_request_seconds", "flatlora_oldest_queued_seconds", "flatlora_workers",
    "flatlora_slots", "flatlora_build_info", "flatlora_disk_free_bytes", "flatlora_database_up",
    "flatlora_broker_up", "flatlora_webhooks_pending", "flatlora_webhook_oldest_pending_seconds",
    "flatlora_webhook_lag_seconds", "flatlora_webhook_attempts",
}  # fmt: skip
SUFFIXES = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_sum", "_count"),
    "gauge": ("",),
    "info": ("_info",),
}
BY_PROMETHEUS = {"job", "instance", "pod", "le"}  # labels that are not ours
VALUES: dict[str, dict[str, set[Any]]] = {
    "flatlora_jobs": {"state": set(Status)},
    "flatlora_slots": {"state": {"busy", "idle"}},
    "flatlora_workers": {"state": {"active", "draining", "silent"}},
    "flatlora_job_attempts_total": {"reason": set(OUTCOMES)},
    "flatlora_webhook_attempts_total": {"outcome": set(WEBHOOK_OUTCOMES)},
}
SELECTOR = re.compile(r"\b((?:flatlora|process)_\w+)\s*(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')


@cache
def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


@cache
def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((FOLDER / "grafana.json").read_text())["panels"]
    return found


def expressions() -> Iterator[tuple[str, str]]:
    for rule in alerts():
        yield rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def series(families: list[Metric]) -> dict[str, set[str]]:
    """Names of samples, each with its labels."""
    return {
        family.name + suffix: {
            label for sample in family.samples for label in sample.labels if label != "le"
        }
        for family in families
        for suffix in SUFFIXES[family.type]
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, postgres_server: str) -> dict[str, set[str]]:
    """What an API of a cluster and a worker really tell."""
    name = new_id("db")
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    url = postgres_server.replace("/postgres?", f"/{name}?")
    upgrade(url.replace("postgresql:", "postgresql+psycopg:"))
    settings = make_settings(
        tmp_path_factory.mktemp("service"), url, broker_url="redis://127.0.0.1:1/0"
    )
    found: dict[str, set[str]] = {}
    for service in serve(settings):
        engine = make_engine(settings.database)
        with Session(engine) as session, session.begin():
            row = {"name": "w", "host": "h", "pid": 1, "version": "1", "slots": []}
            moments = {"started_at": now(), "heartbeat_at": now()}
            session.execute(insert(WorkerRow).values(state="active", **row, **moments))
        engine.dispose()
        service.http.get("/version")
        found |= series(scrape(service).families)
    numbers = Numbers()
    numbers.begin_at_zero()
    numbers.gpu_memory.labels("0").set(1)
    for metric in vars(numbers).values():
        found |= series(list(metric.collect()))
    return found


def family(name: str) -> str:
    return re.sub(r"_(total|bucket|sum|count)$", "", name)


def test_the_names_are_those_that_were_promised(exported: dict[str, set[str]]) -> None:
    ours = {family(name) for name in exported if name.startswith("flatlora")}
    assert ours == NAMED


def test_no_label_names_a_job_or_a_tenant(exported: dict[str, set[str]]) -> None:
    allowed = {
        "state", "reason", "worker", "device", "method", "route", "status", "version", "outcome",
    }  # fmt: skip
    labels = set.union(*(exported[name] for name in exported if name.startswith("flatlora")))
    assert labels == allowed | {"python"}


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_what_is_asked_for_exists(
    where: str, expression: str, exported: dict[str, set[str]]
) -> None:
    selectors = SELECTOR.findall(expression)
    assert selectors, where
    for name, matchers in selectors:
        assert name in exported, where
        for label, operator, value in MATCHER.findall(matchers):
            assert label in exported[name] | BY_PROMETHEUS, (where, name, label)
            known = VALUES.get(name, {}).get(label)
            if known and operator in {"=", "=~"}:
                assert set(value.split("|")) <= known, (where, name)


def test_every_metric_is_shown_and_explained(exported: dict[str, set[str]]) -> None:
    asked = " ".join(target["expr"] for panel in panels() for target in panel.get("targets", []))
    shown = {family(name) for name, _ in SELECTOR.findall(asked)}
    explained = {family(name) for name in re.findall(r"`(flatlora_\w+)", PAGE)}
    assert shown >= NAMED
    assert explained == NAMED


class TestAlerts:
    def test_each_says_how_grave_it_is_what_it_is_and_where_to_read_on(self) -> None:
        for rule in alerts():
            assert rule["labels"]["severity"] in {"warning", "critical"}, rule
            assert set(rule["annotations"]) == {"summary", "description", "runbook"}
            assert rule.get("for") or "increase(" in rule["expr"], rule["alert"]

    def test_each_is_on_the_page_under_its_own_heading_and_no_other_is(self) -> None:
        section = PAGE.partition("\n## Alerts\n")[2].partition("\n## ")[0]
        headings = re.findall(r"^### (\w+)$\n\n\*(\w+)\.\*", section, re.MULTILINE)
        assert headings == [(rule["alert"], rule["labels"]["severity"]) for rule in alerts()]
        for rule in alerts():
            page, _, anchor = rule["annotations"]["runbook"].partition("#")
            assert (ROOT / page).exists()
            assert anchor == rule["alert"].lower()

    def test_a_reason_that_nobody_can_mend_is_explained(self) -> None:
        (rule,) = [rule for rule in alerts() if rule["alert"] == "AttemptsFailing"]
        (reasons,) = re.findall(r'reason=~"([^"]*)"', rule["expr"])
        section = PAGE.partition("### AttemptsFailing")[2].partition("\n### ")[0]
        rows = " ".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE))
        assert set(reasons.split("|")) == set(re.findall(r"`(\w+)`", rows))

    @pytest.mark.skipif(shutil.which("promtool") is None, reason="Prometheus is not installed")
    def test_they_ring_when_they_should_and_only_then(self) -> None:
        done = subprocess.run(
            ["promtool", "test", "rules", str(Path(__file__).parent / "alerts_test.yaml")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


class TestDashboard:
    def test_it_can_be_imported_anywhere(self) -> None:
        found = json.loads((FOLDER / "grafana.json").read_text())
        assert (found["uid"], found["title"]) == ("flatlora", "flatlora")
        assert {v["name"]: v["type"] for v in found["templating"]["list"]} == {
            "datasource": "datasource", "job": "query",
        }  # fmt: skip
        sources = {
            json.dumps(part["datasource"])
            for panel in panels()
            for part in [panel, *panel.get("targets", [])]
            if "datasource" in part
        }
        assert sources == {json.dumps({"type": "prometheus", "uid": "${datasource}"})}

    def test_every_question_can_be_asked_of_one_deployment(self) -> None:
        for panel in panels():
            for target in panel.get("targets", []):
                for _, matchers in SELECTOR.findall(target["expr"]):
                    assert 'job=~"$job"' in matchers, panel["title"]

    def test_panels_have_numbers_of_their_own_and_do_not_lie_upon_each_other(self) -> None:
        assert len({panel["id"] for panel in panels()}) == len(panels())
        taken: set[tuple[int, int]] = set()
        for panel in panels():
            at = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(at["x"], at["x"] + at["w"])
                for y in range(at["y"], at["y"] + at["h"])
            }
            assert not cells & taken, panel["title"]
            assert at["x"] + at["w"] <= 24
            taken |= cells
