"""All that is not a job: datasets, adapters, models, workers, and who may do what."""

from collections.abc import Mapping
from typing import Any

from flatlora_client.answers import (
    Adapter,
    AuditEvent,
    Dataset,
    Delivery,
    Key,
    Models,
    Page,
    Quota,
    Readiness,
    Version,
    WebhookSecret,
    WebhookTested,
    Worker,
)
from flatlora_client.api import Api, given, path_of
from flatlora_client.operations.jobs import JobRef, id_of
from flatlora_client.reading import read
from flatlora_client.retries import Retries
from flatlora_client.steps import Flow, Items, Request


def datasets(
    api: Api,
    /,
    *,
    limit: int | None = None,
    sha256: str | None = None,
    filename: str | None = None,
) -> Items[Dataset]:
    """Iterate over datasets, newest first; ``limit`` is how many are fetched at a time."""
    params = {"sha256": sha256, "filename": filename, "limit": limit}
    return api.pages(Dataset, "/datasets", params)


def dataset_page(
    api: Api,
    /,
    *,
    limit: int | None = None,
    after: str | None = None,
    sha256: str | None = None,
    filename: str | None = None,
) -> Flow[Page[Dataset]]:
    """One page of datasets, newest first."""
    params = {"sha256": sha256, "filename": filename, "limit": limit, "after": after}
    return (yield from api.page(Dataset, "/datasets", params))


def dataset(api: Api, /, dataset_id: str) -> Flow[Dataset]:
    """Show a dataset."""
    return (yield from api.get(Dataset, path_of("datasets", dataset_id)))


def delete_dataset(api: Api, /, dataset_id: str) -> Flow[None]:
    """Remove a dataset that no job is going to read."""
    yield from api.delete(path_of("datasets", dataset_id))


def adapters(
    api: Api,
    /,
    *,
    limit: int | None = None,
    base_model: str | None = None,
    labels: Mapping[str, str] | None = None,
) -> Items[Adapter]:
    """Iterate over finished adapters, newest first."""
    return api.pages(Adapter, "/adapters", _adapter_filters(base_model, labels, limit))


def adapter_page(
    api: Api,
    /,
    *,
    limit: int | None = None,
    after: str | None = None,
    base_model: str | None = None,
    labels: Mapping[str, str] | None = None,
) -> Flow[Page[Adapter]]:
    """One page of finished adapters, newest first."""
    params = _adapter_filters(base_model, labels, limit) | {"after": after}
    return (yield from api.page(Adapter, "/adapters", params))


def _adapter_filters(
    base_model: str | None, labels: Mapping[str, str] | None, limit: int | None
) -> dict[str, Any]:
    named = {f"label.{name}": value for name, value in (labels or {}).items()}
    return {"base_model": base_model, "limit": limit, **named}


def adapter(api: Api, /, job: JobRef) -> Flow[Adapter]:
    """Show the adapter that a job has made."""
    return (yield from api.get(Adapter, path_of("adapters", id_of(job))))


def models(api: Api, /) -> Flow[Models]:
    """The base models that jobs may name, and the limits."""
    return (yield from api.get(Models, "/models"))


def workers(api: Api, /) -> Flow[tuple[Worker, ...]]:
    """Who trains, on what, and which job."""
    return (yield from api.items(Worker, "/workers"))


def keys(api: Api, /) -> Flow[tuple[Key, ...]]:
    """The API keys of this project; for admins."""
    return (yield from api.items(Key, "/keys"))


def create_key(
    api: Api,
    /,
    *,
    name: str,
    role: str | None = None,
    expires_in_days: float | None = None,
    project: str | None = None,
) -> Flow[Key]:
    """Make an API key; ``.key`` of the answer is shown this once. For admins."""
    body = given(
        {"name": name, "role": role, "expires_in_days": expires_in_days, "project": project}
    )
    # Each request makes another key, so none is sent twice that may have arrived.
    return read(Key, (yield from api.post("/keys", body, is_repeatable=False)))


def revoke_key(api: Api, /, key_id: str) -> Flow[Key]:
    """End an API key; repeatable. For admins."""
    return read(Key, (yield from api.json(Request("DELETE", path_of("keys", key_id)))))


def audit(
    api: Api,
    /,
    *,
    action: str | None = None,
    object: str | None = None,
    limit: int | None = None,
) -> Items[AuditEvent]:
    """Iterate over who changed what, newest first; of one action or thing alone. For admins."""
    params = {"action": action, "object": object, "limit": limit}
    return api.pages(AuditEvent, "/audit", params, cursor="before")


def audit_page(
    api: Api,
    /,
    *,
    action: str | None = None,
    object: str | None = None,
    limit: int | None = None,
    before: int | str | None = None,
) -> Flow[Page[AuditEvent]]:
    """One page of who changed what, newest first. For admins."""
    params = {"action": action, "object": object, "limit": limit, "before": before}
    return (yield from api.page(AuditEvent, "/audit", params))


def quota(api: Api, /) -> Flow[Quota]:
    """What this project may use, and what it has used."""
    return (yield from api.get(Quota, "/quota"))


def ready(api: Api, /) -> Flow[Readiness]:
    """Whether the service can serve. It is asked once: whoever asks wants to know how it is now.

    Raises:
        ServerError: it cannot; ``code`` is ``not_ready``, and ``detail`` says what is missing.
    """
    response = yield from api.send(Request("GET", "/readyz"), retries=Retries(most=0))
    return read(Readiness, api.object(api.url, response))


def version(api: Api, /) -> Flow[Version]:
    """Which service answers, and what it can do."""
    return (yield from api.get(Version, "/version"))


def deliveries(api: Api, /, job: JobRef) -> Flow[tuple[Delivery, ...]]:
    """The webhook messages of a job, and how they fared."""
    return (yield from api.items(Delivery, path_of("jobs", id_of(job), "deliveries")))


def retry_delivery(api: Api, /, delivery_id: str) -> Flow[Delivery]:
    """Send a webhook message once more."""
    return read(Delivery, (yield from api.post(path_of("deliveries", delivery_id, "retry"))))


def test_webhook(api: Api, /, url: str) -> Flow[WebhookTested]:
    """Have a test message sent to a URL, and see what it answered."""
    return read(WebhookTested, (yield from api.post("/webhooks/test", {"url": url})))


def webhook_secret(api: Api, /) -> Flow[WebhookSecret]:
    """The secret that webhook messages are signed with. For admins."""
    return (yield from api.get(WebhookSecret, "/webhooks/secret"))


def rotate_webhook_secret(api: Api, /) -> Flow[WebhookSecret]:
    """Sign with another secret from now on. For admins."""
    # A second rotation would end the secret that the first has shown.
    found = yield from api.post("/webhooks/secret", is_repeatable=False)
    return read(WebhookSecret, found)
