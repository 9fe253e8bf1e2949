"""The guide leaves out no field, no setting, no reason and no error; no link leads nowhere."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from app.errors import Conflict, ServiceError, TooManyRequests
from app.jobs.schemas import DataOptions, JobCreate
from app.jobs.states import Reason
from app.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "guide.md").read_text()
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")]
LINK = re.compile(r"\]\(([^)#]+)(#[^)]*)?\)")


def fields(group: type[BaseModel], above: str = "") -> Iterator[str]:
    for name, field in group.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields(kind, f"{above}{name}.")
        else:
            yield f"{above}{name}"


def codes(error: type[ServiceError] = ServiceError) -> Iterator[str]:
    if error not in {Conflict, TooManyRequests}:  # never raised themselves
        yield error.code
    for kind in error.__subclasses__():
        yield from codes(kind)


@pytest.mark.parametrize("field", list(fields(JobCreate)))
def test_the_guide_names_every_field_of_a_job(field: str) -> None:
    assert f"`{field}`" in GUIDE


@pytest.mark.parametrize("setting", list(Settings.model_fields))
def test_the_guide_names_every_setting(setting: str) -> None:
    assert f"`FLATLORA_{setting.upper()}`" in GUIDE


FAULT = re.compile(r'code="([a-z_]+)"')
FAULTS = sorted(
    {code for page in (ROOT / "app").rglob("*.py") for code in FAULT.findall(page.read_text())}
)


@pytest.mark.parametrize("word", [*Reason, *codes(), *FAULTS])
def test_the_guide_names_every_reason_and_every_error(word: str) -> None:
    assert f"`{word}`" in GUIDE


def test_the_guide_shows_a_row_of_every_format() -> None:
    for name in get_args(DataOptions.model_fields["format"].annotation):
        assert f"`{name}`" in GUIDE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    targets = [found[1] for found in LINK.finditer(page.read_text())]
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []
