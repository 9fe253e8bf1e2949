"""What the webhooks of a project are signed with: ``whsec_…``, made when it is first needed.

A secret must be readable to sign, so it is kept, not hashed. With ``FLATLORA_SECRET_KEY`` the
database holds it sealed (Fernet: AES-128 and an HMAC, under a key derived by HKDF); without, as it
is, and whoever reads the database can sign. One that was kept before the setting came stays as it
is until it is rotated.
"""

import base64
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr
from sqlalchemy import Insert, Select, Update, select, update
from sqlalchemy.dialects import postgresql, sqlite
from standardwebhooks import Webhook

from app.db import now
from app.tables import WebhookSecretRow

if TYPE_CHECKING:
    from cryptography.fernet import Fernet

OVERLAP_SECONDS = 24 * 3600
"""How long the secret before signs too, after it was rotated."""
PREFIX, SEALED = "whsec_", "fernet:"
BYTES = 32


class SecretUnreadable(Exception):
    """It was sealed with another FLATLORA_SECRET_KEY than this service has."""


def make_secret() -> str:
    return PREFIX + base64.b64encode(secrets.token_bytes(BYTES)).decode()


class Vault:
    """Seals secrets for the database, and opens them."""

    def __init__(self, key: SecretStr | None) -> None:
        self._key = key

    def seal(self, secret: str) -> str:
        if self._key is None:
            return secret
        return SEALED + _fernet(self._key).encrypt(secret.encode()).decode()

    def open(self, kept: str) -> str:
        """Raises ``SecretUnreadable``."""
        if not kept.startswith(SEALED):
            return kept
        from cryptography.fernet import InvalidToken  # nobody loads it who seals nothing

        if self._key is None:
            raise SecretUnreadable("it is sealed, and FLATLORA_SECRET_KEY is not set")
        try:
            return _fernet(self._key).decrypt(kept.removeprefix(SEALED)).decode()
        except InvalidToken:
            raise SecretUnreadable("it was sealed with another FLATLORA_SECRET_KEY") from None

    def signers(self, row: WebhookSecretRow) -> Sequence[Webhook]:
        """Who signs now: the secret, and for a day the one before. Raises ``SecretUnreadable``."""
        kept = [row.secret]
        if row.previous and row.previous_until and row.previous_until > datetime.now(UTC):
            kept.append(row.previous)
        return [Webhook(self.open(secret)) for secret in kept]


def _fernet(key: SecretStr) -> "Fernet":
    from cryptography.fernet import Fernet
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    derive = HKDF(SHA256(), length=32, salt=None, info=b"flatlora webhook secrets")
    return Fernet(base64.urlsafe_b64encode(derive.derive(key.get_secret_value().encode())))


def signed(
    signers: Sequence[Webhook], message_id: str, body: str, moment: datetime
) -> Mapping[str, str]:
    """The headers of the specification. ``moment`` is in UTC."""
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(moment.timestamp())),
        "webhook-signature": " ".join(
            signer.sign(msg_id=message_id, timestamp=moment, data=body) for signer in signers
        ),
    }


def secret_of(project: str | None = None) -> Select[Any]:
    """``project``: where the session does not give it."""
    statement = select(WebhookSecretRow).execution_options(populate_existing=True)
    return statement.where(WebhookSecretRow.project == project) if project else statement


def adding(dialect: str, sealed: str, **values: Any) -> Insert:
    """The statement that adds a secret, unless another was quicker."""
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    statement = insert(WebhookSecretRow).values(secret=sealed, created_at=now(), **values)
    return statement.on_conflict_do_nothing(index_elements=[WebhookSecretRow.project])


def rotating(sealed: str, *, keep_previous: bool) -> Update:
    """The statement that puts another in its place."""
    return update(WebhookSecretRow).values(
        secret=sealed,
        created_at=now(),
        previous=WebhookSecretRow.secret if keep_previous else None,
        previous_until=now(OVERLAP_SECONDS) if keep_previous else None,
    )
