"""The wire types of quotas."""

from pydantic import BaseModel, Field


class Count(BaseModel):
    used: int
    allowed: int | None = Field(description="null: any number.")


class Minutes(BaseModel):
    used: float
    allowed: float | None = Field(description="null: any number.")
    window_days: int


class Quota(BaseModel):
    project: str
    queued: Count = Field(description="Jobs that wait.")
    running: Count = Field(description="More than allowed wait; they are not refused.")
    gpu_minutes: Minutes
    stored_bytes: Count = Field(description="Of datasets.")
    requests_per_minute: int | None = Field(
        description="Of the whole project. The headers RateLimit and RateLimit-Policy tell more."
    )
