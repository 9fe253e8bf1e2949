"""Jobs of several GPUs: how many of one slot a job needs, and a way to find those that need many.

The workers of 0002 go on while this is the schema, and do not look at the column: they take a job
of several GPUs too, and train it on one.
"""

import sqlalchemy as sa
from alembic import op

from migrations import limit_waiting

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

SEVERAL = sa.text("gpus > 1")


def upgrade() -> None:
    limit_waiting(lock="5s", statement="60s")
    op.add_column("jobs", sa.Column("gpus", sa.Integer(), nullable=False, server_default="1"))
    op.create_index(
        "ix_jobs_several_gpus",
        "jobs",
        ["status", "project", "priority", "created_at", "id"],
        postgresql_where=SEVERAL,
        sqlite_where=SEVERAL,
    )


def downgrade() -> None:
    limit_waiting(lock="5s", statement="60s")
    op.drop_index("ix_jobs_several_gpus", "jobs")
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_column("gpus")
