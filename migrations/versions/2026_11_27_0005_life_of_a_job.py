"""The life of a job over HTTP: pauses, retries, and the trainer's log.

The workers of 0003 go on while this is the schema: they ship no log, and let a job that is to
pause run on.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

from migrations import limit_waiting

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

Json = sa.JSON().with_variant(JSONB(), "postgresql")
Time = sa.DateTime(timezone=True)
RETRIES = sa.text("retried_from IS NOT NULL")


def upgrade() -> None:
    limit_waiting(lock="5s", statement="60s")
    for column in (
        sa.Column("paused_at", Time),
        sa.Column("retried_from", sa.String()),
        sa.Column("logged", Json),
    ):
        op.add_column("jobs", column)
    op.create_index(
        "ix_jobs_retried_from",
        "jobs",
        ["retried_from"],
        postgresql_where=RETRIES,
        sqlite_where=RETRIES,
    )
    op.create_table(
        "job_logs",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("at", Time, nullable=False),
        sa.Column("text", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_job_logs_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "seq", name=op.f("pk_job_logs")),
    )


def downgrade() -> None:
    limit_waiting(lock="5s", statement="60s")
    op.drop_table("job_logs")
    op.drop_index("ix_jobs_retried_from", "jobs")
    with op.batch_alter_table("jobs") as jobs:
        for column in ("logged", "retried_from", "paused_at"):
            jobs.drop_column(column)
