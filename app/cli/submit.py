"""From options on a command line to the body of ``POST /jobs``."""

import json
from pathlib import Path
from typing import Any

from app.cli.client import Json
from app.cli.output import USAGE, err, fail
from app.cli.transfer import transfer
from app.uris import file_uri
from flatlora_client import FlatLora


def read_body(file: Path | None) -> Json:
    """The body that ``--file`` holds, or an empty one."""
    if file is None:
        return {}
    try:
        body = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        fail(f"{file}: {error}", "Expected one JSON object, the body of POST /jobs.", code=USAGE)
    if not isinstance(body, dict):
        fail(f"{file}: found {type(body).__name__}, expected one JSON object", code=USAGE)
    return body


def set_path(body: Json, path: str, value: Any) -> None:
    """``training.learning_rate`` is a place in a tree."""
    *groups, name = path.split(".")
    for depth, group in enumerate(groups, 1):
        found: Any = body.setdefault(group, {})
        if not isinstance(found, dict):
            place = ".".join(groups[:depth])
            fail(
                f"{path} cannot be set: {place} is {json.dumps(found)}, expected a group of fields",
                f"Give {place} as an object, or leave it out.",
                code=USAGE,
            )
        body = found
    body[name] = value


def apply_settings(body: Json, settings: list[str]) -> None:
    """Each ``training.learning_rate=1e-3``; a value is JSON where it reads as such, else text."""
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            fail(f"--set {setting}: expected PATH=VALUE", code=USAGE)
        set_path(body, path, parse_value(text))


def parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def parse_labels(labels: list[str]) -> dict[str, str]:
    pairs = [label.partition("=") for label in labels]
    for name, equals, _ in pairs:
        if not equals:
            fail(f"--label {name}: expected KEY=VALUE", code=USAGE)
    return {name: value for name, _, value in pairs}


def dataset_uri(client: FlatLora, given: str) -> str:
    """A URI as it is; a path of this machine is uploaded first."""
    path = Path(given).expanduser()
    if ":" in given and not path.exists():
        return given
    if not path.is_file():
        fail(f"{given} is neither a file nor a dataset URI", code=USAGE)
    with transfer(path.name) as progress:
        uploaded = client.datasets.upload(path, progress=progress)
    err.print(f"uploaded {path.name} as {uploaded.uri}", markup=False, highlight=False)
    return uploaded.uri


def base_model(given: str) -> str:
    """A folder of this machine becomes a ``file:`` URI; anything else stays."""
    path = Path(given).expanduser()
    return file_uri(path.resolve()) if path.is_dir() else given
