"""Who asks, in which project, and how much they may do."""

import time
from dataclasses import dataclass
from enum import StrEnum

from app.tables import DEFAULT_PROJECT


class Role(StrEnum):
    """What a key may do in its project; each may also do what those before it may."""

    VIEWER = "viewer"
    """Read: jobs, datasets, adapters."""
    SUBMITTER = "submitter"
    """Write: submit, stop and delete jobs, upload datasets."""
    ADMIN = "admin"
    """Keys, the audit log, secrets of webhooks."""

    def includes(self, other: "Role") -> bool:
        order = list(Role)
        return order.index(self) >= order.index(other)


@dataclass(frozen=True)
class Principal:
    """Whoever sent a request.

    Attributes:
        project: The only one whose rows they see.
        role: In that project.
        actor: What the audit log calls them.
        key_id: Of their key; None for the operator, and for tokens of an identity provider.
        is_operator: They hold the service's own key, and may make keys of any project.
        expires_at: When they are nobody any more, by the clock of this machine (``time.time``).
    """

    project: str
    role: Role
    actor: str
    key_id: str | None = None
    is_operator: bool = False
    expires_at: float | None = None

    @property
    def is_expired(self) -> bool:
        return self.expires_at is not None and self.expires_at <= time.time()


OPERATOR = Principal(DEFAULT_PROJECT, Role.ADMIN, "operator", is_operator=True)
ANYBODY = Principal(DEFAULT_PROJECT, Role.ADMIN, "anybody", is_operator=True)
"""Where no key is asked for."""
