"""The listener and its handshakes over real sockets, in front of a transmission loop in memory."""

import asyncio
import grp
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvloop

import nbdclient
from millpond.cache.exports import Export, ExportError
from millpond.nbd import wire
from millpond.nbd.errors import ListenError
from millpond.nbd.limits import NbdLimits
from millpond.nbd.server import NbdServer
from millpond.nbd.wire import Command, CommandFlag, Error, Option, OptionReply, TransmissionFlag
from nbdclient import ConnectionLost, Negotiation, OptionRefused, connect, connect_socket
from nbdmemory import MemoryExports, MemoryOpenExport

# Every situation here is one that the server warns about.
pytestmark = pytest.mark.expects_warnings

T = TypeVar("T")
VOLUME = Export("vol", 1 << 20, False, "a disk")
READ_ONLY = Export("ro", 1 << 20, True, "")


class LoopThread:
    """An event loop in a thread, so that tests are ordinary blocking clients."""

    def __init__(self, factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self.loop = factory()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run in the loop and wait."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout=30)

    def stop(self) -> None:
        """Nothing may be left running."""
        tasks = [task for task in asyncio.all_tasks(self.loop) if not task.done()]
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=10)
        self.loop.close()
        assert tasks == []


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> Iterator[LoopThread]:
    """Both loops: sockets that change their owner are where they could differ."""
    thread = LoopThread(request.param)
    yield thread
    thread.stop()


class Served:
    """A server in front of memory exports, at a path."""

    def __init__(self, loop: LoopThread, directory: Path) -> None:
        self.loop = loop
        self.path = str(directory / "nbd.sock")
        self.exports = MemoryExports(VOLUME, READ_ONLY)
        self.engine_connections = 0
        self.server: NbdServer | None = None

    def start(self, **limits: Any) -> NbdServer:
        """Listen."""
        server = NbdServer(
            self.exports,
            limits=NbdLimits(**limits),
            engine_connections=lambda: self.engine_connections,
        )
        self.server = server
        # In the loop's thread: a semaphore and tasks belong to it.
        self.loop.run(server.serve_unix(self.path))
        return server

    def uri(self, name: str = "vol") -> str:
        """Of an export."""
        return f"nbd+unix:///{name}?socket={self.path}"

    def stop(self) -> None:
        """Close the server, then the connections that it gave away."""
        if self.server is not None:
            self.loop.run(self.server.close())
        self.exports.stop()


@pytest.fixture
def served(loop: LoopThread, tmp_path: Path) -> Iterator[Served]:
    """Not started yet, so that a test can choose limits."""
    served = Served(loop, tmp_path)
    yield served
    served.stop()


def wait_until(condition: Callable[[], bool]) -> None:
    """Something that another thread is about to do."""
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize("option", ["go", "export_name"])
def test_a_client_negotiates_and_uses_its_disk(served: Served, option: Any) -> None:
    served.start()
    with connect(served.uri(), option=option) as client:
        assert client.size_bytes == VOLUME.size_bytes
        assert TransmissionFlag.CAN_MULTI_CONN in client.flags
        client.write(1000, b"hello", fua=True)
        client.flush()
        assert client.read(998, 9) == b"\0\0hello\0\0"
        client.trim(1000, 2)
        client.zeroes(1004, 1, no_hole=True)
        assert client.read(1000, 5) == b"\0\0ll\0"
        assert client.disconnect() == []


def test_requests_sent_behind_the_last_option_reach_the_engine(served: Served) -> None:
    served.start()
    sock = connect_socket(served.uri())
    name = nbdclient.info_data("vol")
    go = wire.OPTION_HEADER.pack(wire.OPTION_MAGIC, Option.GO, len(name)) + name
    request = nbdclient.Request(77, Command.WRITE, 0, 5, 0)
    sock.sendall(b"\0\0\0\3" + go + nbdclient.request_bytes(request) + b"hello")
    negotiation = Negotiation(sock)
    negotiation.receive(18)
    while negotiation.receive_reply(Option.GO)[0] != OptionReply.ACK:
        pass
    with nbdclient.NbdClient(sock, negotiation) as client:
        client.expect(request)
        assert client.wait(77).error == Error.OK
        assert client.read(0, 5) == b"hello"


