"""The guide leaves out no field and no setting; no link leads nowhere; no gap waits to be filled.

That docs/errors.md leaves out no error is tested beside their provoking, in test_errors.py.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from app.jobs.schemas import DataOptions, JobCreate
from app.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "guide.md").read_text()
PAGES = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("examples/*.md"),
    *ROOT.glob("client/*.md"),
]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)]*))?\)")
UNFINISHED = re.compile(
    r"""\b(?:TODO|FIXME|XXX+|TBD|TBA|PLACEHOLDER)\b
      | \|\s*(?:START|END|VALUE|NUMBER|RESULT|FILL|HERE|\?+|\.\.\.)\s*\|   # alone in its cell
      | <<<<<<<|>>>>>>>|\?{3}""",
    re.VERBOSE,
)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def fields(group: type[BaseModel], above: str = "") -> Iterator[str]:
    for name, field in group.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields(kind, f"{above}{name}.")
        else:
            yield f"{above}{name}"


@pytest.mark.parametrize("field", list(fields(JobCreate)))
def test_the_guide_names_every_field_of_a_job(field: str) -> None:
    assert f"`{field}`" in GUIDE


@pytest.mark.parametrize("setting", list(Settings.model_fields))
def test_the_guide_names_every_setting(setting: str) -> None:
    assert f"`FLATLORA_{setting.upper()}`" in GUIDE


def test_the_guide_shows_a_row_of_every_format() -> None:
    for name in get_args(DataOptions.model_fields["format"].annotation):
        assert f"`{name}`" in GUIDE


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Path and anchor of each that stays in this repository."""
    for path, anchor in LINK.findall(FENCED.sub("", page.read_text())):
        if "://" not in path and not path.startswith("mailto:"):
            yield path, anchor


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    assert [path for path, _ in links(page) if not (page.parent / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_anchor_is_a_heading(page: Path) -> None:
    for path, anchor in links(page):
        target = page.parent / path if path else page
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_waits_to_be_filled_in(page: Path) -> None:
    lines = enumerate(page.read_text().splitlines(), start=1)
    assert [(number, line) for number, line in lines if UNFINISHED.search(line)] == []


@pytest.mark.parametrize(
    "line",
    ["| start of the API | START | 1.5 s |", "TODO: measure", "costs XXX s", "<!-- FIXME -->",
     "| a | ? |", "| TBD | 3 |", "takes ??? s"],
)  # fmt: skip
def test_a_line_that_waits_to_be_filled_in_is_found(line: str) -> None:
    assert UNFINISHED.search(line)


@pytest.mark.parametrize("line", ["| `START` | a constant |", "Start | end", "what is a job?"])
def test_a_line_that_is_finished_is_not(line: str) -> None:
    assert not UNFINISHED.search(line)
