"""Redis: reached, new enough, persistent, evicting nothing, and writable with our name.

A message is only a hint, and what is lost is sent again; but until then jobs wait.
"""

import secrets
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from app.doctor.finding import Check, Finding, fail, ok, told, warn
from app.settings import Settings

OLDEST = (6, 2)
PATIENCE_SECONDS = 5
EXPECTED = "a Redis that answers"
MEND = "Check FLATLORA_BROKER_URL (host, port, password), and that the server runs."
PROBE_SECONDS = 60


def broker(settings: Settings) -> Iterator[Finding]:
    if not settings.is_cluster:
        yield ok("broker", "none is needed: the service is on this machine alone")
        return
    if urlsplit(settings.broker_url).scheme not in {"redis", "rediss", "unix"}:
        found = f"FLATLORA_BROKER_URL begins with {settings.broker_url.split(':')[0]}:"
        yield fail("broker", found, "redis:// or rediss://", "Use a Redis, or a Valkey.")
        return
    if find_spec("redis") is None or find_spec("celery") is None:
        found = "no client for Redis, or no Celery, is installed here"
        yield fail("broker", found, EXPECTED, "pip install flatlora-service[cluster]")
        return
    from redis import Redis
    from redis.backoff import NoBackoff
    from redis.exceptions import RedisError
    from redis.retry import Retry

    try:
        client = Redis.from_url(
            settings.broker_url,
            socket_timeout=PATIENCE_SECONDS,
            socket_connect_timeout=PATIENCE_SECONDS,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
        )
        with client:
            client.ping()
            yield from _server(client)
            yield _write(client)
    except (RedisError, OSError, ValueError) as error:
        yield fail("broker", told(error), EXPECTED, _mend(str(error)))


def _mend(error: str) -> str:
    if "WRONGPASS" in error or "NOAUTH" in error or "invalid username-password" in error:
        return "Correct the password: FLATLORA_BROKER_URL=redis://:<password>@host:6379/0"
    return MEND


def _server(client: Any) -> Iterator[Finding]:
    from redis.exceptions import RedisError

    try:
        info: dict[str, Any] = client.info()
    except RedisError as error:  # a hosted one, or an ACL
        mend = "See for yourself: version 6.2, appendonly yes, maxmemory-policy noeviction."
        yield warn("broker", f"answers, but INFO says {told(error)}", EXPECTED, mend)
        return
    version = str(info.get("valkey_version") or info["redis_version"])
    name = str(info.get("server_name", "redis"))
    expected = f"{OLDEST[0]}.{OLDEST[1]} or newer"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        yield fail("broker", f"{name} {version}", expected, "Upgrade the server.")
    else:
        yield ok("broker", f"{name} {version}", expected)
    yield _persistence(info)
    yield _eviction(info)


def _persistence(info: dict[str, Any]) -> Finding:
    expected = "appendonly yes: wake-ups survive its restart"
    if info.get("aof_enabled"):
        if info.get("aof_last_write_status", "ok") != "ok":
            mend = "See its log, and the disk that it writes to."
            return fail("redis persistence", "appendonly yes, but writing fails", expected, mend)
        return ok("redis persistence", "appendonly yes", expected)
    mend = "Set `appendonly yes` in redis.conf, or: redis-cli CONFIG SET appendonly yes"
    return warn("redis persistence", "appendonly no", expected, mend)


def _eviction(info: dict[str, Any]) -> Finding:
    policy, expected = str(info.get("maxmemory_policy", "unknown")), "noeviction"
    if policy == expected:
        return ok("redis eviction", f"maxmemory-policy {policy}", expected)
    mend = "Set `maxmemory-policy noeviction`: else it throws wake-ups away when it is full."
    return warn("redis eviction", f"maxmemory-policy {policy}", expected, mend)


def _write(client: Any) -> Finding:
    """As Celery does: put into a list, take out of it."""
    from redis.exceptions import RedisError

    from app.broker import QUEUE

    key, expected = f"{QUEUE}.doctor.{secrets.token_hex(8)}", f"lists below {QUEUE} can be written"
    try:
        client.rpush(key, "probe")
        client.expire(key, PROBE_SECONDS)
        taken = client.lpop(key)
    except RedisError as error:
        mend = (
            "Check its memory and disk, that it is no replica, and its ACL: the user needs "
            "+@all on the keys flatlora* _kombu* unacked*."
        )
        return fail("redis writes", told(error), expected, mend)
    if taken != "probe":
        return fail("redis writes", f"put 'probe', took {taken!r}", expected, "Use a Redis.")
    return ok("redis writes", "a list was written and read", expected)


BROKER = Check("broker", broker, EXPECTED, MEND)
