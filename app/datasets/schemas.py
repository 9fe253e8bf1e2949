from datetime import datetime

from pydantic import BaseModel, Field


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
