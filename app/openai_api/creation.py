"""From OpenAI's body to the native one; what is wrong is told in the words it came in."""

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from app.errors import InvalidRequest
from app.faults import Fault, explain, field_pointers
from app.jobs.schemas import JobCreate, TrainingOptions
from app.openai_api.errors import unsupported
from app.openai_api.ids import dataset_id, dataset_uri
from app.openai_api.schemas import FineTuningJobCreate, HyperparametersIn

LEARNING_RATE = float(TrainingOptions.model_fields["learning_rate"].default)
GROUPS = ("/lora/", "/data/", "/training/", "/evaluation/")
KNOBS = {
    name: pointer
    for name, pointer in field_pointers(JobCreate).items()
    if pointer in {"/rank", "/sigma"} or pointer.startswith(GROUPS)
}
"""Fields of the native body that may stand among the hyperparameters, by their own name."""
OPENAIS = list(HyperparametersIn.model_fields)

Setting = tuple[str, object, str]
"""Where it stands in the native body, its value, and the parameter that it came in."""


def native(body: FineTuningJobCreate) -> tuple[JobCreate, "Params"]:
    """The native body, and where each of its fields came from.

    Raises:
        InvalidRequest: With the name of the parameter at fault.
    """
    _refuse_what_is_not_here(body)
    values: dict[str, Any] = {}
    params = Params()
    for pointer, value, param in _settings(body):
        _put(values, pointer, value, params, param)
    try:
        return JobCreate.model_validate(values), params
    except ValidationError as error:
        details = [{**found, "loc": ("body", *found["loc"])} for found in error.errors()]
        faults = params.rename(explain(details, values, [], field_pointers(JobCreate)))
        refusal = InvalidRequest("The job is not as expected.", faults=faults)
        refusal.code = InvalidRequest.code  # pydantic's names for faults are no promise of ours
        raise refusal from None


class Params:
    """By which parameter each field of the native body was set."""

    def __init__(self) -> None:
        self._by_pointer: dict[str, str] = {}

    def add(self, pointer: str, param: str) -> str:
        """The parameter that has set this field first."""
        return self._by_pointer.setdefault(pointer, param)

    def rename(self, faults: Sequence[Fault]) -> list[Fault]:
        """The same faults, of the parameters and files that the client knows."""
        return [
            Fault(
                pointer=self._of(fault.pointer), detail=_translated(fault.detail), code=fault.code
            )
            for fault in faults
        ]

    def translate(self, error: InvalidRequest) -> InvalidRequest:
        """What the native API has against the job."""
        faults = self.rename(error.faults)
        return InvalidRequest(" ".join(fault.detail for fault in faults), faults=faults)

    def _of(self, pointer: str) -> str:
        """Of the field itself, of the group that it is in, or of a field in it."""
        above = pointer
        while above:
            if above in self._by_pointer:
                rest = pointer.removeprefix(above)
                return self._by_pointer[above] + rest.replace("/", ".")
            above = above.rpartition("/")[0]
        within = [p for at, p in self._by_pointer.items() if at.startswith(f"{pointer}/")]
        return next(iter(within), f"flatlora{pointer.replace('/', '.')}")


def _refuse_what_is_not_here(body: FineTuningJobCreate) -> None:
    method = body.method
    if method and (method.type != "supervised" or method.dpo or method.reinforcement):
        name = "reinforcement" if method.reinforcement else "dpo" if method.dpo else method.type
        raise unsupported(
            "method.type", f"This service trains by the method 'supervised'; found {name!r}."
        )
    if body.integrations:
        raise unsupported(
            "integrations",
            "This service sends nothing to others. GET /jobs/{id}/metrics has a job's curves.",
        )
    if body.model.startswith(("job_", "ft:")):
        raise unsupported(
            "model",
            f"{body.model!r} is an adapter, and an adapter is not trained further: name a base "
            "model.",
        )


def _settings(body: FineTuningJobCreate) -> Iterator[Setting]:
    yield "/base_model", body.model, "model"
    yield "/dataset_uri", _uri(body.training_file, "training_file"), "training_file"
    if body.validation_file is not None:
        uri = _uri(body.validation_file, "validation_file")
        yield "/evaluation/validation_uri", uri, "validation_file"
    if body.suffix is not None:
        yield "/name", body.suffix, "suffix"
    if body.seed is not None:
        yield "/seed", body.seed, "seed"
    if body.metadata:
        yield "/labels", body.metadata, "metadata"
    if body.hyperparameters:
        yield from _hyperparameters(body.hyperparameters, "hyperparameters")
    if body.method and body.method.supervised and body.method.supervised.hyperparameters:
        given = body.method.supervised.hyperparameters
        yield from _hyperparameters(given, "method.supervised.hyperparameters")
    yield from _flat(body.flatlora or {}, JobCreate, "", "flatlora")


def _hyperparameters(given: HyperparametersIn, param: str) -> Iterator[Setting]:
    if given.n_epochs is not None:
        yield "/training/epochs", given.n_epochs, f"{param}.n_epochs"
    if given.batch_size is not None:
        yield "/training/batch_size", given.batch_size, f"{param}.batch_size"
    if (times := given.learning_rate_multiplier) is not None:
        rate = float(f"{LEARNING_RATE * times:.12g}")  # 2e-05, not 2.0000000000000003e-05
        yield "/training/learning_rate", rate, f"{param}.learning_rate_multiplier"
    for name, value in (given.model_extra or {}).items():
        if name not in KNOBS:
            raise unsupported(f"{param}.{name}", _unknown(name))
        if value != "auto":
            yield KNOBS[name], value, f"{param}.{name}"


def _unknown(name: str) -> str:
    near = get_close_matches(name, [*OPENAIS, *KNOBS], n=1)
    meant = f" Did you mean {near[0]!r}?" if near else " docs/openai.md lists them."
    return f"There is no hyperparameter {name!r}.{meant}"


def _flat(
    given: Mapping[str, Any], group: type[BaseModel], above: str, param: str
) -> Iterator[Setting]:
    """Every field by itself, so that a group may come in parts."""
    for name, value in given.items():
        field = group.model_fields.get(name)
        kind = field.annotation if field else None
        pointer, named = f"{above}/{name}", f"{param}.{name}"
        if isinstance(kind, type) and issubclass(kind, BaseModel) and isinstance(value, dict):
            yield from _flat(value, kind, pointer, named)
        else:
            yield pointer, value, named


def _put(values: dict[str, Any], pointer: str, value: object, params: Params, param: str) -> None:
    *groups, name = pointer[1:].split("/")
    place: Any = values
    for group in groups:
        place = place.setdefault(group, {})
        if not isinstance(place, dict):  # flatlora: {"lora": 3}, of which JobCreate tells
            return
    if name in place and place[name] != value:
        earlier = params.add(pointer, param)
        detail = f"{earlier} says {place[name]!r} of the same; say it once."
        raise _refused(param, detail, "given_twice")
    place[name] = value
    params.add(pointer, param)


def _refused(param: str, detail: str, code: str) -> InvalidRequest:
    return InvalidRequest(detail, faults=[Fault(pointer=param, detail=detail, code=code)])


def _uri(file: str, param: str) -> str:
    """What the native API names a file by."""
    if file.startswith("file-") and not dataset_id(file):
        raise _refused(
            param, f"There is no file {file!r}. Upload it with POST /v1/files.", "dataset_not_found"
        )
    return dataset_uri(file)


def _translated(detail: str) -> str:
    detail = re.sub(r"dataset:ds_([0-9a-f]{32})", r"file file-\1", detail)
    return detail.replace("POST /datasets", "POST /v1/files")
