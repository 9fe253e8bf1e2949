"""Clusters for the fault tests, and their logs where one fails."""

import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from tests.faults.cluster import Cluster

CLUSTERS = pytest.StashKey[list[Cluster]]()

MakeCluster = Callable[..., Cluster]


@pytest.fixture
def make_cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeCluster]:
    """Start a cluster; the arguments are those of ``Cluster``."""
    made = request.node.stash.setdefault(CLUSTERS, [])
    with ExitStack() as stack:

        def make(**arguments: Any) -> Cluster:
            cluster = Cluster(tmp_path / f"cluster-{len(made)}", **arguments)
            made.append(cluster)
            return stack.enter_context(cluster)

        yield make


@pytest.fixture
def cluster(make_cluster: MakeCluster) -> Cluster:
    """One worker with one slot."""
    return make_cluster()


@pytest.fixture(scope="class")
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MakeCluster]:
    """As ``make_cluster``, for the tests of a class that leave the cluster as they found it."""
    with _clusters(request.node, tmp_path_factory) as make:
        yield make


@pytest.fixture(scope="module")
def shared_by_all(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MakeCluster]:
    """As ``shared``, for the tests of a module."""
    with _clusters(request.node, tmp_path_factory) as make:
        yield make


@contextmanager
def _clusters(node: pytest.Item, folders: pytest.TempPathFactory) -> Iterator[MakeCluster]:
    made = node.stash.setdefault(CLUSTERS, [])
    with ExitStack() as stack:

        def make(**arguments: Any) -> Cluster:
            folder = folders.mktemp("shared")
            cluster = Cluster(folder / f"cluster-{len(made)}", **arguments)
            made.append(cluster)
            return stack.enter_context(cluster)

        yield make


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Where also the user goes that Postgres runs as; removed, whatever lies in it."""
    folder = Path(mkdtemp(prefix="flatlora-open-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for cluster in [made for node in item.listchain() for made in node.stash.get(CLUSTERS, [])]:
            report.sections.append((f"cluster in {cluster.folder}", cluster.logs()))
    return report
