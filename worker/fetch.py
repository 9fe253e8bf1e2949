"""Bringing a job's inputs to the worker, before a trainer is started.

In a cluster a later attempt may run on another machine, where a file may differ and a branch of the
hub may have moved. So the first attempt pins what it has read: datasets go to the store under their
hashes, and the row says which, with the model's commit.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from app.settings import Settings
from app.storage import ArtifactStore, Damaged, sha256_of
from app.tables import DatasetRow
from app.uris import UriError, resolve_dataset_file, resolve_model_folder
from worker.inputs import pinned, read_job, write_job
from worker.lease import Lease
from worker.remote import TASKS, Bring, order_for
from worker.training.config import BaseModel, DataFile
from worker.training.errors import BaseModelUnavailable, DatasetUnavailable

Download = Callable[[str, str | None], Path]
"""Brings a model of the hub, at a revision, to a folder that is named by its commit."""

Pin = Callable[[Mapping[str, Any]], None]
"""Writes into the job's row what its first attempt has read."""


class Fetcher:
    def __init__(self, settings: Settings, engine: Engine, store: ArtifactStore) -> None:
        self._settings = settings
        self._engine = engine
        self._store = store

    def fetch(self, folder: Path, lease: Lease, download: Download, bring: Bring, pin: Pin) -> None:
        """Fill a job's folder with its inputs and their description.

        A later attempt finds the first one's copies and uses them again, so that a file that has
        changed meanwhile cannot change a resumed run.
        """
        spec = lease.spec
        if lease.inputs is not None:
            self._fetch_pinned(folder, lease, lease.inputs, download)
            return
        if not _is_intact(folder):
            base_model = self._base_model(spec["base_model"], spec["base_model_revision"], download)
            dataset = self._dataset(folder, "train", spec["dataset_uri"], bring)
            uri = spec["evaluation"]["validation_uri"]
            validation = self._dataset(folder, "validation", uri, bring) if uri else None
            write_job(folder, lease.job_id, dict(spec), base_model, dataset, validation)
        if self._settings.is_cluster:
            self._pin(folder, pin)

    def _pin(self, folder: Path, pin: Pin) -> None:
        job = read_job(folder)
        for file in (job.dataset, job.validation):
            if file:
                self._store.put_file(file.path, file.sha256)
        pin(pinned(folder))

    def _fetch_pinned(
        self, folder: Path, lease: Lease, inputs: Mapping[str, Any], download: Download
    ) -> None:
        """What an attempt on this or on another machine has read."""
        if _is_intact(folder) and pinned(folder) == inputs:
            return
        model = inputs["base_model"]
        base_model = self._base_model(model["name"], model["revision"], download)
        files = [
            self._stored(folder, name, inputs[key]) if inputs[key] else None
            for name, key in (("train", "dataset"), ("validation", "validation"))
        ]
        dataset, validation = files
        assert dataset is not None
        write_job(
            folder, lease.job_id, dict(lease.spec), base_model, dataset, validation, inputs["clock"]
        )

    def _stored(self, folder: Path, name: str, values: Mapping[str, Any]) -> DataFile:
        file = DataFile(path=folder / "dataset" / name, **values)
        file.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._store.fetch(file.sha256, file.path)
        except Damaged as error:
            raise DatasetUnavailable(
                f"What the job's first attempt has read of {file.uri} is damaged or gone.",
                "Submit the job again.",
            ) from error
        return file

    def _dataset(self, folder: Path, name: str, uri: str, bring: Bring) -> DataFile:
        target = folder / "dataset" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if uri.partition(":")[0] in TASKS:
            return self._from_elsewhere(uri, target, bring)
        if uri.startswith("dataset:"):
            filename = self._fetch_upload(uri, target)
        else:
            filename = self._copy_file(uri, target)
        return DataFile(uri=uri, path=target, filename=filename, sha256=sha256_of(target))

    def _from_elsewhere(self, uri: str, target: Path, bring: Bring) -> DataFile:
        try:
            order = order_for(uri, target, self._settings)
        except UriError as error:  # this machine's settings differ from the API's
            raise DatasetUnavailable(error.detail, error.hint) from error
        found = bring(order)
        return DataFile(order.uri, target, found.filename, found.sha256, found.revision)

    def _fetch_upload(self, uri: str, target: Path) -> str:
        with Session(self._engine) as session:
            upload = session.scalar(
                select(DatasetRow).where(DatasetRow.id == uri.removeprefix("dataset:"))
            )
        if upload is None:
            raise DatasetUnavailable(
                f"{uri} no longer exists.", "Upload the rows again with POST /datasets."
            )
        try:
            self._store.fetch(upload.sha256, target)
        except Damaged as error:
            raise DatasetUnavailable(
                f"What is stored of {uri} is damaged or gone.",
                "Upload the rows again with POST /datasets: that repairs it.",
            ) from error
        return upload.filename

    def _copy_file(self, uri: str, target: Path) -> str:
        try:
            source = resolve_dataset_file(uri, self._settings.dataset_roots)
            partial = target.with_name(target.name + ".part")
            shutil.copyfile(source, partial)
        except UriError as error:
            raise DatasetUnavailable(error.detail, error.hint) from error
        except (FileNotFoundError, PermissionError) as error:
            raise DatasetUnavailable(
                f"{uri} cannot be read: {error.strerror}.",
                "Check the file on the worker's machine.",
            ) from error
        partial.rename(target)
        return source.name

    def _base_model(self, name: str, revision: str | None, download: Download) -> BaseModel:
        if name.startswith("file:"):
            try:
                path = resolve_model_folder(name, self._settings.model_roots)
            except UriError as error:
                raise BaseModelUnavailable(error.detail, error.hint) from error
            return BaseModel(name=name, path=path)
        path = download(name, revision)
        return BaseModel(name=name, path=path, revision=path.name)  # the cache names it by commit


def _is_intact(folder: Path) -> bool:
    """An earlier attempt has left everything, and it is still what the description says."""
    try:
        job = read_job(folder)
        files = [job.dataset, *([job.validation] if job.validation else [])]
        is_same = all(sha256_of(file.path) == file.sha256 for file in files)
    except (OSError, ValueError, KeyError):  # not there, or torn by a power cut
        return False
    return is_same and job.base_model.path.is_dir()
