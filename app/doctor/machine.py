"""This machine: the program, the data folder, its disk, open files, the port."""

import errno
import platform
import resource
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx2

from app import __version__
from app.doctor.finding import Check, Finding, fail, gib, ok, warn
from app.settings import Settings

CHECKPOINT_BYTES = 2 << 30  # a large job's checkpoints and adapter
OPEN_FILES = {False: 256, True: 4096}  # by whether it is a cluster
PORT_SECONDS = 4


def program(_settings: Settings) -> Iterator[Finding]:
    python = platform.python_version()
    yield ok("program", f"flatlora {__version__}, Python {python} on {platform.platform()}")


def folder(settings: Settings) -> Iterator[Finding]:
    path, expected = settings.data_dir, "a folder that this user alone may enter, and write"
    if not path.exists():
        above = next(parent for parent in path.parents if parent.exists())
        if refusal := _refusal(above):
            yield fail("data folder", f"{above}: {refusal}", expected, _move(path))
        else:
            yield ok("data folder", f"{path} is not there yet; it is made at the first start")
        return
    if refusal := _refusal(path):
        yield fail("data folder", f"{path}: {refusal}", expected, _move(path))
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        found = f"{path} has the mode {mode:o}: others may enter it"
        yield warn("data folder", found, expected, f"chmod 700 {path}")
    else:
        yield ok("data folder", f"{path}, private", expected)
    key = settings.key_file
    if key.exists() and stat.S_IMODE(key.stat().st_mode) & 0o077:
        yield warn("API key", f"others may read {key}", "mode 600", f"chmod 600 {key}")


def _refusal(folder: Path) -> str | None:
    """Why nothing can be made there. Asked by trying: root may do all, but not everywhere."""
    try:
        with tempfile.TemporaryDirectory(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _move(path: Path) -> str:
    return f"Give this user the folder {path}, or name another with FLATLORA_DATA_DIR."


def disk(settings: Settings) -> Iterator[Finding]:
    """Room for the largest dataset twice, as an upload and as a job's copy, and for checkpoints."""
    path = settings.data_dir
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    wanted = 2 * settings.max_dataset_bytes + CHECKPOINT_BYTES
    expected = f"{gib(wanted)}: two copies of the largest dataset, and {gib(CHECKPOINT_BYTES)}"
    mend = "Free some space, move FLATLORA_DATA_DIR, or lower FLATLORA_MAX_DATASET_BYTES."
    found = f"{gib(free)} free at {path}"
    if free < CHECKPOINT_BYTES:
        yield fail("disk", found, expected, mend)
    elif free < wanted:
        yield warn("disk", found, expected, mend)
    else:
        yield ok("disk", found, expected)


def files(settings: Settings) -> Iterator[Finding]:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = OPEN_FILES[settings.is_cluster]
    found, expected = f"{limit} open files", f"{needed} or more: connections are files too"
    if limit == resource.RLIM_INFINITY or limit >= needed:
        yield ok("open files", found, expected)
    else:
        mend = f"ulimit -n {needed}, or LimitNOFILE={needed} in the unit of systemd."
        yield warn("open files", found, expected, mend)


def port(settings: Settings) -> Iterator[Finding]:
    where, expected = f"{settings.host}:{settings.port}", "free, or this service"
    if settings.port == 0:
        yield ok("port", "any that is free")
        return
    try:
        _bind(settings)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            yield _in_use(settings)
        else:
            mend = "Choose with FLATLORA_HOST and FLATLORA_PORT where it listens."
            yield fail("port", f"{where}: {error.strerror}", expected, mend)
    else:
        yield ok("port", f"{where} is free", expected)


def _bind(settings: Settings) -> None:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((settings.host, settings.port))


def _in_use(settings: Settings) -> Finding:
    loopback = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - how to reach such a one
    host = loopback.get(settings.host)
    url = f"http://{host}:{settings.port}" if host else settings.base_url
    try:
        answer = httpx2.get(f"{url}/version", timeout=PORT_SECONDS, trust_env=False).json()
        version = answer["version"]
    except (httpx2.HTTPError, ValueError, TypeError, KeyError):
        found = f"something else listens on {settings.host}:{settings.port}"
        return fail("port", found, "free, or this service", "Choose another with FLATLORA_PORT.")
    return ok("port", f"flatlora {version} answers at {url}", "free, or this service")


PROGRAM = Check("program", program, "", "Please report it.")
FOLDER = Check(
    "data folder", folder, "a folder that can be written", "Check the mount of FLATLORA_DATA_DIR."
)
DISK = Check("disk", disk, "free space", "Check the mount of FLATLORA_DATA_DIR.")
FILES = Check("open files", files, "a limit", "Check ulimit -n.")
PORT = Check("port", port, "free, or this service", "Choose another with FLATLORA_PORT.")
