"""The types of events that the document and the guide name are those that the code writes."""

import re
from pathlib import Path

import pytest

from app.jobs.event_types import EVENT_TYPES
from app.jobs.states import Status
from tests.contracts.openapi import document

ROOT = Path(__file__).resolve().parents[2]
NOT_EVENTS = {
    "job.json",  # a file
    "job.claim", "job.fetch", "job.train", "job.verify", "job.publish",  # spans of a trace
}  # fmt: skip
LITERAL = re.compile(r"\"(job\.[a-z_]+)\"")
ROW = re.compile(r"^\| `(job\.[a-z_]+)` \| (.+) \| (.*) \|$", re.MULTILINE)


def written() -> set[str]:
    """In the code itself, or as ``job.`` with a status after it."""
    known = ROOT / "app" / "jobs" / "event_types.py"
    files = [path for part in ("app", "worker") for path in (ROOT / part).rglob("*.py")]
    sources = [path.read_text() for path in files if path != known]
    statuses = {f"job.{status}" for status in Status}
    return {name for source in sources for name in LITERAL.findall(source)} | statuses


def test_every_type_that_is_written_is_named_and_no_other() -> None:
    assert written() - NOT_EVENTS == EVENT_TYPES.keys()


def test_the_guide_explains_each() -> None:
    rows = ROW.findall((ROOT / "docs" / "guide.md").read_text())
    told = {name: (meaning, tuple(re.findall(r"`(\w+)`", data))) for name, meaning, data in rows}
    assert told == {name: tuple(type_) for name, type_ in EVENT_TYPES.items()}


@pytest.mark.parametrize("schema", ["Event"])
def test_the_document_lists_them(schema: str) -> None:
    found = document()["components"]["schemas"][schema]["properties"]["type"]
    assert found["x-extensible-enum"] == [*EVENT_TYPES]
