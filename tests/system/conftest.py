import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.app.receiver import Receiver, receiving
from tests.system.service import EXAMPLES, Json, Service, example_job


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path)
    service.start()
    yield service
    service.stop()


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    """Of webhooks of the shared service."""
    with receiving() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def shared_service(
    tmp_path_factory: pytest.TempPathFactory, receiver: Receiver
) -> Iterator[Service]:
    """For tests that do it no harm."""
    service = Service(tmp_path_factory.mktemp("service"))
    service.environment |= {
        "FLATLORA_ALLOWED_NETWORKS": "127.0.0.1/32",
        "FLATLORA_ALLOWED_PORTS": str(receiver.port),
        "FLATLORA_ALLOW_HTTP": "1",
    }
    service.start()
    yield service
    service.stop()


@pytest.fixture
def body() -> Json:
    """A job of some seconds, with a checkpoint every few steps."""
    return example_job(
        training={"max_steps": 60, "batch_size": 4, "checkpoint_steps": 5},
        evaluation={"max_rows": 8, "every_steps": 20},
    )


@pytest.fixture
def broken_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's rows with line 37 broken, in a folder that the caller has to allow."""
    source = (EXAMPLES / "data" / "train.jsonl").read_text().splitlines()
    source[36] = '{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant"}]}'
    path = tmp_path_factory.mktemp("rows") / "broken.jsonl"
    path.write_text("\n".join(source) + "\n")
    return path


def copy_into(service: Service, path: Path) -> str:
    """Put a file where the service may read it; its URI."""
    target = service.folder / path.name
    shutil.copy(path, target)
    return f"file:{target}"
