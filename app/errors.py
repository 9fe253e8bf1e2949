"""Errors on purpose. app/problems.py turns them into answers.

    ServiceError                     status, code, detail, hint, faults
    ├── MalformedBody                400  malformed_body
    ├── Unauthenticated              401  unauthenticated
    ├── CrossSite                    403  cross_site
    ├── Forbidden                    403  forbidden
    ├── NotFound                     404  not_found
    │   ├── JobNotFound                   job_not_found
    │   ├── DatasetNotFound               dataset_not_found
    │   ├── KeyNotFound                   key_not_found
    │   ├── DeliveryNotFound              delivery_not_found
    │   ├── UploadNotFound                upload_not_found
    │   ├── AdapterNotFound               adapter_not_found
    │   └── FileNotInAdapter              file_not_in_adapter
    ├── MethodNotAllowed             405  method_not_allowed
    ├── Conflict                     409
    │   ├── WrongStatus                   with job_status
    │   │   ├── IllegalTransition             illegal_transition
    │   │   └── AdapterNotReady               adapter_not_ready
    │   ├── DatasetInUse                  dataset_in_use
    │   ├── OffsetMismatch                offset_mismatch
    │   ├── UploadMismatch                upload_mismatch
    │   └── WebhookSecretUnreadable       webhook_secret_unreadable
    ├── TooLarge                     413  too_large
    ├── UnsupportedMediaType         415  unsupported_media_type
    ├── RangeNotSatisfiable          416  range_not_satisfiable
    ├── HostNotAllowed               421  host_not_allowed
    ├── InvalidRequest               422  invalid_request, or the code of its only fault
    │   ├── HashMismatch                  hash_mismatch
    │   └── IdempotencyKeyReused          idempotency_key_reused
    ├── TooManyRequests              429
    │   ├── RateLimited                   rate_limited
    │   └── QuotaExceeded                 quota_exceeded
    └── NotReady                     503  not_ready
        ├── DatabaseUnavailable           database_unavailable
        ├── IssuerUnavailable             issuer_unavailable
        └── StoreUnavailable              store_unavailable

What a request's shape has wrong is told by app/faults.py.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import ClassVar

from app.faults import Fault


class ServiceError(Exception):
    """Base of every error that this service raises on purpose."""

    status: ClassVar[int] = 500
    code: str = "internal"

    def __init__(
        self,
        detail: str,
        hint: str | None = None,
        *,
        faults: Sequence[Fault] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.hint = hint
        self.faults = list(faults)
        self.headers = dict(headers or {})
        self.members: dict[str, str] = {}
        """What the problem tells besides (RFC 9457 §3.2)."""


class MalformedBody(ServiceError):
    status = 400
    code = "malformed_body"


class Unauthenticated(ServiceError):
    status = 401
    code = "unauthenticated"

    def __init__(self, detail: str, hint: str) -> None:
        super().__init__(detail, hint, headers={"WWW-Authenticate": "Bearer"})


class CrossSite(ServiceError):
    status = 403
    code = "cross_site"


class Forbidden(ServiceError):
    status = 403
    code = "forbidden"


class NotFound(ServiceError):
    status = 404
    code = "not_found"


class JobNotFound(NotFound):
    code = "job_not_found"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"There is no job {job_id!r}.", "List the jobs with GET /jobs.")


class DatasetNotFound(NotFound):
    code = "dataset_not_found"

    def __init__(self, dataset_id: str) -> None:
        super().__init__(
            f"There is no dataset {dataset_id!r}.", "List the datasets with GET /datasets."
        )


class KeyNotFound(NotFound):
    code = "key_not_found"

    def __init__(self, key_id: str) -> None:
        super().__init__(f"There is no key {key_id!r}.", "List the keys with GET /keys.")


class DeliveryNotFound(NotFound):
    code = "delivery_not_found"

    def __init__(self, delivery_id: str) -> None:
        super().__init__(
            f"There is no delivery {delivery_id!r}.",
            "List a job's deliveries with GET /jobs/{id}/deliveries.",
        )


class UploadNotFound(NotFound):
    code = "upload_not_found"

    def __init__(self, sha256: str) -> None:
        super().__init__(
            f"No upload of {sha256} has begun here, or it was forgotten after a day.",
            f"Begin it with PUT /datasets/uploads/{sha256}.",
        )


class AdapterNotFound(NotFound):
    code = "adapter_not_found"

    def __init__(self, job_id: str) -> None:
        super().__init__(
            f"There is no adapter of a job {job_id!r}.",
            "List the adapters with GET /adapters; a job has one when it has succeeded.",
        )


class FileNotInAdapter(NotFound):
    code = "file_not_in_adapter"


class MethodNotAllowed(ServiceError):
    status = 405
    code = "method_not_allowed"


class Conflict(ServiceError):
    status = 409
    code = "conflict"


class WrongStatus(Conflict):
    """The job's status is in the way; programs find it in ``job_status``."""

    def __init__(self, detail: str, hint: str, *, status: str) -> None:
        super().__init__(detail, hint)
        self.members["job_status"] = str(status)


