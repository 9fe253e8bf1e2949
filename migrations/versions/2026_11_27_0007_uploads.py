"""Uploads that come in parts, and an index of the jobs that have an adapter.

The code of 0003 goes on while this is the schema, and knows of none of it.
"""

import sqlalchemy as sa
from alembic import op

from migrations import limit_waiting

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

Time = sa.DateTime(timezone=True)
# A dry run has left the JSON null there, which is not NULL.
HAS_ADAPTER = sa.text("CAST(adapter AS VARCHAR) <> 'null'")


def upgrade() -> None:
    limit_waiting(lock="5s", statement="60s")
    op.create_table(
        "uploads",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project", sa.String(), nullable=False, server_default="default"),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("filename", sa.String(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("received", sa.BigInteger(), nullable=False),
        sa.Column("created_at", Time, nullable=False),
        sa.Column("updated_at", Time, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_uploads")),
        sa.UniqueConstraint("project", "sha256", name=op.f("uq_uploads_project_sha256")),
    )
    op.create_index("ix_uploads_updated_at", "uploads", ["updated_at"])
    op.create_table(
        "upload_parts",
        sa.Column("upload_id", sa.String(), nullable=False),
        sa.Column("start", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["upload_id"],
            ["uploads.id"],
            name=op.f("fk_upload_parts_upload_id_uploads"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("upload_id", "start", name=op.f("pk_upload_parts")),
    )
    op.create_index(
        "ix_jobs_adapters",
        "jobs",
        ["project", "finished_at", "id"],
        postgresql_where=HAS_ADAPTER,
        sqlite_where=HAS_ADAPTER,
    )


def downgrade() -> None:
    limit_waiting(lock="5s", statement="60s")
    op.drop_index("ix_jobs_adapters", "jobs")
    op.drop_table("upload_parts")
    op.drop_table("uploads")
