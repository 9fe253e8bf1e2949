"""Celery as both sides see it: the API that wakes workers, and the workers.

Redis carries hints, never jobs: a message says that there is something to do, and a worker that
gets it asks the database what. One that is lost costs a delay, one that comes twice nothing.
"""

from typing import Any

from celery import Celery
from kombu.entity import Exchange, Queue

WAKE = "flatlora.wake"
QUEUE = "flatlora"
MOST_GPUS = 64  # that a job may ask for


def queue_of(gpus: int) -> str:
    """Where wake-ups for jobs of so many GPUs go: none is taken by a slot that is too small."""
    return QUEUE if gpus == 1 else f"{QUEUE}.{gpus}gpus"


def queues_of(slot_size: int) -> list[str]:
    """What slots of so many GPUs listen to."""
    return [queue_of(gpus) for gpus in range(1, min(slot_size, MOST_GPUS) + 1)]


def make_celery(broker_url: str) -> Celery:
    exchange: Any = Exchange  # kombu says that it ships types, and ships few
    queue: Any = Queue
    app = Celery("flatlora", broker=broker_url, set_as_current=False)
    app.conf.update(
        # Never acknowledged: with acks_late Redis hands a job of hours to a second worker when the
        # visibility timeout ends, and keeps it from all until then if the first dies. And where a
        # connection breaks before an acknowledgement, Celery consumes nothing any more.
        task_queues=[
            queue(name, exchange(name), routing_key=name, no_ack=True)
            for name in queues_of(MOST_GPUS)
        ],
        task_acks_late=False,
        # Else a wake-up waits behind a running job while another slot is idle.
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        # Status and results are in the job's row.
        task_ignore_result=True,
        result_backend=None,
        # A message that holds more than plain values is refused, not unpickled.
        task_serializer="json",
        accept_content=["json"],
        task_default_queue=QUEUE,
        broker_transport_options={
            "visibility_timeout": 3600,
            "socket_timeout": 5,
            "socket_connect_timeout": 3,
            "socket_keepalive": True,
            "health_check_interval": 5,
            # A send fails at once: the relay tries again, and locks no rows meanwhile. What
            # consumes goes by the settings below.
            "max_retries": 0,
        },
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,  # else a Redis that is full ends Celery, and its jobs
        broker_pool_acquire_timeout=5,
        task_publish_retry=False,  # what cannot be sent stays in the outbox
        # A lost connection takes nothing back.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        # The supervisor sets the limits; Celery's act outside prefork not at all, else by SIGKILL.
        task_time_limit=None,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_send_task_events=False,
        # Else whoever can write to the broker can stop workers and kill their jobs.
        worker_enable_remote_control=False,
        # Supervisors import no torch, so a fork is safe, and cheap.
        worker_pool="prefork",
        worker_pool_start_method="fork",
    )
    return app
