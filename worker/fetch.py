"""Bringing a job's inputs to the worker, before a trainer is started."""

import shutil
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from app.settings import Settings
from app.storage import ArtifactStore, sha256_of
from app.tables import DatasetRow
from app.uris import UriError, resolve_dataset_file, resolve_model_folder
from worker.inputs import JOB_FILE, read_job, write_job
from worker.training.config import BaseModel, DataFile
from worker.training.errors import BaseModelUnavailable, DatasetUnavailable

log = structlog.get_logger()

# What a base model needs, and nothing that could run code: no pickles, no scripts.
MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "tokenizer*", "vocab*", "merges*"]


class Fetcher:
    def __init__(self, settings: Settings, engine: Engine, store: ArtifactStore) -> None:
        self._settings = settings
        self._engine = engine
        self._store = store

    def fetch(self, folder: Path, job_id: str, spec: dict[str, Any]) -> None:
        """Fill a job's folder with its inputs and their description.

        A later attempt finds the first one's copies and uses them again, so that a file that has
        changed meanwhile cannot change a resumed run.
        """
        if (folder / JOB_FILE).exists() and _is_intact(folder):
            return
        base_model = self._base_model(spec["base_model"], spec["base_model_revision"])
        dataset = self._dataset(folder, "train", spec["dataset_uri"])
        validation_uri = spec["evaluation"]["validation_uri"]
        validation = self._dataset(folder, "validation", validation_uri) if validation_uri else None
        write_job(folder, job_id, spec, base_model, dataset, validation)

    def _dataset(self, folder: Path, name: str, uri: str) -> DataFile:
        target = folder / "dataset" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if uri.startswith("dataset:"):
            filename = self._fetch_upload(uri, target)
        else:
            filename = self._copy_file(uri, target)
        return DataFile(uri=uri, path=target, filename=filename, sha256=sha256_of(target))

    def _fetch_upload(self, uri: str, target: Path) -> str:
        with Session(self._engine) as session:
            upload = session.scalar(
                select(DatasetRow).where(DatasetRow.id == uri.removeprefix("dataset:"))
            )
        if upload is None:
            raise DatasetUnavailable(
                f"{uri} no longer exists.", "Upload the rows again with POST /datasets."
            )
        self._store.fetch(upload.sha256, target)
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

    def _base_model(self, name: str, revision: str | None) -> BaseModel:
        if name.startswith("file:"):
            try:
                path = resolve_model_folder(name, self._settings.model_roots)
            except UriError as error:
                raise BaseModelUnavailable(error.detail, error.hint) from error
            return BaseModel(name=name, path=path)
        path = _download_model(name, revision)
        return BaseModel(name=name, path=path, revision=path.name)  # the cache names it by commit


def _download_model(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES))
    except GatedRepoError as error:
        raise BaseModelUnavailable(
            f"The hub wants an access token for {name}.", "Set HF_TOKEN for the worker."
        ) from error
    except RepositoryNotFoundError as error:
        raise BaseModelUnavailable(
            f"The hub has no model {name}, or it is private.", "Check the name, or set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise BaseModelUnavailable(
            f"The model {name} has no revision {revision}.", "Name a commit, a tag or a branch."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        log.warning("model download failed", model=name, exc_info=error)
        raise BaseModelUnavailable(
            f"The worker cannot reach the hub to get {name}.",
            "Check the worker's network, or put the model in a folder and name it as file:.",
        ) from error


def _is_intact(folder: Path) -> bool:
    """The copies are still what the description says."""
    job = read_job(folder)
    files = [job.dataset, *([job.validation] if job.validation else [])]
    return all(file.path.exists() and sha256_of(file.path) == file.sha256 for file in files)
