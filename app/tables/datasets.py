"""Datasets, and those on their way in."""

import re
from datetime import datetime

from sqlalchemy import BigInteger, ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.tables.base import Owned, Table


class DatasetRow(Owned, Table):
    """An uploaded dataset; its bytes lie in the store under their hash, once."""

    __tablename__ = "datasets"
    __table_args__ = (
        UniqueConstraint("project", "sha256", "filename"),
        Index("ix_datasets_project_id", "project", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[str]
    filename: Mapped[str]
    size: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime]


class UploadRow(Owned, Table):
    """A dataset on its way in, part after part. The row goes when the dataset is there."""

    __tablename__ = "uploads"
    __table_args__ = (UniqueConstraint("project", "sha256"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[str]
    """Of the whole, as the client has announced it."""
    filename: Mapped[str]
    size: Mapped[int] = mapped_column(BigInteger)
    received: Mapped[int] = mapped_column(BigInteger)
    """Bytes from the beginning that are stored: where the next part goes."""
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime] = mapped_column(index=True)
    """When it last grew, or was asked for."""

    @property
    def folder(self) -> str:
        """In the store; the id makes it the only one, the rest is for who looks there."""
        project = re.sub(r"[^A-Za-z0-9_-]", "_", self.project)
        return f"{project}/{self.sha256}/{self.id}"


class UploadPartRow(Table):
    """A part that counts: of several for one place, the one whose row was written."""

    __tablename__ = "upload_parts"

    upload_id: Mapped[str] = mapped_column(
        ForeignKey("uploads.id", ondelete="CASCADE"), primary_key=True
    )
    start: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    size: Mapped[int] = mapped_column(BigInteger)
    name: Mapped[str]
    """In the upload's folder."""
