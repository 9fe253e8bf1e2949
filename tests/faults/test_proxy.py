"""Each fault of the proxy, as the two ends of a connection see it."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.faults.proxy import Proxy
from tests.faults.servers import PostgresServer
from tests.faults.summary import FAULTS
from tests.system.service import until

SILENCE = 0.3  # seconds in which an answer would have come a hundred times


class Echo:
    """Sends back what it gets, and knows which of its connections have ended."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.socket.getsockname()[1]
        self.received = b""
        self.opened = self.ended = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.opened += 1
            threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65536):
                    self.received += data
                    connection.sendall(data)
            except OSError:
                pass
            self.ended += 1

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


@pytest.fixture(autouse=True)
def _not_counted() -> Iterator[None]:
    """These faults meet an echo, and not the service."""
    before = FAULTS.copy()
    yield
    FAULTS.clear()
    FAULTS.update(before)


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy("127.0.0.1", echo.port, name="echo") as proxy:
        yield proxy


@pytest.fixture
def client(proxy: Proxy) -> Iterator[socket.socket]:
    with connect(proxy) as client:
        assert ask(client, b"hello") == b"hello"
        yield client


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def ask(client: socket.socket, data: bytes) -> bytes:
    client.sendall(data)
    answer = b""
    while len(answer) < len(data):
        part = client.recv(65536)
        if not part:
            break
        answer += part
    return answer


def is_silent(client: socket.socket) -> bool:
    """Open, and nothing comes."""
    client.settimeout(SILENCE)
    try:
        client.recv(1)
    except TimeoutError:
        return True
    finally:
        client.settimeout(5)
    return False


class TestPassThrough:
    def test_a_megabyte_comes_back_as_it_was(self, client: socket.socket) -> None:
        data = bytes(range(256)) * 4096
        sender = threading.Thread(target=client.sendall, args=(data,))
        sender.start()
        answer = b""
        while len(answer) < len(data):
            answer += client.recv(65536)
        sender.join()
        assert answer == data

    def test_an_end_on_either_side_is_an_end_on_the_other(
        self, client: socket.socket, proxy: Proxy, echo: Echo
    ) -> None:
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
        until(lambda: echo.ended == 1)
        until(lambda: proxy.connections == 0)

    def test_a_client_is_reset_where_nothing_listens_upstream(self) -> None:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            # The reset may come while the client is still connecting.
            with (
                Proxy(*nobody.getsockname()) as proxy,
                pytest.raises(ConnectionResetError),
                connect(proxy) as client,
            ):
                client.recv(1)


class TestCut:
    def test_open_connections_are_reset_on_both_sides_and_new_ones_refused(
        self, client: socket.socket, proxy: Proxy, echo: Echo
    ) -> None:
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        with pytest.raises(ConnectionRefusedError):
            connect(proxy)
        until(lambda: echo.ended == 1)

    def test_its_port_serves_again_afterwards(self, proxy: Proxy) -> None:
        for _ in range(20):
            proxy.cut()
            proxy.pass_through()
            with connect(proxy) as client:
                assert ask(client, b"again") == b"again"


class TestStall:
    def test_no_byte_passes_and_connections_stay_open(
        self, client: socket.socket, proxy: Proxy, echo: Echo
    ) -> None:
        proxy.stall()
        client.sendall(b"into the void")
        assert is_silent(client)
        assert b"void" not in echo.received
        assert echo.ended == 0

    def test_new_connections_are_taken_and_not_answered(self, proxy: Proxy, echo: Echo) -> None:
        proxy.stall()
        with connect(proxy) as client:
            client.sendall(b"anybody?")
            assert is_silent(client)
            assert echo.opened == 0

    def test_what_was_held_back_arrives_when_it_is_over(
        self, client: socket.socket, proxy: Proxy
    ) -> None:
        proxy.stall()
        with connect(proxy) as second:
            for stalled in (client, second):
                stalled.sendall(b"late")
            assert is_silent(client)
            proxy.pass_through()
            for stalled in (client, second):
                assert stalled.recv(4) == b"late"


