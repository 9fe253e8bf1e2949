"""One settings object. Every field is an environment variable with the prefix ``FLATLORA_``."""

import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import unquote, urlsplit

from pydantic import (
    Field,
    IPvAnyNetwork,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.devices import check_slot
from app.uris import Roots

HEARTBEATS_PER_LEASE = 3  # two may be late or lost before a worker counts as dead
LOOPBACK = ["127.0.0.1", "[::1]", "localhost"]
POSTGRES = re.compile(r"^postgres(ql)?(\+psycopg)?://")  # as hosts of databases write it

REMOTE_STORES = {"s3", "gs", "az"}
STORE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SIGNABLE = re.compile(r"az://[A-Za-z0-9._~+=/-]*")  # obstore signs paths as they are quoted
BUCKET = re.compile(r"(?:s3|gs|az)://[A-Za-z0-9*][A-Za-z0-9._*-]*(?:/[^/]+)*/?")
PROJECT_NAME = r"^[a-z0-9][a-z0-9_.-]{0,62}$"
GRANT = re.compile(rf"(.+)=({PROJECT_NAME.strip('^$')}):(viewer|submitter|admin)")


def split_list(value: object) -> object:
    """``a,b`` in the environment is a list of two."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def check_store_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme == "file":
        is_right = not parts.netloc and parts.path.startswith("/")
    else:
        is_right = parts.scheme in REMOTE_STORES and bool(STORE_NAME.fullmatch(parts.netloc))
    if not is_right or parts.query or parts.fragment:
        raise ValueError(
            "expected s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or "
            "file:///folder; credentials and endpoint come from the provider's own variables, "
            "such as AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL"
        )


def check_issuer_url(url: str) -> None:
    """Keys that anybody on the way could change would open the service to anybody."""
    parts = urlsplit(url)
    is_here = parts.hostname in {"localhost", "127.0.0.1", "::1"}
    if not parts.hostname or parts.scheme not in ({"http", "https"} if is_here else {"https"}):
        raise ValueError(f"expected https://…, or http:// on this machine; found {url!r}")


def _scheme(url: str) -> str:
    return url.partition(":")[0]


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="FLATLORA_", extra="forbid", frozen=True)

    data_dir: Path = Path("flatlora-data")
    """Database, artifacts, work folders of running jobs and the API key."""
    database_url: str = ""
    """Empty: SQLite in the data folder. ``postgresql+psycopg://…`` also works."""
    broker_url: str = ""
    """Empty: embedded, one machine. ``redis://…``: jobs wait for the workers of a cluster."""
    store_url: str = ""
    """Empty: the folder ``artifacts`` of the data folder. ``s3://bucket/prefix``, ``gs://…``,
    ``az://…`` or ``file:///folder`` otherwise."""
    store_public_endpoint: str = ""
    """Where clients reach the store, if not where the service does: goes into presigned URLs."""
    downloads: Literal["stream", "redirect"] = "stream"
    """Adapters' files come through the API, or by a redirect to a presigned URL of the store."""
    presign_seconds: Annotated[int, Field(ge=1, le=7 * 24 * 3600)] = 900
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8321
    auth: Literal["key", "none"] = "key"
    api_key: SecretStr | None = None
    """The key that clients send. Empty: one is made and kept in the data folder."""
    oidc_issuer: str = ""
    """An identity provider, whose tokens open the service too: ``https://login.example/realm``."""
    oidc_audience: str = Field("", validate_default=True)
    """What its tokens must be for."""
    oidc_project_claim: str = "flatlora_project"
    oidc_role_claim: str = "flatlora_role"
    """Claims of a token; ``realm_access.roles`` is one within another."""
    oidc_groups_claim: str = "groups"
    oidc_groups: Annotated[list[str], NoDecode] = Field(default_factory=list)
    """``group=project:role``, comma-separated; the group ``*`` is everybody."""
    trusted_proxies: Annotated[list[str], NoDecode] = Field(default_factory=lambda: ["127.0.0.1"])
    """Whose ``X-Forwarded-For`` is believed: addresses, networks, or ``*``."""
    allowed_hosts: Annotated[list[str], NoDecode] = Field(default_factory=list)
    """Names that a request's ``Host`` may have. Empty: those of the loopback where the service
    listens there, any name elsewhere."""

    dataset_roots: Annotated[list[Path], NoDecode] = Field(default_factory=lambda: [Path()])
    """Folders below which ``file:`` dataset URIs may point, though not into the data folder."""
    model_roots: Annotated[list[Path], NoDecode] = Field(default_factory=lambda: [Path()])
    """Folders below which ``file:`` base models may point."""
    hub_models: Annotated[list[str], NoDecode] = Field(default_factory=lambda: ["*"])
    """Hub ids that jobs may name; ``*`` matches any run of characters."""

    hub_datasets: Annotated[list[str], NoDecode] = Field(default_factory=lambda: ["*"])
    """Datasets of the hub that jobs may name, as ``org/name``; ``*`` as above."""
    dataset_buckets: Annotated[list[str], NoDecode] = Field(default_factory=list)
    """Where ``s3:``, ``gs:`` and ``az:`` datasets may lie: ``s3://bucket`` or
    ``s3://bucket/prefix``; ``*`` matches any run of characters but a slash. Empty: nowhere."""
    allowed_networks: Annotated[list[IPvAnyNetwork], NoDecode] = Field(default_factory=list)
    """Networks such as ``10.1.0.0/16`` that count as public for ``https:`` datasets and webhooks.
    All other private addresses are refused."""
    allowed_ports: Annotated[list[Annotated[int, Field(ge=1, le=65535)]], NoDecode] = Field(
        default_factory=list
    )
    """Ports that these may be on beside 443, and 80 where ``http:`` is allowed."""
    allow_http: bool = False
    """``http:`` URLs are taken too: for private networks, as anybody in between reads them."""
    webhook_seconds: PositiveFloat = 1
    """How often events are looked for that webhooks are to be told."""
    secret_key: Annotated[SecretStr, Field(min_length=32)] | None = None
    """What the secrets of webhooks are sealed with in the database: a long random string."""

    max_body_bytes: PositiveInt = 1 << 20
    max_dataset_bytes: PositiveInt = 4 << 30
    dataset_seconds: PositiveFloat = 3600
    """How long the worker may take to fetch one dataset from elsewhere."""
    max_model_bytes: PositiveInt = 500 << 30
    """What the worker may fetch of one base model of the hub."""
    model_seconds: PositiveFloat = 6 * 3600
    """How long it may take for that."""
    max_part_bytes: PositiveInt = 64 << 20
    """Of a dataset that comes in several requests, what one of them may bring."""

    requests_per_minute: NonNegativeInt = 12_000
    """Of one project; 0: any number. The operator's key is not limited."""
    key_requests_per_minute: NonNegativeInt = 6_000
    """Of one key, or of one user of the identity provider; 0: any number."""
    failed_keys_per_minute: NonNegativeInt = 60
    """Wrong keys from one address; 0: any number."""
    max_queued_jobs: NonNegativeInt | None = None
    """Of one project, as those that follow. Empty: any number."""
    max_running_jobs: NonNegativeInt | None = None
    gpu_minutes: NonNegativeFloat | None = None
    """In 30 days."""
    max_stored_bytes: NonNegativeInt | None = None
    """Of datasets."""

    lease_seconds: PositiveFloat = 60
    heartbeat_seconds: PositiveFloat = 10
    poll_seconds: PositiveFloat = 0.5
    """How often an idle dispatcher looks for a queued job."""
    cancel_grace_seconds: PositiveFloat = 30
    """How long a trainer may take to stop before it is killed."""
    drain_grace_seconds: PositiveFloat = 120
    """How long a trainer may take to write its last checkpoint when the service stops."""
    max_attempts: PositiveInt = 3
    retry_seconds: NonNegativeFloat = 10
    """How long a job waits after its trainer has died; doubled after each further death, to
    an hour at most."""
    stall_seconds: PositiveFloat = 1800
    """A trainer that has said nothing for so long is killed, and its job is tried again."""
    relay_seconds: PositiveFloat = 2
    """How often wake-ups are looked for that could not be sent at once."""
    sweep_seconds: PositiveFloat = 30
    """How often a worker with an idle slot looks for queued jobs whose wake-up was lost."""

    devices: Annotated[list[str], NoDecode] = Field(default_factory=list)
    """What the slots of a worker train on: ``0,1`` are two slots of a GPU each, ``0+1,2`` one of
    two GPUs and one of one, and ``cpu`` may be repeated. Empty: each GPU of the machine, or one
    ``cpu``. The embedded worker has one slot, of all of them."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Where a worker serves its Prometheus metrics; 0: nowhere."""
    commit: str = ""
    """Of the code, where whoever built it has noted that: only shown."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "json", "console"] = "auto"
    """``auto``: colours on a terminal, else a JSON object a line."""
    trainer_module: str = "worker.trainer"
    """The module that is run as the trainer process, for trainers of your own."""

    keep_jobs_days: PositiveFloat | None = None
    """Finished jobs older than this are removed with their adapters. Empty: they are kept."""
    keep_idempotency_days: PositiveFloat = 7
    keep_unreferenced_hours: Annotated[float, Field(ge=1)] = 24
    """How long a stored file that no job and no dataset names is left alone."""
    cleaning_seconds: PositiveFloat = 3600
    """How often a worker removes what the settings above no longer keep."""

    @field_validator("store_url", mode="after")
    @classmethod
    def _name_a_store(cls, url: str) -> str:
        if url:
            check_store_url(url)
        return url

    @field_validator("store_public_endpoint", mode="after")
    @classmethod
    def _be_an_address(cls, endpoint: str) -> str:
        if endpoint and not re.fullmatch(r"https?://[^/?#]+[^?#]*", endpoint):
            raise ValueError("expected a URL such as https://storage.example.org")
        return endpoint

    @field_validator("downloads", mode="after")
    @classmethod
    def _need_signatures(cls, downloads: str, info: ValidationInfo) -> str:
        url = info.data.get("store_url", "s3://")  # one that is wrong is told by itself
        if downloads == "redirect" and _scheme(url) not in REMOTE_STORES:
            raise ValueError(
                "a client can be sent only to a store that signs URLs: set FLATLORA_STORE_URL to "
                f"s3://…, gs://… or az://…; found {url or 'none, which is a local folder'!r}"
            )
        if downloads == "redirect" and _scheme(url) == "az" and not SIGNABLE.fullmatch(url):
            raise ValueError(
                "Azure refuses URLs that are signed for a prefix with other signs than letters, "
                f"digits and ._~+=-: found {url!r}; name another, or set stream"
            )
        return downloads

    split_lists = field_validator(
        "dataset_roots", "model_roots", "hub_models", "hub_datasets", "dataset_buckets",
        "allowed_networks", "allowed_ports", "allowed_hosts", "devices", "oidc_groups",
        "trusted_proxies", mode="before",
    )(split_list)  # fmt: skip

    @field_validator("dataset_buckets", mode="after")
    @classmethod
    def _be_buckets(cls, buckets: list[str]) -> list[str]:
        for bucket in buckets:
            if not BUCKET.fullmatch(bucket):
                raise ValueError(
                    f"expected s3://bucket or s3://bucket/prefix, gs://… or az://…; found {bucket}"
                )
        return buckets

    @field_validator("oidc_issuer", mode="after")
    @classmethod
    def _be_an_issuer(cls, issuer: str) -> str:
        if issuer:
            check_issuer_url(issuer)
        return issuer

    @field_validator("oidc_audience", mode="after")
    @classmethod
    def _need_an_audience(cls, audience: str, info: ValidationInfo) -> str:
        if info.data.get("oidc_issuer") and not audience:
            raise ValueError(
                "tokens that the issuer made for another service must not open this one: "
                "set it to what its tokens carry as aud"
            )
        return audience

    @field_validator("oidc_groups", mode="after")
    @classmethod
    def _be_grants(cls, grants: list[str]) -> list[str]:
        for grant in grants:
            if not GRANT.fullmatch(grant):
                raise ValueError(
                    f"expected group=project:role, the role one of viewer, submitter, admin; "
                    f"found {grant!r}"
                )
        return grants

    @field_validator("devices", mode="after")
    @classmethod
    def _be_slots(cls, devices: list[str]) -> list[str]:
        for device in devices:
            check_slot(device)
        return devices

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

    @field_validator("broker_url", mode="after")
    @classmethod
    def _need_a_server(cls, broker: str, info: ValidationInfo) -> str:
        if broker and not broker.startswith(("redis://", "rediss://")):
            raise ValueError(f"expected redis://… or rediss://…; found {broker.partition(':')[0]}:")
        database = info.data.get("database_url", "")
        if broker and not POSTGRES.match(database):
            raise ValueError(
                "workers of a cluster share a Postgres database: set FLATLORA_DATABASE_URL to "
                f"postgresql://…; found {database or 'none, which is SQLite'!r}"
            )
        return broker

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
    def answer_seconds(self) -> float:
        """A worker whose database is silent asks again, and is heard before its lease is over."""
        return self.lease_seconds / 6

    @property
    def is_cluster(self) -> bool:
        """Several machines may work on one database, and a broker wakes them."""
        return bool(self.broker_url)

    @property
    def artifacts_dir(self) -> Path:
        return self.data_dir / "artifacts"

    @property
    def store_folder(self) -> Path | None:
        """Where the store is a folder."""
        if not self.store_url:
            return self.artifacts_dir
        parts = urlsplit(self.store_url)
        return Path(unquote(parts.path)) if parts.scheme == "file" else None

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
    def slots_dir(self) -> Path:
        """A lock for each slot of a worker, held by the process that works in it."""
        return self.data_dir / "slots"

    @property
    def alive_file(self) -> Path:
        """Touched by a worker that turns, for health checks on its machine."""
        return self.data_dir / "worker.alive"

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
