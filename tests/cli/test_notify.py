"""What daemons say to systemd, and the sockets that they take from it; no systemd is needed."""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import nbdclient
from millpond.cli.notify import Notifier, take_descriptors, take_listener, watched

COMMAND = [sys.executable, "-m", "millpond.cli.main"]
# As systemd starts a service: descriptor 3, and the environment that says whose it is.
HANDED_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "nbd"}
os.execv(sys.argv[2], sys.argv[2:])
"""


class Manager:
    """The service manager's end of the notification socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(60)

    def hear(self) -> str:
        """The next message."""
        return self.socket.recv(4096).decode()

    def hear_of(self, word: str) -> str:
        """The next message with this word in it; others pass."""
        while word not in (message := self.hear()):
            pass
        return message

    def silent_for(self, seconds: float) -> bool:
        """Nothing more is said; what was said before is thrown away."""
        self.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.hear()
        self.socket.settimeout(seconds)
        try:
            self.hear()
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(60)
        return False


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.socket.close()


def notifier_of(manager: Manager, **environ: str) -> Notifier:
    return Notifier.of_environment({"NOTIFY_SOCKET": str(manager.path), **environ})


def test_without_a_manager_nothing_happens() -> None:
    notifier = Notifier.of_environment({"WATCHDOG_USEC": "1000000"})
    notifier.ready("serving")
    notifier.stopping()
    assert notifier.watchdog_s is None


def test_states_are_one_message_each(manager: Manager) -> None:
    notifier = notifier_of(manager)
    notifier.ready("serving\nREADY=0")
    assert manager.hear() == "READY=1\nSTATUS=serving\\nREADY=0", "text cannot become a state"
    notifier.stopping()
    assert manager.hear() == "STOPPING=1"


def test_manager_answers_a_process_with_many_descriptors(manager: Manager) -> None:
    """As one that has taken a thousand connections."""
    many = [os.open("/dev/null", os.O_RDONLY)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    try:
        many += [os.dup(many[0]) for _ in range(1100)]
        notifier = notifier_of(manager)
        assert max(many) > 1024
        with ThreadPoolExecutor(1) as pool:
            settled = pool.submit(notifier.settled)
            data, barrier, _, _ = socket.recv_fds(manager.socket, 100, 4)
            assert data == b"BARRIER=1"
            os.close(*barrier)
            assert settled.result()
    finally:
        for each in many:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_abstract_address_of_the_manager() -> None:
    name = f"millpond-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}")
        Notifier(f"@{name}").ping()
        assert sock.recv(100) == b"WATCHDOG=1"


def test_descriptors_are_kept_and_forgotten_by_name(manager: Manager) -> None:
    notifier = notifier_of(manager)
    reading, writing = os.pipe()
    notifier.keep("device-0", [writing])
    os.close(writing)
    data, descriptors, _, _ = socket.recv_fds(manager.socket, 100, 4)
    assert data == b"FDSTORE=1\nFDNAME=device-0" and len(descriptors) == 1
    os.write(descriptors[0], b"alive")
    assert os.read(reading, 10) == b"alive"
    notifier.forget("device-0")
    assert manager.hear() == "FDSTOREREMOVE=1\nFDNAME=device-0"
    for descriptor in (reading, *descriptors):
        os.close(descriptor)


def test_settled_waits_until_the_manager_has_done_what_it_was_told(manager: Manager) -> None:
    async def scenario() -> None:
        settled = asyncio.ensure_future(asyncio.to_thread(notifier_of(manager).settled))
        receive = socket.recv_fds
        data, descriptors, _, _ = await asyncio.to_thread(receive, manager.socket, 100, 4)
        assert data == b"BARRIER=1"
        await asyncio.sleep(0.1)
        assert not settled.done()
        for descriptor in descriptors:
            os.close(descriptor)
        assert await settled

    asyncio.run(scenario())
    assert not Notifier(None).settled()


@pytest.mark.expects_warnings
def test_manager_that_is_gone_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier(str(tmp_path / "nobody"))
    notifier.ready("serving")
    notifier.ping()
    assert len(caplog.records) == 1


def test_watchdog_is_this_process_own(manager: Manager) -> None:
    ours = {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}
    assert notifier_of(manager, **ours).watchdog_s == 30
    assert notifier_of(manager, WATCHDOG_USEC="30000000").watchdog_s == 30
    assert notifier_of(manager, **ours | {"WATCHDOG_PID": "1"}).watchdog_s is None
    assert notifier_of(manager, WATCHDOG_USEC="soon").watchdog_s is None


def test_pings_stop_when_nothing_answers_inside(manager: Manager) -> None:
    async def serve() -> None:
        stuck = asyncio.Event()

        async def alive() -> None:
            if stuck.is_set():
                await asyncio.Event().wait()

        async with watched(Notifier(str(manager.path), watchdog_s=0.06), alive):
            for _ in range(3):
                assert await asyncio.to_thread(manager.hear) == "WATCHDOG=1"
            stuck.set()
            await asyncio.sleep(0.1)
            assert await asyncio.to_thread(manager.silent_for, 0.5)

    asyncio.run(serve())


