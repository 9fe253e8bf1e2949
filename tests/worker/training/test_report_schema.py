"""The preflight report is what the API's document says of it: every name, and its type."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import get_type_hints, is_typeddict

from app.jobs.report import PreflightReport
from tests.worker.training.conftest import ROWS, Recorder
from worker.training.config import DataFile, TrainingJob
from worker.training.run import run


def not_promised(told: Any, promised: Any, where: str = "") -> Iterator[str]:
    """Names that one side has and the other has not."""
    for kind in (promised, *getattr(promised, "__args__", ())):
        if is_typeddict(kind):
            names = get_type_hints(kind)
            for value in told if isinstance(told, list) else [told]:
                yield from (f"{where}/{name}" for name in names.keys() ^ value.keys())
                for name in names.keys() & value.keys():
                    yield from not_promised(value[name], names[name], f"{where}/{name}")


def test_a_report_has_every_name_that_clients_are_promised_and_no_other(
    make_job: Callable[..., TrainingJob],
    data_file: Callable[..., DataFile],
    tmp_path: Path,
) -> None:
    bad = {"messages": 1}
    job = make_job(rows=[bad, *ROWS], data={"max_bad_rows": 1}, dry_run=True)
    job = replace(job, validation=data_file([bad, *ROWS], "validation.jsonl"))
    recorder = Recorder()
    run(job, tmp_path, recorder, recorder)
    assert recorder.report["bad_rows"]
    assert recorder.report["validation"]["bad_rows"]
    assert list(not_promised(recorder.report, PreflightReport)) == []
    TypeAdapter(PreflightReport).validate_python(recorder.report, strict=True)
    for name in ("rows", "bad_rows", "memory"):
        less = {key: value for key, value in recorder.report.items() if key != name}
        assert list(not_promised(less, PreflightReport)) == [f"/{name}"]
