"""What may happen to a job: the types of its events, and what each may have under ``data``.

The document of the API names them, and a page of the guide. A worker of a newer version may tell
of more, so a client skips what it does not know.
"""

from typing import NamedTuple


class EventType(NamedTuple):
    """``data``: names that it may have."""

    meaning: str
    data: tuple[str, ...] = ()


EVENT_TYPES = {
    "job.queued": EventType("It was accepted, and waits.", ("retried_from",)),
    "job.waiting": EventType(
        "No slot has as many GPUs as it asks for; it waits until one comes.",
        ("gpus", "largest_slot"),
    ),
    "job.running": EventType("An attempt has begun.", ("worker",)),
    "job.preflight": EventType("The rows were checked: the job has its report."),
    "job.planned": EventType(
        "How each step is computed was tried on the GPU.", ("plan", "peak_bytes")
    ),
    "job.replanned": EventType("Memory did not suffice: another plan needs less."),
    "job.resumed": EventType(
        "It goes on: somebody has resumed it, or an attempt begins at a checkpoint's step.",
        ("step",),
    ),
    "job.evaluated": EventType("The held-out rows were evaluated.", ("step", "loss", "accuracy")),
    "job.checkpoint": EventType("A checkpoint was written.", ("step", "size", "verified", "kept")),
    "job.checkpoint_refused": EventType(
        "A checkpoint was damaged or of other inputs, and not used.", ("checkpoint",)
    ),
    "job.stopped_early": EventType(
        "The held-out loss got no better.",
        ("step", "total_steps", "loss", "best_step", "best_loss", "patience"),
    ),
    "job.verified": EventType(
        "A fresh process computes with the adapter what was trained.",
        ("logits_difference", "effect_reproduced"),
    ),
    "job.requeued": EventType("An attempt has ended before the job had; another follows."),
    "job.pausing": EventType("Somebody wants a pause: it stops after a checkpoint."),
    "job.paused": EventType("It waits until it is resumed."),
    "job.cancelling": EventType("Somebody has cancelled it: it stops at the next step."),
    "job.cancelled": EventType("It was cancelled. This is its last event."),
    "job.failed": EventType("It failed; `failure` says why. This is its last event.", ("reason",)),
    "job.succeeded": EventType(
        "The adapter is ready, or the dry run has ended. This is its last event."
    ),
}