def test_list_and_info_open_nothing(served: Served) -> None:
    server = served.start()
    with connect_socket(served.uri()) as sock:
        negotiation = Negotiation(sock)
        negotiation.greet()
        assert negotiation.list_exports() == ["vol", "ro"]
        negotiation.info("vol")
        assert (negotiation.name, negotiation.description) == ("vol", "a disk")
        assert negotiation.block_sizes == (1, 4096, 32 << 20)
        negotiation.abort()
        assert sock.recv(1) == b""
    assert served.exports.opened == 0
    wait_until(lambda: server.counts["the client aborted"] == 1)


def test_refusals_reach_the_client_with_their_message(served: Served) -> None:
    served.start()
    with connect_socket(served.uri()) as sock:
        negotiation = Negotiation(sock)
        negotiation.greet()
        with pytest.raises(OptionRefused, match="there is no volume 'nope'") as caught:
            negotiation.go("nope")
        assert caught.value.reply == OptionReply.ERR_UNKNOWN
        served.exports.refusal = ExportError("busy", "vol is open at host b")
        with pytest.raises(OptionRefused, match="vol is open at host b") as caught:
            negotiation.go("vol")
        assert caught.value.reply == OptionReply.ERR_POLICY
        served.exports.refusal = ExportError("away", "vol: no store")
        with pytest.raises(OptionRefused, match="vol: no store") as caught:
            negotiation.go("vol")
        assert caught.value.reply == OptionReply.ERR_PLATFORM
        served.exports.refusal = None
        negotiation.go("vol")
    with connect_socket(served.uri()) as sock, pytest.raises(ConnectionLost):
        negotiation = Negotiation(sock)
        negotiation.greet()
        negotiation.export_name("nope")


def test_read_only_export_refuses_writes(served: Served) -> None:
    served.start()
    with connect(served.uri("ro")) as client:
        assert TransmissionFlag.READ_ONLY in client.flags
        with pytest.raises(nbdclient.NbdReplyError) as caught:
            client.write(0, b"x")
        assert caught.value.error == Error.EPERM
        assert client.read(0, 1, flags=CommandFlag.FUA) == b"\0"


def test_idle_handshakes_do_not_block_others_and_end_by_the_deadline(served: Served) -> None:
    server = served.start(client_timeout_s=0.5)
    idle = [connect_socket(served.uri()) for _ in range(30)]
    with connect(served.uri()) as client:
        client.write(0, b"served")
    for sock in idle:
        assert len(sock.recv(100)) == 18
        assert sock.recv(100) == b""
        sock.close()
    assert server.counts["client too slow"] == 30


def test_dripping_bytes_does_not_buy_time(served: Served) -> None:
    served.start(client_timeout_s=0.5)
    with connect_socket(served.uri()) as sock:
        try:
            for byte in b"\0\0\0\3IHAVEOPT" + bytes(100):
                sock.sendall(bytes([byte]))
                time.sleep(0.05)
        except BrokenPipeError:
            return
    raise AssertionError("a handshake of five seconds was let through")


def test_more_handshakes_than_allowed_wait_for_their_turn(served: Served) -> None:
    served.start(handshakes_max=2, client_timeout_s=0.5)
    idle = [connect_socket(served.uri()) for _ in range(2)]
    with connect(served.uri()) as client:  # after the first two have run out of time
        client.write(0, b"served")
    for sock in idle:
        sock.close()


def test_connections_in_the_engine_count_towards_the_limit(served: Served) -> None:
    server = served.start(handshakes_max=2, connections_max=5)
    served.engine_connections = 5
    with pytest.raises((ConnectionLost, ConnectionResetError)):
        connect(served.uri())
    served.engine_connections = 4
    connect(served.uri()).close()
    assert server.counts["too many connections"] == 1


