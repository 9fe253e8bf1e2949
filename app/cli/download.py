"""Fetching an adapter into a folder, or as one tar."""

from pathlib import Path
from typing import NoReturn

from app.cli.client import connected
from app.cli.output import USAGE, fail, out, print_json
from app.cli.transfer import transfer
from flatlora_client import AdapterFile, FlatLora
from flatlora_client.operations.downloads import is_whole


def fetch_adapter(job_id: str, target: Path | None, *, as_tar: bool, as_json: bool) -> None:
    if as_tar:
        _fetch_tar(job_id, target or Path(f"{job_id}.tar"), as_json=as_json)
    else:
        _fetch_folder(job_id, target or Path(job_id), as_json=as_json)


def _fetch_tar(job_id: str, path: Path, *, as_json: bool) -> None:
    if path.exists():
        fail(f"{path} exists already", "Name another with --to.", code=USAGE)
    with connected(as_json=as_json) as client, transfer(path.name) as progress:
        client.jobs.download_tar(job_id, path, progress=progress)
    if as_json:
        print_json({"job_id": job_id, "file": str(path.resolve())})
    else:
        out.print(f"adapter in {path}", markup=False, highlight=False)


def _fetch_folder(job_id: str, folder: Path, *, as_json: bool) -> None:
    found = _content(folder)
    if found and not any(path.suffix == ".part" for path in found):
        _refuse(folder)
    with connected(as_json=as_json) as client:
        if found and not _is_unfinished(client, job_id, found):
            _refuse(folder)
        with transfer(job_id) as progress:
            client.jobs.download(job_id, folder, progress=progress)
    if as_json:
        print_json({"job_id": job_id, "folder": str(folder.resolve())})
    else:
        out.print(f"adapter in {folder}", markup=False, highlight=False)


def _content(folder: Path) -> list[Path]:
    if not folder.exists():
        return []
    if not folder.is_dir():
        _refuse(folder)
    return list(folder.iterdir())


def _refuse(folder: Path) -> NoReturn:
    fail(
        f"{folder} exists already and is not an empty folder",
        "Name another with --to.",
        code=USAGE,
    )


def _is_unfinished(client: FlatLora, job_id: str, found: list[Path]) -> bool:
    """Whether all that is there is what an interrupted download of this adapter has left."""
    adapter = client.jobs.get(job_id).adapter
    files = {file.name: file for file in adapter.files} if adapter else {}
    return all(_is_ours(path, files) for path in found)


def _is_ours(path: Path, files: dict[str, AdapterFile]) -> bool:
    if path.suffix == ".part":
        return path.stem in files
    return path.name in files and is_whole(path, files[path.name])
