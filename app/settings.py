"""One settings object. Every field is an environment variable with the prefix ``FLATLORA_``."""

import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.uris import Roots

HEARTBEATS_PER_LEASE = 3  # two may be late or lost before a worker counts as dead
LOOPBACK = ["127.0.0.1", "[::1]", "localhost"]
POSTGRES = re.compile(r"^postgres(ql)?://")  # as hosts of databases write it: without a driver


def split_list(value: object) -> object:
    """``a,b`` in the environment is a list of two."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="FLATLORA_", extra="forbid", frozen=True)

    data_dir: Path = Path("flatlora-data")
    """Database, artifacts, work folders of running jobs and the API key."""
    database_url: str = ""
    """Empty: SQLite in the data folder. ``postgresql+psycopg://…`` also works."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8321
    auth: Literal["key", "none"] = "key"
    allowed_hosts: Annotated[list[str], NoDecode] = Field(default_factory=list)
    """Names that a request's ``Host`` may have. Empty: those of the loopback where the service
    listens there, any name elsewhere."""

    dataset_roots: Annotated[list[Path], NoDecode] = Field(default_factory=lambda: [Path()])
    """Folders below which ``file:`` dataset URIs may point, though not into the data folder."""
    model_roots: Annotated[list[Path], NoDecode] = Field(default_factory=lambda: [Path()])
    """Folders below which ``file:`` base models may point."""
    hub_models: Annotated[list[str], NoDecode] = Field(default_factory=lambda: ["*"])
    """Hub ids that jobs may name; ``*`` matches any run of characters."""

    max_body_bytes: PositiveInt = 1 << 20
    max_dataset_bytes: PositiveInt = 4 << 30

    lease_seconds: PositiveFloat = 60
    heartbeat_seconds: PositiveFloat = 10
    poll_seconds: PositiveFloat = 0.5
    """How often an idle dispatcher looks for a queued job."""
    cancel_grace_seconds: PositiveFloat = 30
    """How long a trainer may take to stop before it is killed."""
    drain_grace_seconds: PositiveFloat = 120
    """How long a trainer may take to write its last checkpoint when the service stops."""
    max_attempts: PositiveInt = 3

    split_lists = field_validator(
        "dataset_roots", "model_roots", "hub_models", "allowed_hosts", mode="before"
    )(split_list)

    @field_validator("data_dir", mode="after")
    @classmethod
    def _resolve_folder(cls, folder: Path) -> Path:
        return folder.expanduser().resolve()

    @field_validator("dataset_roots", "model_roots", mode="after")
    @classmethod
    def _resolve_roots(cls, roots: list[Path], info: ValidationInfo) -> list[Path]:
        folders = [root.expanduser().resolve() for root in roots]
        # No data folder: that setting is wrong itself, and nothing will be served.
        return Roots(folders, info.data["data_dir"]) if "data_dir" in info.data else folders

    @field_validator("heartbeat_seconds", mode="after")
    @classmethod
    def _fit_the_lease(cls, heartbeat: float, info: ValidationInfo) -> float:
        needed = round(heartbeat * HEARTBEATS_PER_LEASE, 6)
        lease = info.data.get("lease_seconds", needed)
        if needed > lease:
            raise ValueError(
                f"found {heartbeat:g}, expected at most a third of FLATLORA_LEASE_SECONDS "
                f"({lease:g}): a job is taken away from a worker that is silent for that long"
            )
        return heartbeat

    @property
    def database(self) -> str:
        url = self.database_url or f"sqlite:///{self.data_dir / 'flatlora.db'}"
        return POSTGRES.sub("postgresql+psycopg://", url)

    @property
    def artifacts_dir(self) -> Path:
        return self.data_dir / "artifacts"

    @property
    def work_dir(self) -> Path:
        return self.data_dir / "work"

    @property
    def key_file(self) -> Path:
        return self.data_dir / "api_key"

    @property
    def url_file(self) -> Path:
        """Where the service that runs on this folder can be reached."""
        return self.data_dir / "url"

    @property
    def max_upload_bytes(self) -> int:
        """A dataset and what a form puts around it."""
        return self.max_dataset_bytes + (1 << 16)

    @property
    def uploads_dir(self) -> Path:
        return self.data_dir / "uploads"

    @property
    def hosts(self) -> list[str]:
        """Names that the service answers to; none: to any."""
        if self.allowed_hosts or self._url_host not in LOOPBACK:
            return self.allowed_hosts
        return LOOPBACK

    @property
    def base_url(self) -> str:
        return f"http://{self._url_host}:{self.port}"

    @property
    def _url_host(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


@lru_cache
def get_settings() -> Settings:
    return Settings()