def test_errors_are_logged_once_per_kind(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    server = served.start()
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            with connect_socket(served.uri()) as sock:
                sock.sendall(b"\xff\xff\xff\xff")
                sock.recv(18)
                assert sock.recv(1) == b""
        connect_socket(served.uri()).close()  # a probe is not worth a line
        wait_until(lambda: server.counts["client left"] == 1)
    assert server.counts["unknown client flags"] == 5
    assert len(caplog.records) == 1
    assert "0xffffffff" in caplog.text


def test_client_that_leaves_inside_an_option_is_forgotten(served: Served) -> None:
    server = served.start()
    with connect_socket(served.uri()) as sock:
        assert len(sock.recv(18)) == 18  # unread bytes would turn the end into a reset
        sock.sendall(b"\0\0\0\3IHAVEOPT\0")
    wait_until(lambda: server.counts["left inside an option"] == 1)


class SlowExports(MemoryExports):
    """Opens when told to."""

    def __init__(self, loop: LoopThread, *exports: Export) -> None:
        super().__init__(*exports)
        self._loop = loop.loop
        self.gate = asyncio.Event()

    async def open(self, name: str) -> MemoryOpenExport:
        """Wait for the gate."""
        await self.gate.wait()
        return await super().open(name)

    def let_go(self) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self.gate.set)


def test_a_slow_store_is_not_the_clients_fault(served: Served, loop: LoopThread) -> None:
    served.exports = exports = SlowExports(loop, VOLUME)
    served.start(client_timeout_s=0.3)
    timer = threading.Timer(1.0, exports.let_go)
    timer.start()
    with connect(served.uri("")) as client:
        assert client.name == "vol"
    timer.join()


def test_a_store_that_never_answers_is_a_refusal(served: Served, loop: LoopThread) -> None:
    served.exports = SlowExports(loop, VOLUME)
    served.start(export_timeout_s=0.3)
    with pytest.raises(OptionRefused, match="did not answer in time") as caught:
        connect(served.uri())
    assert caught.value.reply == OptionReply.ERR_PLATFORM


class SocketKiller(MemoryExports):
    """The client is gone when its export is open."""

    async def open(self, name: str) -> MemoryOpenExport:
        """Shut the only client down first."""
        self.client.shutdown(socket.SHUT_RDWR)
        self.client.close()
        return await super().open(name)

    client: socket.socket


def test_client_that_leaves_during_open_releases_the_export(served: Served) -> None:
    served.exports = exports = SocketKiller(VOLUME)
    served.start()
    exports.client = sock = connect_socket(served.uri())
    negotiation = Negotiation(sock)
    negotiation.greet()
    negotiation.send_option(Option.GO, nbdclient.info_data("vol"))
    wait_until(lambda: exports.disks["vol"].released == 1)
    assert exports.disks["vol"].sockets == []


def test_close_drains_a_handshake_under_way(served: Served, loop: LoopThread) -> None:
    served.exports = exports = SlowExports(loop, VOLUME)
    server = served.start()
    with connect_socket(served.uri()) as sock:
        negotiation = Negotiation(sock)
        negotiation.greet()
        negotiation.send_option(Option.GO, nbdclient.info_data("vol"))
        timer = threading.Timer(0.3, exports.let_go)
        timer.start()
        loop.run(server.close())
        assert negotiation.receive_reply(Option.GO)[0] == OptionReply.INFO
        timer.join()
    assert not os.path.exists(served.path)


def test_close_cuts_what_does_not_finish(served: Served, loop: LoopThread) -> None:
    served.exports = SlowExports(loop, VOLUME)
    server = served.start(drain_timeout_s=0.2)
    idle = connect_socket(served.uri())
    with connect_socket(served.uri()) as sock:
        negotiation = Negotiation(sock)
        negotiation.greet()
        negotiation.send_option(Option.GO, nbdclient.info_data("vol"))
        loop.run(server.close())
        assert sock.recv(1) == b""
    assert len(idle.recv(100)) == 18
    assert idle.recv(100) == b""
    idle.close()
    loop.run(server.close())  # twice is harmless


