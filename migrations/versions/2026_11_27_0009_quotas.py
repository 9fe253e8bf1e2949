"""Quotas: what projects may use, and what their deleted jobs have used."""

import sqlalchemy as sa
from alembic import op

from migrations import limit_waiting

revision = "0009"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    limit_waiting(lock="5s", statement="60s")
    op.create_table(
        "projects",
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("max_queued", sa.Integer()),
        sa.Column("max_running", sa.Integer()),
        sa.Column("gpu_minutes", sa.Double()),
        sa.Column("max_stored_bytes", sa.BigInteger()),
        sa.Column("requests_per_minute", sa.Integer()),
        sa.PrimaryKeyConstraint("project", name=op.f("pk_projects")),
    )
    op.create_table(
        "usage",
        sa.Column("project", sa.String(), nullable=False, server_default="default"),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("gpu_seconds", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_usage")),
    )
    op.create_index("ix_usage_project_ended_at", "usage", ["project", "ended_at"])
    op.create_index(
        "ix_jobs_project_finished_at_started_at", "jobs", ["project", "finished_at", "started_at"]
    )


def downgrade() -> None:
    limit_waiting(lock="5s", statement="60s")
    op.drop_index("ix_jobs_project_finished_at_started_at", "jobs")
    op.drop_table("usage")
    op.drop_table("projects")
