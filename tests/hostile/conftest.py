"""A real `millpond up` for clients that mean harm, or are merely broken."""

from collections.abc import Callable, Iterator

import pytest

import nbdclient
from millpondprocess import Millpond

SIZE_BYTES = 256 << 20
CACHE_BYTES = 1 << 30

Connect = Callable[[], nbdclient.NbdClient]


@pytest.fixture(scope="module")
def millpond(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Millpond]:
    """One process for all: what a hostile client does may not hurt the next test's client."""
    directory = tmp_path_factory.mktemp("up") / "millpond"
    with Millpond(directory, size_bytes=SIZE_BYTES, cache_bytes=CACHE_BYTES) as running:
        yield running
        assert running.alive(), f"millpond up died:\n{running.log()}"


@pytest.fixture(params=["simple", "structured"])
def connect(millpond: Millpond, request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Make clients; they are closed behind the test, and the server must then still serve."""
    clients = []

    def make() -> nbdclient.NbdClient:
        clients.append(nbdclient.connect(millpond.uri, allocation=request.param == "structured"))
        return clients[-1]

    yield make
    for client in clients:
        client.close()
    assert millpond.alive(), f"millpond up died:\n{millpond.log()}"
    with nbdclient.connect(millpond.uri) as survivor:
        survivor.read(0, 4096)


@pytest.fixture
def client(connect: Connect) -> nbdclient.NbdClient:
    """One client."""
    return connect()