class IllegalTransition(WrongStatus):
    code = "illegal_transition"


class DatasetInUse(Conflict):
    code = "dataset_in_use"


class OffsetMismatch(Conflict):
    """``expected`` is also in the header ``Upload-Offset``."""

    code = "offset_mismatch"

    def __init__(self, found: int, expected: int) -> None:
        super().__init__(
            f"The part begins at {found}, and {expected} bytes are here.",
            f"Go on with Upload-Offset: {expected}.",
            headers={"Upload-Offset": str(expected)},
        )


class UploadMismatch(Conflict):
    code = "upload_mismatch"


class AdapterNotReady(WrongStatus):
    code = "adapter_not_ready"


class WebhookSecretUnreadable(Conflict):
    code = "webhook_secret_unreadable"

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"The project's webhook secret cannot be read: {reason}.",
            "Set the FLATLORA_SECRET_KEY that it was sealed with, or rotate the secret with "
            "POST /webhooks/secret.",
        )


class TooLarge(ServiceError):
    status = 413
    code = "too_large"


TOO_LARGE_HINT = (
    "Rows are uploaded with POST /datasets. FLATLORA_MAX_BODY_BYTES and "
    "FLATLORA_MAX_DATASET_BYTES set the limits."
)


def too_large(limit: int) -> TooLarge:
    return TooLarge(f"The body is too large: {limit} bytes are taken here.", TOO_LARGE_HINT)


class UnsupportedMediaType(ServiceError):
    status = 415
    code = "unsupported_media_type"


class RangeNotSatisfiable(ServiceError):
    status = 416
    code = "range_not_satisfiable"

    def __init__(self, detail: str, size: int) -> None:
        super().__init__(detail, headers={"Content-Range": f"bytes */{size}"})


class HostNotAllowed(ServiceError):
    status = 421
    code = "host_not_allowed"


class InvalidRequest(ServiceError):
    """A request whose shape is right and whose content is not."""

    status = 422
    code = "invalid_request"

    def __init__(self, detail: str, hint: str | None = None, *, faults: Sequence[Fault]) -> None:
        super().__init__(detail, hint, faults=faults)
        codes = {fault.code for fault in faults}
        if len(codes) == 1:
            self.code = codes.pop()


class HashMismatch(ServiceError):
    status = 422
    code = "hash_mismatch"


class IdempotencyKeyReused(ServiceError):
    status = 422
    code = "idempotency_key_reused"


class TooManyRequests(ServiceError):
    status = 429
    code = "too_many_requests"

    def __init__(self, detail: str, hint: str, *, retry_after: float) -> None:
        seconds = max(1, ceil(retry_after))
        super().__init__(detail, hint, headers={"Retry-After": str(seconds)})


class RateLimited(TooManyRequests):
    code = "rate_limited"


class QuotaExceeded(TooManyRequests):
    code = "quota_exceeded"


class NotReady(ServiceError):
    status = 503
    code = "not_ready"

    def __init__(self, detail: str, hint: str) -> None:
        super().__init__(detail, hint, headers={"Retry-After": "5"})


class DatabaseUnavailable(NotReady):
    code = "database_unavailable"

    def __init__(self) -> None:
        super().__init__(
            "The database does not answer.",
            "Send the request again; with the same Idempotency-Key it makes no second job.",
        )


class IssuerUnavailable(NotReady):
    code = "issuer_unavailable"

    def __init__(self) -> None:
        super().__init__(
            "The identity provider does not answer, and this token's key is not known yet.",
            "Send the request again. If that does not help, the service's log says what is wrong "
            "with FLATLORA_OIDC_ISSUER.",
        )


class StoreUnavailable(NotReady):
    code = "store_unavailable"

    def __init__(self) -> None:
        super().__init__(
            "The artifact store does not answer.",
            "Send the request again. If that does not help, the service's log says what is wrong "
            "with FLATLORA_STORE_URL.",
        )
