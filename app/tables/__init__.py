"""The tables. The schema itself is made by the migrations alone; a test compares the two."""

from app.tables.access import NO_LIMIT as NO_LIMIT
from app.tables.access import ApiKeyRow as ApiKeyRow
from app.tables.access import AuditRow as AuditRow
from app.tables.access import ProjectRow as ProjectRow
from app.tables.access import UsageRow as UsageRow
from app.tables.base import DEFAULT_PROJECT as DEFAULT_PROJECT
from app.tables.base import OfJob as OfJob
from app.tables.base import Owned as Owned
from app.tables.base import Table as Table
from app.tables.base import UtcDateTime as UtcDateTime
from app.tables.datasets import DatasetRow as DatasetRow
from app.tables.datasets import UploadPartRow as UploadPartRow
from app.tables.datasets import UploadRow as UploadRow
from app.tables.jobs import HAS_ADAPTER as HAS_ADAPTER
from app.tables.jobs import EventRow as EventRow
from app.tables.jobs import IdempotencyRow as IdempotencyRow
from app.tables.jobs import JobRow as JobRow
from app.tables.jobs import LogRow as LogRow
from app.tables.jobs import MetricRow as MetricRow
from app.tables.queue import OutboxRow as OutboxRow
from app.tables.queue import WorkerRow as WorkerRow
from app.tables.webhooks import WebhookDeliveryRow as WebhookDeliveryRow
from app.tables.webhooks import WebhookSecretRow as WebhookSecretRow
