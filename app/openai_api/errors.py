"""What a route under ``/v1`` refuses, and how its OpenAPI says so."""

from collections.abc import Sequence
from typing import Any

from app.errors import Conflict, InvalidRequest, NotFound, ServiceError
from app.faults import Fault
from app.headers import told
from app.openai_api.shape import ErrorAnswer, code_for, status_for
from app.problems import Responses, codes_of, failure


class FileNotFound(NotFound):
    code = "file_not_found"

    def __init__(self, file: str) -> None:
        super().__init__(f"There is no file {file!r}.", "List the files with GET /v1/files.")


class ModelNotFound(NotFound):
    code = "model_not_found"

    def __init__(self, model: str) -> None:
        super().__init__(f"There is no model {model!r}.", "List the models with GET /v1/models.")


class ResultsOfJob(Conflict):
    code = "results_of_job"


class BaseModelStays(Conflict):
    code = "base_model_stays"


def refusals(*errors: type[ServiceError], faults: Sequence[str] = ()) -> Responses:
    """The ``responses=`` of a route under ``/v1``: as ``problems()``, in OpenAI's shape."""
    found: dict[int, list[str]] = {}
    for status, codes in codes_of(errors, faults).items():
        found.setdefault(status_for(status), []).extend(map(code_for, codes))
    described: Responses = {
        status: {"model": ErrorAnswer, **failure(status, codes), **_final(status)}
        for status, codes in found.items()
    }
    return {**described, "default": {"model": ErrorAnswer, "description": "Any other error"}}


def _final(status: int) -> dict[str, Any]:
    match status:
        case 409:
            return {"headers": told("x-should-retry")}
        case 429:
            return {"headers": told(maybe=("x-should-retry",))}
    return {}


def unsupported(param: str, detail: str) -> InvalidRequest:
    """Something of OpenAI's that this service does not do."""
    return InvalidRequest(
        detail, faults=[Fault(pointer=param, detail=detail, code="unsupported_value")]
    )


def bad_cursor(after: str, what: str) -> InvalidRequest:
    detail = f"{after!r} is not the id of {what}. Pass the last id of the page before."
    return InvalidRequest(
        detail, faults=[Fault(pointer="after", detail=detail, code="cursor_malformed")]
    )