def test_established_connections_survive_the_close_of_the_listener(
    served: Served, loop: LoopThread
) -> None:
    server = served.start()
    with connect(served.uri()) as client:
        loop.run(server.close())
        client.write(0, b"still here")
        assert client.read(0, 10) == b"still here"


def test_socket_has_its_mode_and_group(served: Served, loop: LoopThread) -> None:
    served.start()
    found = os.stat(served.path)
    assert stat.S_IMODE(found.st_mode) == 0o660
    own = grp.getgrgid(os.getgid()).gr_name
    groups: list[str | int] = [own, os.getgid()]
    for number, group in enumerate(groups):
        server = NbdServer(served.exports)
        path = f"{served.path}.{number}"
        loop.run(server.serve_unix(path, mode=0o600, group=group))
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert os.stat(path).st_gid == os.getgid()
        loop.run(server.close())


def test_stale_socket_file_is_replaced(served: Served) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(served.path)
        dead.listen()
    served.start()
    connect(served.uri()).close()


def test_socket_that_somebody_answers_on_is_left_alone(served: Served, loop: LoopThread) -> None:
    served.start()
    second = NbdServer(served.exports)
    with pytest.raises(ListenError, match="another process serves there"):
        loop.run(second.serve_unix(served.path))
    connect(served.uri()).close()


def test_live_socket_with_a_full_backlog_is_left_alone(served: Served, loop: LoopThread) -> None:
    with socket.socket(socket.AF_UNIX) as live, socket.socket(socket.AF_UNIX) as waiting:
        live.bind(served.path)
        live.listen(0)
        waiting.connect(served.path)
        with pytest.raises(ListenError, match="another process serves there"):
            loop.run(NbdServer(served.exports).serve_unix(served.path))
        assert os.path.exists(served.path)


def test_what_is_not_a_socket_is_left_alone(served: Served) -> None:
    Path(served.path).write_text("precious")
    with pytest.raises(ListenError, match="not a socket"):
        served.start()
    assert Path(served.path).read_text() == "precious"


@pytest.mark.parametrize(
    ("path", "group", "text"),
    [
        ("/nonexistent/nbd.sock", None, "No such file"),
        ("/tmp/" + "x" * 200, None, "too long"),
        (None, "no-such-group", "there is no group"),
    ],
)
def test_reasons_not_to_listen(
    served: Served, loop: LoopThread, path: str | None, group: str | None, text: str
) -> None:
    with pytest.raises(ListenError, match=text) as caught:
        loop.run(NbdServer(served.exports).serve_unix(path or served.path, group=group))
    assert "\n" not in str(caught.value)


def test_close_leaves_a_successors_socket_file_alone(served: Served, loop: LoopThread) -> None:
    server = served.start()
    os.unlink(served.path)
    with socket.socket(socket.AF_UNIX) as successor:
        successor.bind(served.path)
        loop.run(server.close())
        assert os.path.exists(served.path)


def test_failing_accept_pauses_and_is_logged_once(
    served: Served, loop: LoopThread, caplog: pytest.LogCaptureFixture
) -> None:
    server = served.start(accept_pause_s=0.02)
    deaf = socket.socket(socket.AF_UNIX)  # never listens: each accept fails, as without descriptors
    deaf.setblocking(False)
    loop.loop.call_soon_threadsafe(server.serve_socket, deaf)
    wait_until(lambda: server.counts["cannot accept"] >= 5)
    connect(served.uri()).close()
    loop.run(server.close())
    assert len(caplog.records) == 1


class BrokenExports(MemoryExports):
    """A bug of ours."""

    async def describe(self, name: str) -> Export:
        """Break."""
        raise RuntimeError("a bug")


def test_bug_behind_one_client_does_not_end_the_listener(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    served.exports = BrokenExports(VOLUME)
    server = served.start()
    with connect_socket(served.uri()) as sock:
        negotiation = Negotiation(sock)
        negotiation.greet()
        with pytest.raises(ConnectionLost):
            negotiation.info("vol")
    assert server.counts["internal error"] == 1
    assert "RuntimeError: a bug" in caplog.text
    connect(served.uri()).close()
