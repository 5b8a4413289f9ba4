"""The simulated world keeps its promises: order, time, failure; the same seed is the same world.

What a crash may leave is in test_driver_sim_crash.py.  Happy path: as the real driver.  Failure
modes: the nth io fails, the peer is slow or gone, the driver goes with ios in flight.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from driver_support import BLOCK, Event, Harness, block
from millpond.native.drivers import Op, Sim, SimOptions

READ, WRITE, HANGUP = 1, 2, 4
MIB = 1 << 20


@contextmanager
def world(**options: Any) -> Iterator[tuple[Sim, Harness]]:
    """A world with a device of 16 MiB and its first driver."""
    options.setdefault("device_bytes", 16 * MIB)
    with Sim(SimOptions(**options)) as sim:
        yield sim, Harness(sim.driver())


def test_a_write_reads_back_in_other_pieces() -> None:
    with world() as (sim, disk):
        data = b"".join(block(n) for n in range(64))
        assert disk.write(8 * BLOCK, data, pieces=7) == len(data)
        assert disk.read(8 * BLOCK, len(data), pieces=64) == data
        assert disk.read(0, BLOCK) == bytes(BLOCK)
        assert disk.sync() == 0
        assert disk.do(Op.CALL) == 0
        assert sim.allocated_bytes == len(data)
        assert [sim.count(op) for op in (Op.READ, Op.WRITE, Op.SYNC, Op.CALL)] == [2, 1, 1, 1]
        assert sim.io_count == 2
        disk.close()


def test_errors_are_those_of_a_real_disk() -> None:
    with world() as (_, disk):
        end = 16 * MIB
        assert disk.read(end, BLOCK) == -errno.EIO
        assert disk.write(end - BLOCK, block(1) + block(2)) == -errno.ENOSPC
        assert disk.do(Op.ALLOCATE, offset=end, length=BLOCK) == -errno.ENOSPC
        assert disk.do(Op.PUNCH, offset=end, length=BLOCK) == 0
        assert disk.read(0, BLOCK, file=1) == -errno.ENOENT
        assert disk.do(Op.CREATE, file=1) == -errno.ENOTSUP
        assert disk.length() == end and disk.length(1) == -errno.ENOENT
        assert disk.list() == [0]
        disk.close()


def test_files_come_grow_are_listed_and_go() -> None:
    with world(device_bytes=0) as (sim, disk):
        for number in (7, 0, 3):
            assert disk.do(Op.CREATE, file=number) == 0
        assert disk.do(Op.CREATE, file=3) == -errno.EEXIST
        assert disk.list() == [0, 3, 7]
        assert disk.read(0, BLOCK, file=3) == -errno.EIO
        assert disk.write(2 * BLOCK, block(5), file=3) == BLOCK
        assert disk.length(3) == 3 * BLOCK
        assert disk.read(0, 3 * BLOCK, file=3) == bytes(2 * BLOCK) + block(5)
        assert disk.do(Op.ALLOCATE, file=7, length=64 * MIB) == 0
        assert disk.length(7) == 64 * MIB
        assert sim.allocated_bytes == 64 * MIB + BLOCK
        assert disk.do(Op.PUNCH, file=7, offset=MIB, length=62 * MIB) == 0
        assert sim.allocated_bytes == 2 * MIB + BLOCK
        assert disk.do(Op.REMOVE, file=7) == 0
        assert disk.do(Op.REMOVE, file=7) == -errno.ENOENT
        assert sim.allocated_bytes == BLOCK
        assert disk.list() == [0, 3]
        disk.close()


def test_a_huge_device_that_is_mostly_unwritten_is_cheap() -> None:
    with world(device_bytes=1 << 43) as (sim, disk):
        for n in range(64):
            assert disk.write(n << 37, bytes(MIB)) == MIB
        assert disk.write((1 << 43) - BLOCK, block(1)) == BLOCK
        assert sim.allocated_bytes == 64 * MIB + BLOCK
        assert disk.read((1 << 43) - 2 * BLOCK, 2 * BLOCK) == bytes(BLOCK) + block(1)
        disk.close()


def in_flight(disk: Harness, count: int) -> list[int]:
    """Cookies in order of completion of count writes submitted at once."""
    for n in range(count):
        disk.queue(n, Op.WRITE, offset=n * BLOCK, data=block(n))
    disk.submit()
    return [event.cookie for event in disk.collect(count)]


def test_completions_are_in_order_unless_reordered() -> None:
    with world(latency_ns=1000) as (_, disk):
        assert in_flight(disk, 50) == list(range(50))
        disk.close()
    with world(reorder=True) as (_, disk):
        order = in_flight(disk, 50)
        assert order != list(range(50)) and sorted(order) == list(range(50))
        disk.close()


def test_nothing_completes_before_its_latency() -> None:
    for reorder in (False, True):
        with world(latency_ns=1_000_000, reorder=reorder) as (sim, disk):
            disk.queue(1, Op.WRITE, data=block(1))
            disk.submit()
            assert disk.wait(100_000) == 0
            assert 100_000 <= sim.now_ns < 110_000
            assert disk.wait(0) == 0
            assert disk.wait(-1) == 1
            assert 500_000 <= sim.now_ns <= 1_500_100
            disk.close()


def test_time_passes_only_in_waits() -> None:
    with world() as (sim, disk):
        start = sim.now_ns
        assert disk.wait(-1) == 0, "nothing can ever happen"
        assert disk.wait(5_000_000) == 0
        assert sim.now_ns - start >= 5_000_000
        sim.advance_ns(77)
        assert disk.now_ns() == sim.now_ns
        deadline = sim.now_ns + 10_000
        for _ in range(1000):
            assert disk.wait(0) == 0
        assert sim.now_ns >= deadline, "a core that polls until a deadline must reach it"
        disk.close()


def test_read_sees_the_disk_at_its_completion() -> None:
    with world(latency_ns=1000) as (_, disk):
        disk.queue(1, Op.WRITE, data=block(1))
        disk.queue(2, Op.READ, length=BLOCK)
        disk.submit()
        disk.collect(2)
        assert disk.data(2, BLOCK) == block(1)
        disk.close()


def test_wake_and_notify_are_seen_once() -> None:
    with world() as (sim, disk):
        disk.wake()
        assert disk.wait(-1) == 1
        assert disk.wait(-1) == 0
        assert not sim.notified()
        disk.notify()
        disk.notify()
        assert sim.notified() and not sim.notified()
        disk.close()


@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5])
def test_the_nth_io_fails_once(nth: int) -> None:
    with world(fail_io=nth, fail_errno=errno.ENOSPC) as (_, disk):
        results = [disk.write(0, block(1)), disk.sync(), disk.do(Op.CALL)]
        results += [disk.do(Op.READ, length=BLOCK), disk.do(Op.PUNCH, length=BLOCK), disk.sync()]
        failed = [n for n, result in enumerate(results) if result == -errno.ENOSPC]
        # A CALL is no I/O: not counted, never failed.
        assert failed == [[0, 1, 3, 4, 5][nth - 1]]
        disk.close()


def test_only_ios_of_the_chosen_kind_are_counted_for_failure() -> None:
    with world(fail_io=2, fail_op=Op.SYNC) as (sim, disk):
        results = [disk.sync(), disk.write(0, block(1)), disk.sync(), disk.sync()]
        assert results == [0, BLOCK, -errno.EIO, 0]
        sim.set(SimOptions(fail_io=1))
        assert sim.io_count == 0
        assert disk.write(0, block(2)) == -errno.EIO
        disk.close()


def test_a_failed_write_leaves_the_old_the_new_or_a_mixture() -> None:
    seen = set()
    for seed in range(60):
        with world(seed=seed, fail_io=2, tear=True) as (sim, disk):
            disk.write(0, block(1))
            assert disk.write(0, block(2)) == -errno.EIO
            sectors = sim.peek(offset_bytes=0, length_bytes=BLOCK)
            parts = {sectors[at : at + 512] for at in range(0, BLOCK, 512)}
            assert parts <= {block(1)[:512], block(2)[:512]}
            seen.add((len(parts), block(1)[:512] in parts))
            disk.close()
    assert seen == {(1, True), (1, False), (2, True)}


def test_peek_and_poke_at_any_byte() -> None:
    with world(device_bytes=4 * BLOCK) as (sim, disk):
        disk.write(0, block(1) * 4)
        sim.poke(offset_bytes=BLOCK - 3, data=b"damage")
        expected = bytearray(block(1) * 4)
        expected[BLOCK - 3 : BLOCK + 3] = b"damage"
        assert sim.peek(offset_bytes=0, length_bytes=4 * BLOCK) == bytes(expected)
        assert disk.read(0, 4 * BLOCK) == bytes(expected)
        for offset, length in ((4 * BLOCK, 1), (0, 4 * BLOCK + 1), (2**64 - 1, 2)):
            with pytest.raises(OSError) as caught:
                sim.peek(offset_bytes=offset, length_bytes=length)
            assert caught.value.errno == errno.EIO
        with pytest.raises(OSError) as caught:
            sim.poke(file=9, offset_bytes=0, data=b"x")
        assert caught.value.errno == errno.ENOENT
        disk.close()


def test_bytes_go_both_ways_through_a_socket() -> None:
    with world() as (sim, disk):
        number = sim.socket()
        assert disk.watch(number, READ, 5) == 0
        assert disk.wait(-1) == 0
        sim.push(number, b"hello")
        assert disk.wait(-1) == 1
        assert disk.take() == [Event(5, 0, READ, 0)]
        assert disk.receive(number, 3) == b"hel"
        assert disk.wait(-1) == 1, "level-triggered"
        assert disk.receive(number) == b"lo"
        assert disk.receive(number) == -errno.EAGAIN
        assert disk.send(number, b"world") == 5
        assert sim.pop(number, 2) == b"wo" and sim.pop(number) == b"rld" and sim.pop(number) == b""
        disk.close_socket(number)
        for use in (lambda: sim.pop(number), lambda: sim.push(number, b"x")):
            with pytest.raises(BrokenPipeError):
                use()
        disk.close()


def test_a_slow_peer_blocks_and_unblocks() -> None:
    with world() as (sim, disk):
        number = sim.socket()
        sim.limit(number, 4)
        assert disk.send(number, b"abcdef") == 4
        assert disk.send(number, b"ef") == -errno.EAGAIN
        assert disk.watch(number, WRITE, 1) == 0
        assert disk.wait(1000) == 0
        assert sim.pop(number, 1) == b"a"
        assert disk.wait(1000) == 1
        assert disk.take()[-1].ready == WRITE
        assert disk.send(number, b"ef") == 1
        disk.close()


def test_a_peer_that_hung_up_is_read_to_the_end() -> None:
    with world() as (sim, disk):
        number = sim.socket()
        sim.push(number, b"last")
        sim.hangup(number)
        disk.watch(number, 0, 1)
        assert disk.wait(1000) == 0, "interest 0 hears nothing"
        disk.watch(number, READ, 1)
        disk.wait()
        assert disk.take()[0].ready == READ | HANGUP
        assert disk.receive(number) == b"last"
        assert disk.receive(number) == b""
        assert disk.send(number, b"x") == -errno.EPIPE
        disk.close()


def test_a_socket_closed_within_the_batch_is_not_called() -> None:
    with world() as (sim, disk):
        numbers = [sim.socket(), sim.socket()]
        for cookie, number in enumerate(numbers):
            sim.push(number, b"x")
            disk.watch(number, READ, cookie)
        disk.close_on_ready(0, numbers[1])
        assert disk.wait() == 1
        assert [e.cookie for e in disk.take()] == [0]
        disk.close()


def test_streams_come_in_pieces_when_reordered() -> None:
    with world(reorder=True, seed=3) as (sim, disk):
        number = sim.socket()
        sent = bytes(range(256)) * 40
        sim.push(number, sent)
        pieces = []
        while isinstance(got := disk.receive(number, 1000), bytes):
            pieces.append(got)
        assert b"".join(pieces) == sent and len({len(p) for p in pieces}) > 2
        disk.close()


def history(seed: int) -> tuple[object, ...]:
    """Everything that can be seen of a world in which much happens, and then the power fails."""
    options = SimOptions(
        seed=seed,
        device_bytes=64 * BLOCK,
        lose_unsynced=True,
        tear=True,
        reorder=True,
        latency_ns=5000,
        crash_after_io=70,
    )
    seen: list[object] = []
    with Sim(options) as sim:
        disk = Harness(sim.driver())
        for n in range(100):
            op = Op.SYNC if n % 9 == 8 else Op.PUNCH if n % 7 == 6 else Op.WRITE
            data = block(n) * 2 if op == Op.WRITE else b""
            disk.queue(n, op, offset=n * 5 % 60 * BLOCK, data=data, length=2 * BLOCK)
            disk.submit()
            if n % 4 == 0:
                disk.wait()
        seen += [disk.take(), disk.random(16), sim.now_ns, sim.crashed]
        seen.append(disk.wait())
        disk.close()
        seen.append(sim.peek(offset_bytes=0, length_bytes=64 * BLOCK))
    return tuple(seen)


def test_the_same_seed_is_the_same_world() -> None:
    assert history(1) == history(1)
    assert len({repr(history(seed)) for seed in range(5)}) == 5


def test_chance_is_not_repeated_by_setting_the_same_seed_again() -> None:
    with world(seed=4) as (sim, disk):
        first = disk.random(16)
        sim.set(SimOptions(seed=4))
        assert disk.random(16) != first
        disk.close()


def test_ios_of_a_destroyed_driver_never_happen() -> None:
    with world(latency_ns=1000) as (sim, disk):
        disk.queue(1, Op.WRITE, data=block(1))
        disk.submit()
        disk.close()
        disk = Harness(sim.driver())
        assert disk.read(0, BLOCK) == bytes(BLOCK)
        disk.close()
