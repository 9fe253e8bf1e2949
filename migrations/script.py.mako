"""${message}

Revision: ${up_revision}, after ${down_revision | comma,n}. Made ${create_date}.

The previous release must go on working on the new schema while workers are replaced: add columns
as nullable or with a server default, fill them, and only then, a release later, make them strict.
"""

import sqlalchemy as sa
from alembic import op

from migrations import limit_waiting
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = None
depends_on = None


def upgrade() -> None:
    limit_waiting(lock="5s", statement="60s")
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    limit_waiting(lock="5s", statement="60s")
    ${downgrades if downgrades else "pass"}
