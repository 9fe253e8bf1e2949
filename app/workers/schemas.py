from datetime import datetime
from typing import Literal

from pydantic import BaseModel, Field


class Slot(BaseModel):
    name: str
    device: str | None = Field(description="A GPU's number, or cpu.")
    job_id: str | None = Field(description="The job that it runs.")


class Worker(BaseModel):
    name: str
    host: str
    pid: int
    version: str
    state: Literal["active", "draining", "lost"] = Field(
        description="lost: not heard of for longer than a lease."
    )
    slots: list[Slot]
    started_at: datetime
    heartbeat_at: datetime


class WorkerList(BaseModel):
    items: list[Worker]
