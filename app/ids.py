"""Ids that sort by time: UUIDv7 (RFC 9562) behind a prefix that says what it names."""

import secrets
import time


def new_id(prefix: str) -> str:
    """Such as ``job_`` and 32 hexadecimal digits."""
    milliseconds = time.time_ns() // 1_000_000
    value = milliseconds << 80 | 7 << 76 | secrets.randbits(12) << 64 | 2 << 62
    return f"{prefix}_{value | secrets.randbits(62):032x}"
