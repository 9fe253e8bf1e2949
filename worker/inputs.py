"""What the trainer is given: a folder with the job's plain description.

<work folder>/<job id>/
    job.json            the job, its base model's folder, its datasets' copies
    dataset/            a copy of each dataset, so that a resumed run reads the same bytes
    checkpoints/        written by the trainer
    adapter/            the finished adapter
    trainer.log         what the trainer printed
"""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from worker.training.config import BaseModel, DataFile, TrainingJob
from worker.training.files import replace_text

JOB_FILE = "job.json"
LOG_FILE = "trainer.log"
CHECKPOINTS = "checkpoints"


def write_job(
    folder: Path,
    job_id: str,
    spec: dict[str, Any],
    base_model: BaseModel,
    dataset: DataFile,
    validation: DataFile | None,
    clock: str | None = None,
) -> None:
    """Describe the job to the trainer. Whole or not at all, and on the disk when this returns.

    ``clock`` is what templates see as the time: that of the first attempt, or now.
    """
    record = {
        "job_id": job_id,
        "spec": spec,
        "base_model": asdict(base_model),
        "dataset": _described(dataset),
        "validation": _described(validation) if validation else None,
        "clock": clock or datetime.now(UTC).isoformat(timespec="seconds"),
    }
    replace_text(folder / JOB_FILE, json.dumps(record, default=str, indent=1))


def pinned(folder: Path) -> dict[str, Any]:
    """What another machine needs to read the same: names and hashes, without this one's paths."""
    record = json.loads((folder / JOB_FILE).read_text())
    described = ("base_model", "dataset", "validation")
    found = {
        name: {key: value for key, value in record[name].items() if key != "path"}
        if record[name]
        else None
        for name in described
    }
    return {"clock": record["clock"], **found}


def read_job(folder: Path) -> TrainingJob:
    record = json.loads((folder / JOB_FILE).read_text())
    return TrainingJob.from_record(
        record["job_id"],
        record["spec"],
        base_model=_base_model(record["base_model"]),
        dataset=_data_file(record["dataset"]),
        validation=_data_file(record["validation"]) if record["validation"] else None,
        clock=datetime.fromisoformat(record["clock"]),
    )


def _described(file: DataFile) -> dict[str, Any]:
    """Without what 0.1 does not know, where that says nothing: its workers may go on from here."""
    values = asdict(file)
    return {name: value for name, value in values.items() if name != "revision" or value}


def _base_model(values: dict[str, Any]) -> BaseModel:
    return BaseModel(**{**values, "path": Path(values["path"])})


def _data_file(values: dict[str, Any]) -> DataFile:
    return DataFile(**{**values, "path": Path(values["path"])})
