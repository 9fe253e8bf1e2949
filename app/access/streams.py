"""For answers and uploads that take long: whoever began them may have lost the right meanwhile."""

import time
from collections.abc import AsyncIterator
from typing import TypeVar

from fastapi import Request

from app.access.authenticator import Authenticator
from app.errors import Unauthenticated

Part = TypeVar("Part")

CHECK_SECONDS = 1


async def still_allowed(request: Request) -> bool:
    """Whether the key that began this request is one still; cheap enough for every turn of a loop.

    Asked at least every two seconds, it ends what it guards within five of a revocation.
    """
    authenticator: Authenticator = request.state.authenticator
    return await authenticator.is_still(request.state.principal)


async def while_allowed(request: Request, parts: AsyncIterator[Part]) -> AsyncIterator[Part]:
    """The same parts, for as long as that is so.

    Raises:
        Unauthenticated: In the middle, when it is so no longer.
    """
    checked = time.monotonic()
    async for part in parts:
        if time.monotonic() - checked > CHECK_SECONDS:
            if not await still_allowed(request):
                raise Unauthenticated(
                    "The key was revoked, or has expired, while this request was under way.",
                    "Send it again with a key that is valid.",
                )
            checked = time.monotonic()
        yield part
