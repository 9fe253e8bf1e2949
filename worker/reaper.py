"""Jobs whose worker is gone, and jobs that have waited for too long."""

import time

import structlog

from worker.claims import Claims
from worker.metrics import lease_expired

log = structlog.get_logger()


class Reaper:
    """Puts jobs back whose lease has run out, but not while everybody's heartbeat may have failed.

    After an outage of the database every lease is over and no worker is to blame. So when the
    database has been out of sight, also before this process was there, the workers get the time of
    a lease to be heard again.
    """

    def __init__(self, claims: Claims, *, every_seconds: float, lease_seconds: float) -> None:
        self._claims = claims
        self._longest_gap = 3 * every_seconds
        self._lease_seconds = lease_seconds
        self._seen_at = float("-inf")
        self._patient_until = 0.0

    def reap(self) -> int:
        """How many jobs were put back or failed."""
        started = time.monotonic()
        expired = self._claims.expire()
        if time.monotonic() - self._seen_at > self._longest_gap:
            self._patient_until = time.monotonic() + self._lease_seconds
        self._seen_at = time.monotonic()
        if started < self._patient_until:
            return expired
        reaped = self._claims.reap()
        lease_expired(reaped)
        if reaped:
            log.warning("leases ran out", jobs=reaped)
        return reaped + expired
