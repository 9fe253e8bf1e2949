"""OpenAI's client over real connections: keys, the asynchronous one, and answers that are lost."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from openai import (
    APIConnectionError,
    AsyncOpenAI,
    AuthenticationError,
    BadRequestError,
    NotFoundError,
    OpenAI,
    PermissionDeniedError,
)

from app.settings import Settings
from tests.app.conftest import make_settings
from tests.app.openai_client import ROWS
from tests.app.service import make_model, running
from tests.faults.proxy import Proxy

CREATE = b"POST /v1/fine_tuning/jobs "
MODEL = "file:tiny"
JSONL = "file:train.jsonl"


class Api:
    """The API in a process of its own, without anybody who would train."""

    def __init__(self, url: str, settings: Settings) -> None:
        self.url = url
        self.settings = settings
        self.key = settings.key_file.read_text().strip()

    def client(self, *, port: int | None = None, key: str = "", max_retries: int = 2) -> OpenAI:
        return OpenAI(
            base_url=f"http://127.0.0.1:{port or self.port}/v1",
            api_key=key or self.key,
            max_retries=max_retries,
        )

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, migrated_file: Path) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("api")
    database = folder / "flatlora.db"
    database.write_bytes(migrated_file.read_bytes())
    settings = make_settings(folder, f"sqlite:///{database}", auth="key")
    make_model(settings.model_roots[0] / "tiny")
    (settings.dataset_roots[0] / "train.jsonl").write_bytes(ROWS)
    with running(settings) as url:
        assert httpx2.get(f"{url}/healthz", timeout=30).is_success
        yield Api(url, settings)


@pytest.fixture(scope="module")
def openai(api: Api) -> Iterator[OpenAI]:
    with api.client() as client:
        yield client


class TestAsync:
    def test_the_asynchronous_client_does_the_same(self, api: Api) -> None:
        async def work() -> None:
            async with AsyncOpenAI(base_url=f"{api.url}/v1", api_key=api.key) as client:
                rows = api.settings.dataset_roots[0] / "train.jsonl"
                file = await client.files.create(file=rows, purpose="fine-tune")
                assert [found.id async for found in client.files.list(limit=1)] == [file.id]
                assert (await client.files.content(file.id)).content == rows.read_bytes()
                jobs = client.fine_tuning.jobs
                for _ in range(3):
                    job = await jobs.create(
                        model=MODEL, training_file=file.id, metadata={"test": "async"},
                    )  # fmt: skip
                    await jobs.cancel(job.id)
                listed = jobs.list(limit=2, metadata={"test": "async"})
                assert len([found.id async for found in listed]) == 3

        asyncio.run(work())


class TestKeys:
    def test_a_wrong_key_is_an_authentication_error(self, api: Api) -> None:
        with api.client(key="sk-wrong") as client, pytest.raises(AuthenticationError) as refused:
            client.models.list()
        assert refused.value.code == "invalid_api_key"
        assert refused.value.request_id

    def test_a_viewer_may_look_and_not_submit(self, api: Api) -> None:
        headers = {"Authorization": f"Bearer {api.key}"}
        asked = {"name": "looking", "role": "viewer"}
        made = httpx2.post(f"{api.url}/keys", json=asked, headers=headers).json()
        with api.client(key=made["key"]) as client:
            client.fine_tuning.jobs.list()
            with pytest.raises(PermissionDeniedError) as refused:
                client.files.create(file=b"{}\n", purpose="fine-tune")
        assert refused.value.code == "forbidden"

    def test_another_projects_ids_are_not_found(self, api: Api, openai: OpenAI) -> None:
        headers = {"Authorization": f"Bearer {api.key}"}
        asked = {"name": "elsewhere", "project": "other"}
        made = httpx2.post(f"{api.url}/keys", json=asked, headers=headers).json()
        file = openai.files.create(file=("mine.jsonl", ROWS), purpose="fine-tune")
        job = openai.fine_tuning.jobs.create(model=MODEL, training_file=file.id)
        with api.client(key=made["key"]) as other:
            jobs, files = other.fine_tuning.jobs, other.files
            of_a_job = (jobs.retrieve, jobs.cancel, jobs.list_events, jobs.checkpoints.list)
            of_a_file = (files.retrieve, files.content, files.delete)
            for ask, id_ in [
                *((ask, job.id) for ask in (*of_a_job, other.models.retrieve)),
                *((ask, file.id) for ask in of_a_file),
            ]:
                with pytest.raises(NotFoundError):
                    ask(id_)
            with pytest.raises(BadRequestError) as refused:
                jobs.create(model=MODEL, training_file=file.id)
            assert refused.value.param == "training_file"
            assert [list(jobs.list()), list(files.list())] == [[], []]
        assert openai.fine_tuning.jobs.retrieve(job.id).status == "queued"


class TestLostAnswers:
    @pytest.fixture
    def proxy(self, api: Api) -> Iterator[Proxy]:
        with Proxy("127.0.0.1", api.port, name="openai") as proxy:
            yield proxy

    def test_a_job_whose_answer_is_lost_is_made_once(
        self, api: Api, openai: OpenAI, proxy: Proxy
    ) -> None:
        mark = {"test": "lost"}
        with api.client(port=proxy.port) as client:
            jobs = client.fine_tuning.jobs.with_raw_response
            proxy.cut_after(CREATE)
            answer = jobs.create(model=MODEL, training_file=JSONL, metadata=mark)
        assert not proxy.is_armed
        assert answer.retries_taken == 1
        assert answer.headers["idempotent-replayed"] == "true"
        listed = openai.fine_tuning.jobs.list(metadata=mark)
        assert [job.id for job in listed] == [answer.parse().id]

    def test_two_requests_of_which_the_second_loses_its_answer_make_two(
        self, api: Api, openai: OpenAI, proxy: Proxy
    ) -> None:
        mark = {"test": "two"}
        with api.client(port=proxy.port) as client:
            made = []
            for _ in range(2):
                job = client.fine_tuning.jobs.create(
                    model=MODEL, training_file=JSONL, metadata=mark
                )
                made.append(job.id)
                proxy.cut_after(CREATE)
        assert len(set(made)) == 2
        assert {job.id for job in openai.fine_tuning.jobs.list(metadata=mark)} == set(made)

    def test_an_upload_and_a_cancel_are_repeated_without_harm(
        self, api: Api, openai: OpenAI, proxy: Proxy
    ) -> None:
        with api.client(port=proxy.port) as client:
            proxy.cut_after(b"POST /v1/files ")
            file = client.files.create(file=("lost.jsonl", b"{}\n"), purpose="fine-tune")
            job = client.fine_tuning.jobs.create(model=MODEL, training_file=file.id)
            proxy.cut_after(b"/cancel ")
            assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
        assert not proxy.is_armed
        named = [found.id for found in openai.files.list() if found.filename == "lost.jsonl"]
        assert named == [file.id]

    def test_a_service_that_is_away_is_a_connection_error(self, api: Api, proxy: Proxy) -> None:
        proxy.cut()
        with (
            api.client(port=proxy.port, max_retries=0) as client,
            pytest.raises(APIConnectionError),
        ):
            client.models.list()


def test_a_model_whose_name_has_signs_in_it_is_found(api: Api, openai: OpenAI) -> None:
    folder = make_model(api.settings.model_roots[0] / "two words")
    name = f"file:{folder}".replace(" ", "%20")
    assert openai.models.retrieve(name).id == name
