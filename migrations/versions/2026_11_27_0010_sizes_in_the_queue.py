"""The queue's index knows how many GPUs a job needs.

A small slot then passes over larger jobs within the index, and does not read the row of each.
"""

from alembic import op

from migrations import limit_waiting

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

ORDER = ["status", "project", "priority", "created_at", "id"]


def upgrade() -> None:
    limit_waiting(lock="5s", statement="60s")
    op.drop_index("ix_jobs_queue", "jobs")
    op.create_index("ix_jobs_queue", "jobs", [*ORDER, "gpus"])


def downgrade() -> None:
    limit_waiting(lock="5s", statement="60s")
    op.drop_index("ix_jobs_queue", "jobs")
    op.create_index("ix_jobs_queue", "jobs", ORDER)
