"""The real driver on a real file: what is read, what fails how, who is woken.

Happy path: bytes come back.  Failure modes: past the end, cut short, no such file, no O_DIRECT,
a socket closed by another one's event.
"""

import errno
import os
import resource
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driver_support import BLOCK, Event, Harness, block
from millpond.native import ffi, lib
from millpond.native.drivers import DriverError, Op, destroy, open_device, open_directory

HERE = Path(__file__).resolve().parents[2]  # the system's /tmp may have no O_DIRECT
DEVICE_BLOCKS = 1024
READ, WRITE, HANGUP = 1, 2, 4


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory on the disk of this worktree."""
    path = HERE / "build" / f"driver-test-{os.getpid()}"
    path.mkdir(parents=True)
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


@pytest.fixture
def device(folder: Path) -> Iterator[Harness]:
    """A device of DEVICE_BLOCKS."""
    path = folder / "device"
    with path.open("wb") as file:
        file.truncate(DEVICE_BLOCKS * BLOCK)
    harness = Harness(open_device(path))
    yield harness
    harness.close()


@pytest.fixture
def store(folder: Path) -> Iterator[Harness]:
    """A store directory."""
    harness = Harness(open_directory(folder))
    yield harness
    harness.close()


def test_a_write_reads_back_in_other_pieces(device: Harness) -> None:
    data = b"".join(block(n) for n in range(64))
    assert device.write(8 * BLOCK, data, pieces=7) == len(data)
    assert device.read(8 * BLOCK, len(data), pieces=64) == data
    assert device.read(9 * BLOCK, BLOCK) == block(1)
    assert device.read(0, BLOCK) == bytes(BLOCK)
    assert device.sync() == 0
    assert device.length() == DEVICE_BLOCKS * BLOCK
    assert device.list() == [0]


def test_an_empty_transfer_completes(device: Harness) -> None:
    assert device.do(Op.READ, length=0) == 0
    assert device.do(Op.WRITE, length=0) == 0
    assert device.do(Op.PUNCH, length=0) == 0


def test_past_the_end_of_the_device(device: Harness) -> None:
    end = DEVICE_BLOCKS * BLOCK
    assert device.read(end, BLOCK) == -errno.EIO
    assert device.read(end - BLOCK, 2 * BLOCK, pieces=2) == -errno.EIO
    assert device.write(end - BLOCK, block(1) + block(2)) == -errno.ENOSPC
    assert device.do(Op.ALLOCATE, offset=end, length=BLOCK) == -errno.ENOSPC
    assert device.length() == end
    assert device.read(0, BLOCK, file=1) == -errno.ENOENT
    assert device.do(Op.CREATE, file=1) == -errno.ENOTSUP


def test_the_end_of_a_file_inside_a_block(store: Harness, folder: Path) -> None:
    assert store.do(Op.CREATE, file=3) == 0
    os.truncate(folder / "0000000000000003.seg", BLOCK + 512)
    assert store.read(0, BLOCK, file=3) == bytes(BLOCK)
    assert store.read(0, 2 * BLOCK, file=3, pieces=2) == -errno.EIO
    assert store.read(BLOCK, BLOCK, file=3) == -errno.EIO


def test_a_write_that_the_kernel_cuts_short_goes_on_and_reports_why(store: Harness) -> None:
    """RLIMIT_FSIZE cuts the first part off; the continuation meets the limit itself."""
    assert store.do(Op.CREATE, file=1) == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * BLOCK, before[1]))
    try:
        data = b"".join(block(n) for n in range(8))
        assert store.write(0, data, file=1, pieces=3) == -errno.EFBIG
        assert store.write(0, data[: 3 * BLOCK], file=1, pieces=2) == 3 * BLOCK
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert store.read(0, 3 * BLOCK, file=1) == data[: 3 * BLOCK]
    assert store.length(1) == 3 * BLOCK


def test_a_thousand_ios_queued_at_once(device: Harness) -> None:
    for n in range(1000):
        device.queue(n, Op.WRITE, offset=n * BLOCK, data=block(n))
    device.submit()
    events = device.collect(1000)
    assert sorted(e.cookie for e in events) == list(range(1000))
    assert {e.result for e in events} == {BLOCK}
    for n in range(1000):
        device.queue(n, Op.READ, offset=n * BLOCK, length=BLOCK)
    device.submit()
    device.collect(1000)
    assert all(device.data(n, BLOCK) == block(n) for n in range(1000))


def test_punch_gives_space_back_and_reads_as_zeroes(store: Harness, folder: Path) -> None:
    path = folder / "0000000000000005.seg"
    assert store.do(Op.CREATE, file=5) == 0
    assert store.write(0, block(1) * 256, file=5) == 256 * BLOCK
    used = path.stat().st_blocks
    assert store.do(Op.PUNCH, file=5, offset=16 * BLOCK, length=64 * BLOCK) == 0
    assert path.stat().st_blocks == used - 64 * BLOCK // 512
    assert store.read(15 * BLOCK, 2 * BLOCK, file=5) == block(1) + bytes(BLOCK)
    assert store.length(5) == 256 * BLOCK


def test_allocate_reserves_and_lengthens(store: Harness, folder: Path) -> None:
    assert store.do(Op.CREATE, file=5) == 0
    assert store.do(Op.ALLOCATE, file=5, length=256 * BLOCK) == 0
    assert store.length(5) == 256 * BLOCK
    assert (folder / "0000000000000005.seg").stat().st_blocks >= 256 * BLOCK // 512
    assert store.read(255 * BLOCK, BLOCK, file=5) == bytes(BLOCK)
    assert store.do(Op.ALLOCATE, file=6, length=BLOCK) == -errno.ENOENT


def test_files_come_are_listed_and_go(store: Harness, folder: Path) -> None:
    numbers = [0, 1, 17, 0xFEDCBA9876543210]
    for name in ("notes.txt", "1.seg", "000000000000000A.seg", "0000000000000001.segx"):
        (folder / name).touch()
    for number in reversed(numbers):
        assert store.do(Op.CREATE, file=number) == 0
    assert store.do(Op.CREATE, file=17) == -errno.EEXIST
    assert store.list() == numbers
    assert store.length(17) == 0 and store.length(18) == -errno.ENOENT
    assert store.do(Op.REMOVE, file=17) == 0
    assert store.do(Op.REMOVE, file=17) == -errno.ENOENT
    assert store.list() == [0, 1, 0xFEDCBA9876543210]
    assert store.read(0, BLOCK, file=17) == -errno.ENOENT
    assert store.sync(file=17) == -errno.ENOENT


def test_a_new_file_of_an_old_number_is_not_the_old_file(store: Harness) -> None:
    assert store.do(Op.CREATE, file=2) == 0
    assert store.write(0, block(1), file=2) == BLOCK
    assert store.do(Op.REMOVE, file=2) == 0
    assert store.do(Op.CREATE, file=2) == 0
    assert store.read(0, BLOCK, file=2) == -errno.EIO
    assert store.write(0, block(2), file=2) == BLOCK
    assert store.read(0, BLOCK, file=2) == block(2)


def test_more_files_than_descriptors_are_kept(store: Harness) -> None:
    count = 700  # MP_LINUX_FILES is 512
    for n in range(count):
        store.queue(n, Op.CREATE, file=n)
    store.submit()
    assert {e.result for e in store.collect(count)} == {0}
    for turn in range(2):
        for n in range(count):
            store.queue(n, Op.WRITE, file=n, data=block(turn * count + n))
        store.submit()
        assert {e.result for e in store.collect(count)} == {BLOCK}
    assert all(store.read(0, BLOCK, file=n) == block(count + n) for n in (0, 1, 350, 698, 699))
    assert len(os.listdir("/proc/self/fd")) < 600


def test_a_call_runs_in_another_thread(device: Harness) -> None:
    assert device.do(Op.CALL) == 1


def test_the_clock_is_monotonic_and_a_wait_times_out(device: Harness) -> None:
    before = device.now_ns()
    assert device.wait(2_000_000) == 0
    assert device.now_ns() >= before + 2_000_000
    assert device.wait(0) == 0
    assert device.random(32) != device.random(32)


def test_a_wake_from_another_thread_ends_an_endless_wait(device: Harness) -> None:
    for _ in range(20):
        thread = threading.Thread(target=device.wake)
        thread.start()
        device.wait(-1)
        thread.join()


def test_wakes_before_the_wait_are_not_lost(device: Harness) -> None:
    for _ in range(3):
        device.wake()
    assert device.wait(-1) == 1
    assert device.wait(0) == 0


def test_wakes_and_ios_and_calls_race(device: Harness) -> None:
    stop = threading.Event()

    def wakes() -> None:
        while not stop.is_set():
            device.wake()

    thread = threading.Thread(target=wakes)
    thread.start()
    for n in range(300):
        device.queue(2 * n, Op.CALL)
        device.queue(2 * n + 1, Op.READ, offset=n * BLOCK, length=BLOCK)
        device.submit()
        assert len(device.collect(2)) == 2
    stop.set()
    thread.join()


def test_notify_makes_the_eventfd_readable(device: Harness) -> None:
    fd = lib.mp_driver_linux_notify_fd(device.driver)
    assert not select.select([fd], [], [], 0)[0]
    for _ in range(3):
        device.notify()
    assert select.select([fd], [], [], 0)[0]
    assert os.eventfd_read(fd) == 3
    assert not select.select([fd], [], [], 0)[0]


def test_readiness_of_a_socket_pair(device: Harness) -> None:
    ours, theirs = socket.socketpair()
    fd = ours.detach()
    assert device.receive(fd) == -errno.EAGAIN
    assert device.watch(fd, READ, 7) == 0
    device.wait(0)
    assert device.take() == []
    theirs.send(b"hello")
    device.wait()
    assert [(e.cookie, e.ready) for e in device.take()] == [(7, READ)]
    device.wait(0)  # level-triggered
    assert [(e.cookie, e.ready) for e in device.take()] == [(7, READ)]
    assert device.watch(fd, READ | WRITE, 8) == 0
    device.wait()
    assert [(e.cookie, e.ready) for e in device.take()] == [(8, READ | WRITE)]
    assert device.receive(fd) == b"hello"
    assert device.send(fd, b"world") == 5
    assert theirs.recv(10) == b"world"
    theirs.close()
    assert device.watch(fd, READ, 8) == 0
    device.wait()
    assert [(e.cookie, e.ready) for e in device.take()] == [(8, READ | HANGUP)]
    assert device.receive(fd) == b""
    assert device.send(fd, b"x") == -errno.EPIPE
    assert device.watch(fd, 0, 8) == 0
    device.wait(0)
    assert device.take() == []
    device.close_socket(fd)
    with pytest.raises(OSError):
        os.fstat(fd)


def test_a_full_socket_would_block(device: Harness) -> None:
    ours, theirs = socket.socketpair()
    fd = ours.detach()
    while device.send(fd, bytes(65536)) > 0:
        pass
    assert device.send(fd, b"x") == -errno.EAGAIN
    theirs.close()
    device.close_socket(fd)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_socket_closed_within_the_batch_is_not_called(device: Harness, replaced: bool) -> None:
    """Its event is already in the batch; the one that gets its number must not hear it either."""
    pairs = [socket.socketpair() for _ in range(2)]
    fds = [ours.detach() for ours, _ in pairs]
    for cookie, fd in enumerate(fds):
        assert device.watch(fd, READ, cookie) == 0
    for _, theirs in pairs:
        theirs.close()
    quiet, other = socket.socketpair()
    device.close_on_ready(0, fds[1], quiet.fileno() if replaced else -1)
    assert device.wait() == 1
    assert [(e.cookie, e.ready) for e in device.take()] == [(0, READ | HANGUP)]
    device.close_socket(fds[0])
    other.send(b"x")
    assert device.wait(1000) == replaced
    assert [e.cookie for e in device.take()] == [1000] * replaced
    if replaced:
        device.close_socket(fds[1])
    quiet.close()
    other.close()


def test_a_polled_file_needs_no_sockets(device: Harness) -> None:
    device.queue(1, Op.READ, length=BLOCK)
    device.submit()
    events: list[Event] = []
    while not events:
        assert device.wait(0) >= 0
        events = device.take()
    assert events[0].result == BLOCK


def test_a_device_in_use_is_refused_in_one_line(device: Harness, folder: Path) -> None:
    with pytest.raises(DriverError, match="device: in use by another process"):
        open_device(folder / "device")


def test_a_store_in_use_is_refused_in_one_line(store: Harness, folder: Path) -> None:
    with pytest.raises(DriverError, match="in use by another process"):
        open_directory(folder)


def test_what_is_not_there_is_said_in_one_line(folder: Path) -> None:
    with pytest.raises(DriverError, match="nothing: No such file or directory"):
        open_device(folder / "nothing")
    with pytest.raises(DriverError, match="null: neither a file nor a block device"):
        open_device("/dev/null")
    with pytest.raises(DriverError, match="null: Not a directory"):
        open_directory("/dev/null")


def test_a_file_system_without_o_direct_is_refused_in_one_line(folder: Path) -> None:
    with pytest.raises(DriverError, match="no O_DIRECT; use one on a disk"):
        open_device("/proc/self/comm")


def test_a_device_without_o_direct_is_refused(folder: Path) -> None:
    fd = os.open(folder / "plain", os.O_RDWR | os.O_CREAT)
    assert lib.mp_driver_linux_device(fd) == ffi.NULL
    assert ffi.errno == errno.EINVAL
    os.close(fd)


def test_destroy_closes_all_descriptors(folder: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    driver = open_directory(folder)
    harness = Harness(driver)
    ours, theirs = socket.socketpair()
    harness.watch(ours.detach(), READ, 1)
    assert harness.do(Op.CREATE, file=1) == 0
    assert harness.write(0, block(1), file=1) == BLOCK
    harness.close()
    theirs.close()
    assert set(os.listdir("/proc/self/fd")) == before
    destroy(open_directory(folder))


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["write", "punch"]), st.integers(0, 31), st.integers(1, 16)),
        min_size=1,
        max_size=20,
    )
)
def test_any_sequence_reads_as_the_model(steps: list[tuple[str, int, int]]) -> None:
    path = HERE / "build" / f"driver-model-{os.getpid()}"
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.truncate(64 * BLOCK)
    harness = Harness(open_device(path))
    model = bytearray(64 * BLOCK)
    try:
        for token, (kind, first, count) in enumerate(steps, start=1):
            span = slice(first * BLOCK, (first + count) * BLOCK)
            if kind == "write":
                data = block(token) * count
                assert harness.write(first * BLOCK, data, pieces=1 + token % 4) == len(data)
            else:
                data = bytes(count * BLOCK)
                offset, length = first * BLOCK, len(data)
                assert harness.do(Op.PUNCH, offset=offset, length=length) == 0
            model[span] = data
        assert harness.read(0, len(model), pieces=5) == bytes(model)
    finally:
        harness.close()
        path.unlink()
