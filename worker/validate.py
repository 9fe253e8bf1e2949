"""``flatlora validate``: check a dataset without a service, a database or a GPU.

    python -m worker.validate '{"dataset": "rows.jsonl", "base_model": "folder", …}'

Ends with 0 if the rows can be used, 1 if not. With ``"json": true`` it prints the report, or
``{"error": {reason, message, hint}}``, on standard output.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from app.cli.output import FAILED, OK, USAGE, err, print_error, print_json
from app.jobs.schemas import JobCreate
from app.storage import sha256_of
from app.uris import file_uri
from worker.training.config import BaseModel, DataFile, TrainingJob
from worker.training.errors import BaseModelUnavailable, DatasetUnavailable, JobError

out = Console(soft_wrap=True, highlight=False)


def describe(options: dict[str, Any]) -> TrainingJob:
    """The job that would be submitted for this file, with the defaults of the HTTP contract."""
    dataset, model = Path(options["dataset"]), model_folder(options)
    spec = JobCreate.model_validate(
        {
            "base_model": str(model),
            "dataset_uri": file_uri(dataset),
            "data": {name: options[name] for name in ("format", "max_length", "max_bad_rows")},
        }
    ).resolved()
    return TrainingJob.from_record(
        "validate",
        spec.model_dump(mode="json"),
        base_model=BaseModel(name=str(model), path=model),
        dataset=DataFile(spec.dataset_uri, dataset, dataset.name, sha256_of(dataset)),
        validation=None,
    )


def model_folder(options: dict[str, Any]) -> Path:
    """A folder, also where it is named as jobs name it."""
    return Path(str(options["base_model"] or "").removeprefix("file:"))


def check(job: TrainingJob, *, has_model: bool) -> dict[str, Any]:
    """The preflight report; without a model, only what the rows themselves tell."""
    from worker.training.data.dataset import prepare, read

    if has_model:
        from worker.training.data.rendering import Renderer
        from worker.training.model.base import load_tokenizer, max_positions

        base = job.base_model
        renderer = Renderer(load_tokenizer(base), job.data.loss_on)
        return prepare(job, renderer, max_positions(base)).report
    found = read(job.dataset, job.data)
    return {
        "format": {
            "name": found.format,
            "file": found.source.type,
            "compression": found.source.compression,
        },
        "rows": {"read": found.rows, "bad": found.bad},
        "bad_rows": [{"place": row.place, "problem": row.problem} for row in found.bad_rows],
    }


def show(report: dict[str, Any]) -> None:
    from worker.training.data.dataset import describe_report

    if "tokens" not in report:
        rows, name = report["rows"], report["format"]["name"]
        out.print(f"{rows['read']} rows of format {name}, {rows['bad']} bad")
        return
    table = Table.grid(padding=(0, 2))
    for name, text in describe_report(report):
        table.add_row(f"[dim]{name}[/]", escape(text))
    out.print(table)
    out.print("\nthe first row as the model sees it, with what it learns in green:")
    for segment in report["first_example"]:
        style = "green" if segment["in_loss"] else "dim"
        out.print(segment["text"], style=style, markup=False, end="")
    out.print()
    for warning in report["warnings"]:
        err.print(f"[yellow]warning[/]: {escape(warning)}")


def explain(error: JobError, *, as_json: bool) -> None:
    if as_json:
        told = {"reason": error.reason, "message": error.message, "hint": error.hint}
        print_json({"error": told})
    print_error(error.message, error.hint)


def main() -> int:
    options = json.loads(sys.argv[1])
    as_json = options["json"]
    if not Path(options["dataset"]).is_file():
        missing = f"There is no file {options['dataset']}."
        explain(DatasetUnavailable(missing, "Check the path."), as_json=as_json)
        return USAGE
    if options["base_model"] is not None and not model_folder(options).is_dir():
        missing = f"There is no folder {model_folder(options)}."
        explain(BaseModelUnavailable(missing, "Name a folder of this machine."), as_json=as_json)
        return USAGE
    logging.disable()  # what goes wrong is told below, not by a traceback
    try:
        report = check(describe(options), has_model=options["base_model"] is not None)
    except JobError as error:
        explain(error, as_json=as_json)
        return FAILED
    if as_json:
        print_json(report)
    else:
        show(report)
    return OK


if __name__ == "__main__":
    sys.exit(main())
