"""Hashes that a client sends along, so that what arrives can be compared (RFC 9530)."""

import base64
import binascii
import re
from collections.abc import Collection

from starlette.datastructures import Headers

from app.errors import HashMismatch, InvalidRequest
from app.faults import Fault

CONTENT, WHOLE = "content-digest", "repr-digest"
SHA256 = re.compile(r"(?:^|,)\s*sha-256\s*=\s*([^,;]*)")


def announced(headers: Headers, *fields: str) -> set[str]:
    """The SHA-256 that these fields name. Other algorithms are passed over, as the RFC says."""
    return {
        _read(field, value)
        for field in fields
        for header in headers.getlist(field)
        for value in SHA256.findall(header)
    }


def compare(found: str, expected: Collection[str]) -> None:
    """Raises ``HashMismatch``."""
    for sha256 in expected:
        if sha256 != found:
            raise HashMismatch(
                f"What has arrived has the SHA-256 {found}; announced was {sha256}.",
                "Send it again. If that does not help, the file has changed since it was hashed.",
            )


def _read(field: str, value: str) -> str:
    text = value.strip()
    try:
        if not (len(text) > 1 and text[0] == text[-1] == ":"):
            raise ValueError(text)
        digest = base64.b64decode(text[1:-1], validate=True)
        if len(digest) != 32:
            raise ValueError(text)
    except (ValueError, binascii.Error) as error:
        raise malformed(field, f"{text!r} is no SHA-256 as sha-256=:<base64>:") from error
    return digest.hex()


def malformed(field: str, detail: str) -> InvalidRequest:
    return InvalidRequest(
        f"The header {field.title()} cannot be checked: {detail}.",
        "Write sha-256=:<base64 of the 32 bytes>:, or leave it out.",
        faults=[Fault(pointer=field, detail=detail, code="digest_malformed")],
    )