def test_descriptors_of_systemd_are_taken_once_by_name() -> None:
    pairs = [os.pipe() for _ in range(2)]
    numbers = sorted(number for pair in pairs for number in pair)
    first = 200  # four in a row, where no test has any
    for index, number in enumerate(numbers):
        os.dup2(number, first + index)
        os.close(number)
    names = "nbd:device:device:device"
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "4", "LISTEN_FDNAMES": names}
    found = take_descriptors(environ, first=first)
    assert found == {"nbd": [200], "device": [201, 202, 203]}
    assert not os.get_inheritable(200)
    assert environ == {} and take_descriptors(environ, first=first) == {}
    for descriptor in range(first, first + 4):
        os.close(descriptor)


def test_descriptors_for_another_process_are_left_alone() -> None:
    assert take_descriptors({"LISTEN_PID": "1", "LISTEN_FDS": "1"}) == {}
    assert take_descriptors({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "many"}) == {}


def test_socket_that_does_not_listen_is_refused() -> None:
    one, other = socket.socketpair()
    with pytest.raises(OSError, match="one listening socket named 'nbd'"):
        take_listener({"nbd": [one.detach()]}, "nbd")
    other.close()
    assert take_listener({}, "nbd") is None


def serve(
    directory: Path, listener: socket.socket, *, store: str = "127.0.0.1:1", **environ: str
) -> "subprocess.Popen[str]":
    """`cache serve` as systemd starts it."""
    arguments = ["cache", "serve", str(directory / "cache"), "--store", store]
    arguments += ["--nbd", str(directory / "nbd.sock")]
    number = listener.fileno()
    return subprocess.Popen(
        [sys.executable, "-c", HANDED_OVER, str(number), *COMMAND, *arguments],
        pass_fds=[number],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environ,
    )


def test_cache_serves_the_socket_it_was_given_and_leaves_it_behind(
    tmp_path: Path, manager: Manager
) -> None:
    """Ready when it serves, alive while its engine answers, its socket there when it is not."""
    made = [*COMMAND, "cache", "format", str(tmp_path / "cache"), "--size", "256MiB"]
    subprocess.run(made, check=True, timeout=120)
    path = tmp_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        for _ in range(2):
            # Connected while nobody serves: it waits.
            with socket.socket(socket.AF_UNIX) as guest:
                guest.connect(str(path))
                process = serve(
                    tmp_path, listener, NOTIFY_SOCKET=str(manager.path), WATCHDOG_USEC="600000"
                )
                assert f"serving guests at {path}" in manager.hear_of("READY=1")
                guest.settimeout(30)
                assert guest.recv(8) == b"NBDMAGIC"
                manager.hear_of("WATCHDOG=1")
                process.send_signal(signal.SIGSTOP)
                assert manager.silent_for(1.0), "stopped, it says nothing"
                process.send_signal(signal.SIGCONT)
                manager.hear_of("WATCHDOG=1")
            process.terminate()
            manager.hear_of("STOPPING=1")
            assert process.wait(60) == 0, process.stderr and process.stderr.read()
            process.communicate()
            assert path.is_socket(), "it is not ours to remove"


def test_cache_refuses_a_socket_at_another_place_than_it_is_told(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "other.sock"))
        listener.listen()
        process = serve(tmp_path, listener)
        _, trouble = process.communicate(timeout=60)
    (line,) = (each for each in trouble.splitlines() if each.startswith("millpond: error: "))
    assert process.returncode == 2
    assert "make ListenStream= of millpond-cache.socket" in line


def start_store(directory: Path, manager: Manager) -> "subprocess.Popen[bytes]":
    """`store serve`, once it says that it is ready."""
    directory.mkdir()
    process = subprocess.Popen(
        [*COMMAND, "store", "serve", str(directory), "--format"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "600000"},
    )
    assert "store.sock" in manager.hear_of("READY=1")
    return process


def test_store_says_when_it_serves_and_when_it_stops(tmp_path: Path, manager: Manager) -> None:
    process = start_store(tmp_path / "store", manager)
    manager.hear_of("WATCHDOG=1")
    process.terminate()
    manager.hear_of("STOPPING=1")
    assert process.wait(60) == 0


def test_client_of_a_socket_that_was_handed_over(tmp_path: Path, manager: Manager) -> None:
    """From the socket to a volume: nothing depends on who has bound it."""
    store = start_store(tmp_path / "store", manager)
    address = f"unix:{tmp_path}/store/store.sock"
    for arguments in (
        ["volume", "create", "disk", "--size", "64MiB", "--store", address],
        ["cache", "format", str(tmp_path / "cache"), "--size", "256MiB"],
    ):
        subprocess.run([*COMMAND, *arguments], check=True, timeout=120)
    path = tmp_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        cache = serve(tmp_path, listener, store=address)
        with nbdclient.connect(f"nbd+unix:///disk?socket={path}") as client:
            client.write(0, b"w" * 4096)
            client.flush()
            assert client.read(0, 4096) == b"w" * 4096
        cache.terminate()
        _, trouble = cache.communicate(timeout=60)
        assert cache.returncode == 0, trouble
    store.terminate()
    assert store.wait(60) == 0
