"""Access: keys with projects and roles, who changed what, datasets and idempotency by project.

The API of 0003 goes on while this is the schema: what it writes belongs to the default project.
"""

import sqlalchemy as sa
from alembic import op

from migrations import limit_waiting

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

Time = sa.DateTime(timezone=True)
BigId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def project() -> sa.Column[str]:
    return sa.Column("project", sa.String(), nullable=False, server_default="default")


def upgrade() -> None:
    limit_waiting(lock="5s", statement="60s")
    op.create_index(
        "ix_jobs_project_status_created_at_id", "jobs", ["project", "status", "created_at", "id"]
    )
    op.create_index("ix_jobs_project_created_at_id", "jobs", ["project", "created_at", "id"])
    op.drop_index("ix_jobs_created_at_id", "jobs")
    with op.batch_alter_table("datasets") as datasets:
        datasets.add_column(project())
        datasets.drop_constraint("uq_datasets_sha256_filename", type_="unique")
        datasets.create_unique_constraint(
            "uq_datasets_project_sha256_filename", ["project", "sha256", "filename"]
        )
    op.create_index("ix_datasets_project_id", "datasets", ["project", "id"])
    with op.batch_alter_table("idempotency_keys") as keys:
        keys.add_column(project())
        keys.drop_constraint("pk_idempotency_keys", type_="primary")
        keys.create_primary_key("pk_idempotency_keys", ["project", "key"])
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(), nullable=False),
        project(),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("created_at", Time, nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("expires_at", Time),
        sa.Column("last_used_at", Time),
        sa.Column("revoked_at", Time),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
    )
    op.create_table(
        "audit_events",
        sa.Column("id", BigId, autoincrement=True, nullable=False),
        project(),
        sa.Column("at", Time, nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("object", sa.String(), nullable=False),
        sa.Column("request_id", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_events")),
    )
    op.create_index("ix_audit_events_project_id", "audit_events", ["project", "id"])


def downgrade() -> None:
    """Of several projects only the default one is left what it had; the others' rows go."""
    limit_waiting(lock="5s", statement="60s")
    op.drop_table("audit_events")
    op.drop_table("api_keys")
    op.execute("DELETE FROM idempotency_keys WHERE project <> 'default'")
    with op.batch_alter_table("idempotency_keys") as keys:
        keys.drop_constraint("pk_idempotency_keys", type_="primary")
        keys.create_primary_key("pk_idempotency_keys", ["key"])
        keys.drop_column("project")
    op.execute("DELETE FROM datasets WHERE project <> 'default'")
    op.drop_index("ix_datasets_project_id", "datasets")
    with op.batch_alter_table("datasets") as datasets:
        datasets.drop_constraint("uq_datasets_project_sha256_filename", type_="unique")
        datasets.create_unique_constraint("uq_datasets_sha256_filename", ["sha256", "filename"])
        datasets.drop_column("project")
    op.create_index("ix_jobs_created_at_id", "jobs", ["created_at", "id"])
    op.drop_index("ix_jobs_project_created_at_id", "jobs")
    op.drop_index("ix_jobs_project_status_created_at_id", "jobs")
