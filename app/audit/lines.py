"""The line that a change leaves in the audit log."""

from sqlalchemy import insert

from app.db import now
from app.tables import AuditRow

# Built once and run without the ORM: every change waits for it.
AUDIT_LINE = insert(AuditRow).values(at=now())

ASKED = "asked"
"""Where a writing session carries who asks for what (``actor, action, request_id``).

Who writes the line with the change itself takes it; else it is written at the end of the request.
"""
