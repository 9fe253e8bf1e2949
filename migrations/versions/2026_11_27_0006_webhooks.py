"""Webhooks: how far a job's events have been told, deliveries, and what they are signed with.

Jobs of before have no webhook. The workers of 0004 go on: they write events as ever.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

from migrations import limit_waiting

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

Json = sa.JSON().with_variant(JSONB(), "postgresql")
Time = sa.DateTime(timezone=True)
TOLD = sa.text("webhook_seq IS NOT NULL")
DUE = sa.text("due_at IS NOT NULL")


def project() -> sa.Column[str]:
    return sa.Column("project", sa.String(), nullable=False, server_default="default")


def upgrade() -> None:
    limit_waiting(lock="5s", statement="60s")
    op.add_column("jobs", sa.Column("webhook_seq", sa.Integer()))
    op.create_index(
        "ix_jobs_webhooks",
        "jobs",
        ["status", "fence", "webhook_seq", "id"],
        postgresql_where=TOLD,
        sqlite_where=TOLD,
    )
    op.create_table(
        "webhook_deliveries",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        project(),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("type", sa.String(), nullable=False),
        sa.Column("url", sa.String(), nullable=False),
        sa.Column("host", sa.String(), nullable=False),
        sa.Column("body", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("attempts", Json, nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("due_at", Time),
        sa.Column("give_up_at", Time, nullable=False),
        sa.Column("claims", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("leased_until", Time),
        sa.Column("created_at", Time, nullable=False),
        sa.CheckConstraint(
            "state IN ('pending', 'delivered', 'failed')",
            name=op.f("ck_webhook_deliveries_state"),
        ),
        sa.ForeignKeyConstraint(
            ["job_id"],
            ["jobs.id"],
            name=op.f("fk_webhook_deliveries_job_id_jobs"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("job_id", "seq", name=op.f("pk_webhook_deliveries")),
        sa.UniqueConstraint("id", name=op.f("uq_webhook_deliveries_id")),
    )
    op.create_index(
        "ix_webhook_deliveries_due_at",
        "webhook_deliveries",
        ["due_at"],
        postgresql_where=DUE,
        sqlite_where=DUE,
    )
    op.create_table(
        "webhook_secrets",
        project(),
        sa.Column("secret", sa.String(), nullable=False),
        sa.Column("created_at", Time, nullable=False),
        sa.Column("previous", sa.String()),
        sa.Column("previous_until", Time),
        sa.PrimaryKeyConstraint("project", name=op.f("pk_webhook_secrets")),
    )


def downgrade() -> None:
    limit_waiting(lock="5s", statement="60s")
    op.drop_table("webhook_secrets")
    op.drop_table("webhook_deliveries")
    op.drop_index("ix_jobs_webhooks", "jobs")
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_column("webhook_seq")
