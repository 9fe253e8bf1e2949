"""Clusters: projects and priorities, wake-ups in an outbox, workers, hand-over between machines.

The workers of 0001 go on while this is the schema: what they do not know has a default.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

from migrations import limit_waiting

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

Json = sa.JSON().with_variant(JSONB(), "postgresql")
Time = sa.DateTime(timezone=True)


def upgrade() -> None:
    limit_waiting(lock="5s", statement="60s")
    for column in (
        sa.Column("project", sa.String(), nullable=False, server_default="default"),
        sa.Column("priority", sa.Integer(), nullable=False, server_default="5"),
        sa.Column("available_at", Time),
        sa.Column("queue_deadline", Time),
        sa.Column("inputs", Json),
        sa.Column("checkpoint", Json),
        sa.Column("request_id", sa.String()),
        sa.Column("traceparent", sa.String()),
    ):
        op.add_column("jobs", column)
    op.create_index("ix_jobs_queue", "jobs", ["status", "project", "priority", "created_at", "id"])
    op.create_index("ix_jobs_project_started_at", "jobs", ["project", "started_at"])
    op.create_table(
        "outbox",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("due_at", Time, nullable=False),
        sa.Column("created_at", Time, nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_outbox_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox")),
    )
    op.create_index("ix_outbox_due_at", "outbox", ["due_at"])
    op.create_table(
        "workers",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("host", sa.String(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("slots", Json, nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("started_at", Time, nullable=False),
        sa.Column("heartbeat_at", Time, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_workers")),
    )


def downgrade() -> None:
    limit_waiting(lock="5s", statement="60s")
    op.drop_table("workers")
    op.drop_table("outbox")
    op.drop_index("ix_jobs_project_started_at", "jobs")
    op.drop_index("ix_jobs_queue", "jobs")
    with op.batch_alter_table("jobs") as jobs:
        for column in (
            "traceparent", "request_id", "checkpoint", "inputs", "queue_deadline", "available_at",
            "priority", "project",
        ):  # fmt: skip
            jobs.drop_column(column)
