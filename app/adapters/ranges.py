"""The Range header (RFC 9110 §14.2), for one range."""

import re

from app.errors import RangeNotSatisfiable

SINGLE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


def requested_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Start and end (not included) of what is asked for; None means the whole file.

    A header that cannot be read, and one with several ranges, is ignored, as the RFC allows.
    """
    match = SINGLE.fullmatch(header.strip()) if header else None
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if first and last and int(last) < int(first):
        return None
    if first:
        start, end = int(first), min(int(last) + 1, size) if last else size
    else:
        start, end = max(size - int(last), 0), size
    if start >= end:
        raise RangeNotSatisfiable(
            f"{header} asks for bytes that are not there: the file has {size}.", size
        )
    return start, end
