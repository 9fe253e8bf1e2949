"""Places where tests make this program die, fail or wait; each does nothing unless switched on.

    FLATLORA_FAILPOINTS="claim.after_commit=kill@/tmp/once; publish.after_blobs=sleep:3"

``point=action[:argument][@file]``: ``kill`` (SIGKILL to itself), ``raise`` (``Injected``),
``full`` (no space left on the device) or ``sleep:seconds``. With a file it happens once: whoever
creates the file first does it.
"""

import errno
import os
import signal
import time
from enum import StrEnum

VARIABLE = "FLATLORA_FAILPOINTS"


class Point(StrEnum):
    """Every one is provoked by a test: tests/faults/test_failpoints.py."""

    REQUEST_BEFORE_COMMIT = "request.before_commit"
    REQUEST_AFTER_COMMIT = "request.after_commit"
    RELAY_BEFORE_SEND = "relay.before_send"
    RELAY_AFTER_SEND = "relay.after_send"
    WEBHOOK_BEFORE_NOTICED = "webhook.before_noticed"
    WEBHOOK_BEFORE_SEND = "webhook.before_send"
    WEBHOOK_AFTER_SEND = "webhook.after_send"
    CLAIM_BEFORE_COMMIT = "claim.before_commit"
    CLAIM_AFTER_COMMIT = "claim.after_commit"
    INPUTS_BEFORE_PIN = "inputs.before_pin"
    INPUTS_AFTER_PIN = "inputs.after_pin"
    HEARTBEAT_BEFORE_COMMIT = "heartbeat.before_commit"
    HEARTBEAT_AFTER_COMMIT = "heartbeat.after_commit"
    CHECKPOINT_FILES_WRITTEN = "checkpoint.files_written"
    CHECKPOINT_RENAMED = "checkpoint.renamed"
    HANDOVER_BEFORE_UPLOAD = "handover.before_upload"
    HANDOVER_BEFORE_COMMIT = "handover.before_commit"
    HANDOVER_AFTER_COMMIT = "handover.after_commit"
    PUBLISH_BEFORE_BLOBS = "publish.before_blobs"
    PUBLISH_AFTER_BLOBS = "publish.after_blobs"
    PUBLISH_AFTER_MANIFEST = "publish.after_manifest"
    END_BEFORE_COMMIT = "end.before_commit"
    END_AFTER_COMMIT = "end.after_commit"
    REQUEUE_BEFORE_COMMIT = "requeue.before_commit"
    REQUEUE_AFTER_COMMIT = "requeue.after_commit"


class Injected(Exception):
    """Raised by a failpoint, for a test."""


def failpoint(point: Point) -> None:
    """Do what the environment asks for here."""
    switched_on = os.environ.get(VARIABLE)
    if not switched_on:
        return
    for entry in switched_on.split(";"):
        name, _, action = entry.strip().partition("=")
        if name == point:
            _act(point, *_parse(action))


def _parse(action: str) -> tuple[str, str, str]:
    what, _, file = action.partition("@")
    verb, _, argument = what.partition(":")
    return verb, argument, file


def _act(point: Point, verb: str, argument: str, file: str) -> None:
    if file and not _first(file):
        return
    match verb:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise":
            raise Injected(point)
        case "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), point)
        case "sleep":
            time.sleep(float(argument))
        case _:
            raise ValueError(f"{VARIABLE}: {verb!r} is none of kill, raise, full, sleep")


def _first(file: str) -> bool:
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
