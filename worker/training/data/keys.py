"""Rows told from each other by a hash of what they say, sixteen bytes each."""

import hashlib

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from worker.training.data.conversations import Conversation
from worker.training.errors import DatasetInvalid

KEY_BYTES = 16

Keys = UInt64[np.ndarray, "rows 2"]


def key_of(conversation: Conversation, seed: int) -> bytes:
    """The same for equal conversations and seeds, and for no others."""
    text = f"{seed}\0{conversation.canonical()}"
    return hashlib.sha256(text.encode()).digest()[:KEY_BYTES]


def as_keys(keys: bytes | bytearray) -> Keys:
    """Keys that stand end to end; numbers that are ordered as their bytes are."""
    return np.frombuffer(keys, ">u8").reshape(-1, 2).astype(np.uint64)


def groups(keys: Keys) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " groups+1"]]:
    """Rows sorted by their keys, and where in that order each other key begins, and the end."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    differs = (ordered[1:] != ordered[:-1]).any(axis=1)
    begins = np.flatnonzero(np.concatenate(([True], differs)))
    return order, np.append(begins, len(keys))


def copies(keys: Keys) -> int:
    """How many rows say what a row before them has said."""
    _, bounds = groups(keys)
    return len(keys) - (len(bounds) - 1)


def found_in(keys: Keys, others: Keys) -> int:
    """How many rows are among the others."""
    order, bounds = groups(np.concatenate((others, keys)))
    group = np.empty(len(order), np.int64)
    group[order] = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    return int(np.isin(group[len(others) :], group[: len(others)]).sum())


def split(keys: Keys, share: float, max_rows: int) -> Bool[np.ndarray, " rows"]:
    """Which rows to hold out, chosen by their keys: by a hash of their content and the seed.

    Equal rows stay together, so that no held-out row was trained on. Groups of them are taken while
    they fit; where none does, the smallest is, so one row at least is held out.

    Args:
        keys: Of rows that can be used on either side.
        share: Of the rows.
        max_rows: At most so many.

    Returns:
        Of each row whether it is held out.

    Raises:
        DatasetInvalid: If all rows are the same.
    """
    order, bounds = groups(keys)
    sizes = np.diff(bounds)
    if len(sizes) < 2:
        raise DatasetInvalid(
            "All rows that can be used are the same: none can be held out.",
            "Give other rows, or held-out rows of their own as evaluation.validation_uri.",
        )
    wanted = max(1, min(round(share * len(keys)), max_rows))
    held = np.zeros(len(keys), dtype=bool)
    for group in _fitting(sizes, wanted) or [int(sizes.argmin())]:
        held[order[bounds[group] : bounds[group + 1]]] = True
    return held


def _fitting(sizes: Int64[np.ndarray, " groups"], wanted: int) -> list[int]:
    """Groups in their order, each that leaves the sum of sizes within what is wanted."""
    chosen = []
    for group, size in enumerate(sizes):
        if size <= wanted:
            chosen.append(group)
            wanted -= int(size)
        if not wanted:
            break
    return chosen
