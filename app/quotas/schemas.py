"""The wire types of quotas."""

from pydantic import BaseModel, Field


class QuotaCount(BaseModel):
    used: int
    allowed: int | None = Field(description="null: any number.")


class QuotaMinutes(BaseModel):
    used: float
    allowed: float | None = Field(description="null: any number.")
    window_days: int


class Quota(BaseModel):
    project: str
    queued: QuotaCount = Field(description="Jobs that wait.")
    running: QuotaCount = Field(description="More than allowed wait; they are not refused.")
    gpu_minutes: QuotaMinutes
    stored_bytes: QuotaCount = Field(description="Of datasets.")
    requests_per_minute: int | None = Field(
        description="Of the whole project. The headers RateLimit and RateLimit-Policy tell more."
    )
