"""Between the trainer's messages and the job's row: gathered here, written about once a second."""

import threading
import time
from typing import Any

from sqlalchemy import Insert
from sqlalchemy.dialects import postgresql, sqlite

from app.jobs.events import event
from app.jobs.states import Phase, Status
from app.tables import MetricRow
from worker.claims import Claims
from worker.lease import Lease
from worker.log_tail import LogTail
from worker.pipe import Message


class Progress:
    """Takes messages from the thread that reads them; ``flush`` writes them from another."""

    def __init__(self, claims: Claims, lease: Lease, tail: LogTail | None = None) -> None:
        """``tail``: of the trainer's log, which is shipped along."""
        self._claims = claims
        self._lease = lease
        self._tail = tail
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._row: dict[str, Any] = {}
        self._metrics: list[dict[str, Any]] = []
        self._events: list[Insert] = []
        self._written_at = time.monotonic()
        self._runtime = lease.runtime
        self.heard_at = time.monotonic()
        """When the trainer last said anything."""

    def phase(self, phase: Phase) -> None:
        with self._lock:
            self._row["phase"] = phase

    def take(self, message: Message) -> None:
        with self._lock:
            self.heard_at = time.monotonic()
            match message["kind"]:
                case "phase":
                    self._row["phase"] = message["name"]
                case "rows":
                    self._row["progress"] = {"rows": message["done"], "of": message["total"]}
                case "preflight":
                    self._row["report"] = message["report"]
                    self._event("job.preflight", "The dataset was checked.", {})
                case "step":
                    self._step(message)
                case "held_out":
                    self._held_out(message)
                case "event":
                    self._event(message["type"], message["message"], message["data"])

    def flush(self) -> Status:
        """Extend the lease and write what has gathered. Raises ``LeaseLost``.

        When it returns, all that was taken before is in the database, also what another thread was
        about to write.
        """
        with self._flushing:
            return self._flush()

    def finish(self) -> None:
        """As ``flush``, once the trainer has ended: its log is written to the end too."""
        with self._flushing:
            self._flush(is_over=True)
            while self._tail and self._tail.batch(is_over=True):
                self._flush(is_over=True)

    def _flush(self, *, is_over: bool = False) -> Status:
        with self._lock:
            row, self._row = self._row, {}
            metrics, self._metrics = self._metrics, []
            events, self._events = self._events, []
        worked = time.monotonic() - self._written_at
        log = self._tail.batch(is_over=is_over) if self._tail else None
        shipped = {"logged": log.logged} if log else {}
        try:
            statements = [upsert_metric(self._claims.dialect, metric) for metric in metrics]
            lines = log.statements(self._claims.dialect) if log else []
            # Not added to the row's: an answer that is lost would count twice.
            runtime = self._runtime + worked
            status = self._claims.beat(
                self._lease, [*statements, *events, *lines], runtime=runtime, **row, **shipped
            )
        except BaseException:
            self._put_back(row, metrics, events)
            raise
        if log and self._tail:
            self._tail.written()
        self._written_at += worked
        self._runtime = runtime
        return status

    @property
    def is_waiting(self) -> bool:
        """Something has gathered that the row does not show yet."""
        has_log = self._tail is not None and self._tail.has_more
        return bool(self._row or self._metrics or self._events or has_log)

    def _step(self, message: Message) -> None:
        metrics = message["metrics"]
        self._row.update(step=message["step"], total_steps=message["total"], progress=metrics)
        self._row.update(recoveries=0)  # whatever killed the service, it was not this job at once
        self._metric("train", message["step"], metrics)

    def _held_out(self, message: Message) -> None:
        step, metrics = message["step"], message["metrics"]
        self._metric("held_out", step, metrics)
        text = f"Held-out loss after step {step}: {metrics['loss']:.4f}"
        self._event("job.evaluated", text, {"step": step, **metrics})

    def _metric(self, series: str, step: int, data: dict[str, Any]) -> None:
        self._metrics.append(
            {"job_id": self._lease.job_id, "series": series, "step": step, "data": data}
        )

    def _event(self, type_: str, text: str, data: dict[str, Any]) -> None:
        self._events.append(event(self._lease.job_id, type_, text, **data))

    def _put_back(
        self, row: dict[str, Any], metrics: list[dict[str, Any]], events: list[Insert]
    ) -> None:
        with self._lock:
            self._row = row | self._row
            self._metrics = metrics + self._metrics
            self._events = events + self._events


def upsert_metric(dialect: str, values: dict[str, Any]) -> Insert:
    """A step that runs again after a resume replaces its row."""
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    statement = insert(MetricRow).values(**values)
    return statement.on_conflict_do_update(
        index_elements=[MetricRow.job_id, MetricRow.series, MetricRow.step],
        set_={"data": statement.excluded.data},
    )
