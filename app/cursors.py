"""Where a page ends, of a list that is ordered by a moment and an id: opaque to clients."""

import base64
from contextlib import suppress
from datetime import UTC, datetime

from app.errors import InvalidRequest
from app.faults import Fault
from app.ids import is_id

Place = tuple[datetime, str]


def cursor_of(place: Place) -> str:
    moment, row_id = place
    text = f"{moment.isoformat()} {row_id}"
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def place_of(cursor: str, prefix: str) -> Place:
    """The place in the list that a cursor names; ``prefix`` is that of the ids there."""
    with suppress(ValueError, OverflowError):
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
        moment, _, row_id = text.partition(" ")
        at = datetime.fromisoformat(moment).astimezone(UTC)
        if is_id(row_id, prefix):
            return at, row_id
    raise InvalidRequest(
        f"{cursor!r} is not a cursor.",
        "Pass `next` of an earlier page as it is.",
        faults=[Fault(pointer="after", detail="not a cursor", code="cursor_malformed")],
    )
