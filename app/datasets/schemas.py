from datetime import datetime

from pydantic import BaseModel, Field

HASH = "^[0-9a-f]{64}$"


class Dataset(BaseModel):
    id: str
    uri: str = Field(description="What a job names it by: dataset:ds_…")
    filename: str
    size: int = Field(description="Bytes.")
    sha256: str
    created_at: datetime


class DatasetPage(BaseModel):
    items: list[Dataset]
    next: str | None = Field(description="Id to pass as `after` for the next page.")


class UploadState(BaseModel):
    """How far an upload has come."""

    sha256: str
    filename: str
    size: int = Field(description="Bytes, when it is complete.")
    offset: int = Field(description="Bytes that are here: the `Upload-Offset` of the next part.")
    part_size: int = Field(description="Bytes that one part may have.")
    dataset: Dataset | None = Field(description="When it is complete.")
    expires_at: datetime | None = Field(
        description="It is forgotten then, unless something arrives before."
    )
