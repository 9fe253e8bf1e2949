"""Ids that sort by time: UUIDv7 (RFC 9562) behind a prefix that says what it names."""

import re
import secrets
import time


def new_id(prefix: str) -> str:
    """Such as ``job_`` and 32 hexadecimal digits.

    The twelve bits after the milliseconds count 4096ths of one (RFC 9562, method 3).
    """
    milliseconds, nanoseconds = divmod(time.time_ns(), 1_000_000)
    fraction = nanoseconds * 4096 // 1_000_000
    value = milliseconds << 80 | 7 << 76 | fraction << 64 | 2 << 62
    return f"{prefix}_{value | secrets.randbits(62):032x}"


def is_id(text: str, prefix: str) -> bool:
    """Text that is no id is not looked up: a database may choke on what else it holds."""
    return re.fullmatch(rf"{prefix}_[0-9a-f]{{32}}", text) is not None