class TestHalfOpen:
    def test_the_upstream_sees_an_end_and_the_client_nothing(
        self, client: socket.socket, proxy: Proxy, echo: Echo
    ) -> None:
        proxy.half_open()
        until(lambda: echo.ended == 1)
        client.sendall(b"still there?")
        assert is_silent(client)
        with connect(proxy) as new:
            assert is_silent(new)
        assert echo.opened == 1

    def test_it_does_not_heal_but_new_connections_pass(
        self, client: socket.socket, proxy: Proxy
    ) -> None:
        proxy.half_open()
        proxy.pass_through()
        client.sendall(b"still there?")
        assert is_silent(client)
        with connect(proxy) as new:
            assert ask(new, b"new") == b"new"

    def test_a_cut_ends_it(self, client: socket.socket, proxy: Proxy) -> None:
        proxy.half_open()
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            client.recv(1)


class TestSlow:
    def test_bytes_come_at_the_rate(self, client: socket.socket, proxy: Proxy) -> None:
        proxy.slow(20_000)
        started = time.monotonic()
        assert ask(client, bytes(5_000)) == bytes(5_000)
        assert 0.25 <= time.monotonic() - started < 2.5
        proxy.pass_through()
        started = time.monotonic()
        assert ask(client, bytes(40_000)) == bytes(40_000)
        assert time.monotonic() - started < 1.5  # two seconds at that rate


class TestCutAfter:
    def test_the_word_arrives_and_its_answer_does_not(
        self, client: socket.socket, proxy: Proxy, echo: Echo
    ) -> None:
        proxy.cut_after(b"PAY")
        assert ask(client, b"look") == b"look"
        with pytest.raises(ConnectionResetError):
            ask(client, b"please PAY now")
        assert echo.received.endswith(b"please PAY now")

    def test_a_word_in_two_parts_is_seen(
        self, client: socket.socket, proxy: Proxy, echo: Echo
    ) -> None:
        proxy.cut_after(b"PAY")
        assert ask(client, b"please P") == b"please P"
        with pytest.raises(ConnectionResetError):
            ask(client, b"AY now")

    def test_it_happens_once(self, client: socket.socket, proxy: Proxy) -> None:
        proxy.cut_after(b"PAY")
        with connect(proxy) as other:
            with pytest.raises(ConnectionResetError):
                ask(other, b"PAY")
            assert not proxy.is_armed
            assert ask(client, b"PAY") == b"PAY"

    def test_a_row_is_committed_although_the_client_saw_an_error(self, tmp_path: Path) -> None:
        with (
            PostgresServer(tmp_path) as postgres,
            Proxy("127.0.0.1", postgres.port, name="postgres") as proxy,
            psycopg.connect(postgres.url(), autocommit=True) as direct,
        ):
            direct.execute("CREATE TABLE paid (id int)")
            with psycopg.connect(postgres.url(port=proxy.port)) as connection:
                connection.execute("INSERT INTO paid VALUES (1)")
                proxy.cut_after(b"COMMIT")
                with pytest.raises(psycopg.OperationalError):
                    connection.commit()
            assert direct.execute("SELECT id FROM paid").fetchall() == [(1,)]

            with psycopg.connect(postgres.url(port=proxy.port)) as connection:
                connection.execute("INSERT INTO paid VALUES (2)")
                connection.commit()
            assert direct.execute("SELECT count(*) FROM paid").fetchone() == (2,)


class TestCount:
    def test_each_fault_counts_once_when_it_happens(
        self, client: socket.socket, proxy: Proxy
    ) -> None:
        before = FAULTS.copy()
        proxy.cut_after(b"PAY")
        assert proxy.faults == 0
        with pytest.raises(ConnectionResetError):
            ask(client, b"PAY")
        proxy.stall()
        proxy.cut()
        proxy.pass_through()
        assert proxy.faults == 3
        assert FAULTS - before == {
            "echo cut before the answer": 1,
            "echo stalled": 1,
            "echo cut": 1,
        }
