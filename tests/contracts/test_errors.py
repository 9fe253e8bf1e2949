"""Every documented error is provoked once, and every error that there is is documented.

docs/errors.md is the list. A new code needs a section there and an entry in provoking.py.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from app.jobs.states import Reason, Status
from app.migrate import upgrade
from app.openai_api.shape import status_for
from tests.app.conftest import make_settings, serve
from tests.app.service import Json, Service
from tests.contracts.error_codes import REASON, ROOT, codes_in_code, sections, source_of
from tests.contracts.openapi import document
from tests.contracts.provoking import Answer, again, delete_the_dataset_of_a_job, entries

KEY = "flk_operator_of_the_errors"
DOCUMENT = document()
OPERATIONS = [
    f"{method.upper()} {path}" for path, item in DOCUMENT["paths"].items() for method in item
]
ELSEWHERE = {
    "database_unavailable": "app/test_outages.py::TestStopped::"
    "test_every_route_says_so_and_all_work_again_when_it_is_back",
    "store_unavailable": "app/test_s3.py::TestOutage::"
    "test_what_needs_the_store_is_told_to_come_again",
    "issuer_unavailable": "app/test_oidc.py::TestIssuer::"
    "test_when_it_is_away_known_keys_go_on_and_others_are_told_to_come_again",
    "unreachable": "app/test_command_line.py::TestJson::test_no_service_is_an_error_too",
}
"""Codes that need something to go away (a database, a store, an issuer), or that no request meets,
and the tests, below tests/, that provoke them."""

REASONS = {
    Reason.DATASET_INVALID: "system/test_job.py::TestFailedJob::"
    "test_a_bad_row_is_named_by_its_line_and_the_service_goes_on",
    Reason.DATASET_UNAVAILABLE: "system/test_job.py::TestFailedJob::"
    "test_a_file_that_goes_away_after_submitting_is_explained",
    Reason.BASE_MODEL_UNAVAILABLE: "system/test_one_jobs_trouble.py::TestHub::"
    "test_one_that_cannot_be_reached_is_told",
    Reason.CONFIG_INVALID: "worker/test_slot.py::TestBench::"
    "test_an_embedded_one_fails_a_job_that_is_too_large_for_it",
    Reason.GPU_OUT_OF_MEMORY: "faults/test_one_jobs_trouble.py::TestInTheTrainer::"
    "test_what_would_come_again_fails_at_once",
    Reason.HOST_OUT_OF_MEMORY: "worker/test_supervisor.py::TestTrainerThatIsKilled::"
    "test_for_the_machines_memory_it_is_told_so",
    Reason.DISK_FULL: "faults/test_one_jobs_trouble.py::TestFullDisk::"
    "test_it_is_told_wherever_it_is_met",
    Reason.WORKER_LOST: "worker/test_reaper.py::TestReap::"
    "test_the_third_lost_attempt_fails_the_job",
    Reason.MAX_RUNTIME: "system/test_job.py::TestFailedJob::test_max_runtime_stops_it",
    Reason.MAX_QUEUE_TIME: "worker/test_reaper.py::TestQueueDeadline::"
    "test_a_job_that_has_waited_for_too_long_fails_with_its_reason",
    Reason.LOSS_DIVERGED: "worker/training/test_loop.py::TestStops::"
    "test_losses_that_are_not_finite_end_the_run",
    Reason.PUBLISH_FAILED: "faults/test_tiny_trainer.py::TestTrouble::"
    "test_an_adapter_that_was_changed_is_not_verified",
    Reason.INTERNAL: "worker/test_claims.py::TestAttempts::"
    "test_a_job_that_takes_the_service_down_each_time_does_not_come_back_for_ever",
}
"""Which test makes a job fail so, below tests/."""


Serve = Callable[[Json], Service]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with capture_logs():
        yield


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """A service with these settings, which is kept for the next that asks for the same."""
    kept: dict[str, Service] = {}
    with ExitStack() as stack:

        def get(more: Json) -> Service:
            if repr(more) not in kept:
                folder = tmp_path_factory.mktemp("errors")
                kept[repr(more)] = stack.enter_context(one_service(folder, more))
            return kept[repr(more)]

        yield get


@contextmanager
def one_service(folder: Path, more: Json) -> Iterator[Service]:
    url = str(more.get("database_url", "")).format(folder=f"/{folder}")
    if not url:
        url = f"sqlite:///{folder}/flatlora.db"
        upgrade(url)
    values = {
        "auth": "key", "api_key": KEY, "hub_models": ["org/*"], "hub_datasets": ["org/*"],
        **{name: value for name, value in more.items() if name != "database_url"},
    }  # fmt: skip
    for service in serve(make_settings(folder, url, **values)):
        service.http.headers["Authorization"] = f"Bearer {KEY}"
        yield service


class TestEveryCode:
    def test_has_a_section_and_no_section_is_of_another(self) -> None:
        explained = {name for name in sections() if not name.startswith(REASON)}
        assert explained == codes_in_code()

    def test_is_provoked_with_every_status_that_its_section_names(self) -> None:
        provoked: dict[str, set[int]] = {}
        for code, status in entries.found:
            provoked.setdefault(code, set()).add(status)
        expected = {
            code: set(section.statuses)
            for code, section in sections().items()
            if not code.startswith(REASON) and code not in ELSEWHERE
        }
        assert provoked == expected

    @pytest.mark.parametrize("code", ELSEWHERE)
    def test_that_is_provoked_elsewhere_is_looked_for_there(self, code: str) -> None:
        test = f"tests/{ELSEWHERE[code]}"
        assert source_of(test)
        assert f'"{code}"' in (ROOT / test.partition("::")[0]).read_text()


@pytest.mark.parametrize(("code", "status"), entries.found, ids=str)
def test_it_is_answered_as_the_page_says(code: str, status: int, serving: Serve) -> None:
    provoke, settings = entries.found[code, status]
    response = provoke(serving(settings))
    assert response.status_code == status, response.text
    is_listed(response, code)
    if response.url.path.startswith("/v1/"):
        is_openais(response, code)
    else:
        is_problem(response, code)


@pytest.mark.parametrize(("code", "status"), again.found, ids=str)
def test_so_it_is_by_openais_paths(code: str, status: int, serving: Serve) -> None:
    provoke, settings = again.found[code, status]
    response = provoke(serving(settings))
    assert response.status_code == status, response.text
    is_openais(response, code)
    is_listed(response, code)


def is_listed(response: Answer, code: str) -> None:
    """Among what the document says of this operation by its status; ``default`` is no list."""
    if code in {"not_found", "method_not_allowed"}:
        return  # no operation of the document has been asked for
    operation = operation_of(response)
    listed = operation["responses"].get(str(response.status_code), {})
    assert code in listed.get("x-codes", []), f"{operation['operationId']} does not list it"
    for name, header in listed["headers"].items():
        assert name in response.headers or not header.get("required"), name


def operation_of(response: Answer) -> Json:
    method, path = response.request.method.lower(), response.url.path
    for template, item in DOCUMENT["paths"].items():
        pattern = re.sub(r"\{\w+\}", "[^/]+", template.replace("{model}", ".+"))
        if re.fullmatch(pattern, path) and method in item:
            found: Json = item[method]
            return found
    raise AssertionError(f"the document has no {method} {path}")


class TestWhatAnyRouteMayAnswer:
    @pytest.mark.parametrize("operation", OPERATIONS)
    def test_is_listed_by_each(self, operation: str) -> None:
        method, path = operation.split()
        found = DOCUMENT["paths"][path][method.lower()]
        expected = {421: "host_not_allowed", 500: "internal"}
        if "security" in found:
            expected |= {403: "forbidden", 429: "rate_limited", 503: "database_unavailable"}
        if method != "GET":
            expected |= {413: "too_large"}
            assert "cross_site" in found["responses"]["403"]["x-codes"]
        for status, code in expected.items():
            assert code in found["responses"][str(status)]["x-codes"]

    def test_and_no_code_is_listed_that_the_page_does_not_explain(self) -> None:
        listed = {
            (code, int(status))
            for item in DOCUMENT["paths"].values()
            for operation in item.values()
            for status, response in operation["responses"].items()
            for code in response.get("x-codes", [])
        }
        explained = {
            (code, at)
            for code, section in sections().items()
            for status in section.statuses
            for at in (status, status_for(status))  # under /v1 a 422 is a 400
        }
        assert listed <= explained, sorted(listed - explained)


class TestTheStatusInTheWay:
    @pytest.mark.parametrize("wish", ["cancel", "pause", "resume"])
    def test_of_a_transition_is_told_to_programs(self, wish: str, serving: Serve) -> None:
        service = serving({})
        refused = service.http.post(f"/jobs/{service.finished()['id']}/{wish}").json()
        assert refused["job_status"] == Status.SUCCEEDED

    def test_of_what_cannot_be_done_yet_too(self, serving: Serve) -> None:
        service = serving({})
        path = f"/jobs/{service.submit()['id']}"
        refusals = [
            service.http.post(f"{path}/retry"),
            service.http.delete(path),
            service.http.get(f"{path}/adapter"),
        ]
        assert [r.json()["job_status"] for r in refusals] == [Status.QUEUED] * 3

    def test_is_not_told_of_other_conflicts(self, serving: Serve) -> None:
        refused = delete_the_dataset_of_a_job(serving({}))
        assert refused.status_code == 409
        assert "job_status" not in refused.json()


def is_problem(response: Answer, code: str) -> None:
    problem = response.json()
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["code"] == code
    assert problem["status"] == response.status_code
    assert problem["request_id"] == response.headers["x-request-id"]
    assert problem["detail"].endswith(".")
    assert problem["title"]
    assert problem["instance"] == response.url.path
    if response.status_code == 422 and code not in {"hash_mismatch", "idempotency_key_reused"}:
        assert problem["errors"]


def is_openais(response: Answer, code: str) -> None:
    error = response.json()["error"]
    assert response.headers["content-type"] == "application/json"
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert error["message"]
    assert response.headers["x-request-id"]


class TestEveryReason:
    def test_has_a_section_and_no_section_is_of_another(self) -> None:
        explained = {name for name in sections() if name.startswith(REASON)}
        assert explained == {f"{REASON}{reason}" for reason in Reason}

    @pytest.mark.parametrize("reason", Reason)
    def test_is_met_in_a_test_of_the_worker(self, reason: Reason) -> None:
        words = {reason.value, reason.name, "".join(map(str.title, reason.split("_")))}
        source = source_of(f"tests/{REASONS[reason]}")
        assert any(word in source for word in words)

    @pytest.mark.parametrize("reason", Reason)
    def test_is_told_over_http_with_whose_it_is(self, reason: Reason, serving: Serve) -> None:
        service = serving({})
        job_id = service.submit()["id"]
        service.set(job_id, status=Status.FAILED, reason=reason, message="m", hint="h")
        failure = service.get(f"/jobs/{job_id}")["failure"]
        whose = "Yours" if failure["yours_to_fix"] else "Not yours"
        assert (failure["reason"], whose) == (reason, sections()[f"{REASON}{reason}"].says)
