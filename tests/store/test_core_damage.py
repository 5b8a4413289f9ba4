"""Bits that flip, disks that fail: an error or a refusal, never data."""

from collections.abc import Iterator

import pytest

from millpond.native import ffi, lib
from millpond.native.drivers import Op, SimOptions
from millpond.native.store import StoreOpenError
from store_support import BLOCK, VOLUME, World, Write, fill

OK = lib.MP_STATUS_OK


@pytest.fixture
def world() -> Iterator[World]:
    made = World().format().open()
    made.create(blocks=512)
    yield made
    made.close()


def find(world: World, needle: bytes) -> tuple[int, int]:
    """The segment and offset of some bytes on the disk."""
    for file in range(1, 20):
        try:
            data = world.sim.peek(file=file, offset_bytes=0, length_bytes=64 * BLOCK)
        except OSError:
            continue
        if (at := data.find(needle)) >= 0:
            return file, at
    raise AssertionError("not on the disk")


def flip(world: World, file: int, at: int) -> None:
    byte = world.sim.peek(file=file, offset_bytes=at, length_bytes=1)[0]
    world.sim.poke(file=file, offset_bytes=at, data=bytes([byte ^ 4]))


def incarnation(world: World) -> int:
    supers = ffi.new("struct mp_store_super[]", 2)
    ffi.memmove(supers, world.sim.peek(offset_bytes=0, length_bytes=2 * BLOCK), 2 * BLOCK)
    assert supers[0].generation == supers[1].generation
    return int(supers[0].incarnation)


def test_damaged_block_is_corrupt_and_its_neighbours_are_not(world: World) -> None:
    data = fill(1, 4)
    assert world.write([Write(0, data)], first=1) == OK
    file, at = find(world, data[BLOCK : BLOCK + 64])
    flip(world, file, at + 100)
    assert world.read(0, 4).status == lib.MP_STATUS_CORRUPT
    assert world.read(1, 1).status == lib.MP_STATUS_CORRUPT
    assert world.read(0, 1).data == data[:BLOCK]
    assert world.read(2, 2).data == data[2 * BLOCK :]
    assert world.store.counters()["checksum_errors"] == 2


def test_damaged_compressed_extent_is_corrupt(world: World) -> None:
    data = fill(1, 4, compressible=True)
    assert world.write([Write(0, data)], first=1) == OK
    file, at = find(world, data[:32])
    flip(world, file, at + 1)
    assert world.read(3, 1).status == lib.MP_STATUS_CORRUPT


def test_fault_skip_checksum_is_what_verification_prevents() -> None:
    world = World(test_faults=lib.MP_STORE_FAULT_SKIP_CHECKSUM).format().open()
    world.create()
    data = fill(1)
    assert world.write([Write(0, data)], first=1) == OK
    file, at = find(world, data[:64])
    flip(world, file, at)
    with pytest.raises(AssertionError):  # the cache's own check, in decode_read
        world.read(0, 1)
    world.close()


def test_damage_below_the_synced_point_refuses_to_open(world: World) -> None:
    first, second = fill(1), fill(2)
    assert world.write([Write(0, first)], first=1) == OK
    assert world.write([Write(1, second)], first=2) == OK
    world.settle(20)  # the evidence that the second was synced
    world.shut()
    before = world.sim.allocated_bytes
    for needle in (first, second):
        file, at = find(world, needle[:64])
        flip(world, file, at)
        for _ in range(2):
            with pytest.raises(
                StoreOpenError, match=f"segment {file} is damaged at offset"
            ) as caught:
                world.open()
            assert "\n" not in str(caught.value)
            world.shut()
        flip(world, file, at)
    assert world.sim.allocated_bytes == before
    world.open()
    assert world.read(0, 2).data == first + second


def test_damage_in_a_group_header_below_the_synced_point(world: World) -> None:
    assert world.write([Write(0, fill(1))], first=1) == OK
    world.settle(20)
    world.shut()
    file, at = find(world, fill(1)[:64])
    flip(world, file, at // BLOCK * BLOCK + 16)
    with pytest.raises(StoreOpenError, match="damaged"):
        world.open()


def test_damaged_checkpoint_refuses_to_open(world: World) -> None:
    assert world.write([Write(0, fill(1))], first=1) == OK
    assert world.checkpoint() == OK
    world.shut()
    file, at = find(world, VOLUME.hex().encode())
    supers = ffi.new("struct mp_store_super *")
    ffi.memmove(supers, world.sim.peek(offset_bytes=0, length_bytes=BLOCK), BLOCK)
    flip(world, supers.checkpoint_segment, supers.checkpoint_offset_bytes + 400)
    with pytest.raises(StoreOpenError, match="checkpoint in segment"):
        world.open()


def test_one_damaged_superblock_is_no_matter(world: World) -> None:
    assert world.write([Write(0, fill(1))], first=1) == OK
    assert world.checkpoint() == OK
    for copy in (0, 1):
        world.shut()
        flip(world, 0, copy * BLOCK + 40)
        world.open()
        assert world.read(0, 1).data == fill(1)
    world.shut()
    flip(world, 0, 40)
    flip(world, 0, BLOCK + 40)
    with pytest.raises(StoreOpenError, match="no valid Millpond superblock"):
        world.open()


def test_directory_without_a_store_refuses_to_open(world: World) -> None:
    world.shut()
    with pytest.raises(StoreOpenError):
        other = World()
        try:
            other.open()
        finally:
            other.close()


def test_damaged_map_page_is_corrupt(world: World) -> None:
    assert world.write([Write(0, fill(1))], first=1) == OK
    world.store.stop()
    world.shut()
    supers = ffi.new("struct mp_store_super *")
    ffi.memmove(supers, world.sim.peek(offset_bytes=0, length_bytes=BLOCK), BLOCK)
    for block in range(1, supers.checkpoint_offset_bytes // BLOCK):
        flip(world, supers.checkpoint_segment, block * BLOCK + 5)
    world.open()
    assert world.read(0, 1).status == lib.MP_STATUS_CORRUPT
    assert world.store.failure() is None


def test_every_open_has_an_incarnation_of_its_own(world: World) -> None:
    seen = {incarnation(world)}
    for _ in range(3):
        world.reopen()
        assert incarnation(world) > max(seen)
        seen.add(incarnation(world))


def test_fault_no_incarnation_is_what_the_superblock_prevents() -> None:
    world = World(test_faults=lib.MP_STORE_FAULT_NO_INCARNATION).format().open()
    first = incarnation(world)
    world.reopen()
    assert incarnation(world) == first
    world.close()


@pytest.mark.parametrize("op", [Op.WRITE, Op.SYNC])
def test_failed_write_or_sync_of_the_log_ends_acknowledging(world: World, op: Op) -> None:
    assert world.write([Write(0, fill(1))], first=1) == OK
    world.sim.set(SimOptions(latency_ns=1000, fail_io=1, fail_op=op))
    requests = [world.send_write([Write(n, fill(n))], first=n + 1) for n in (1, 2, 3)]
    assert [world.wait(r).status for r in requests] == [lib.MP_STATUS_IO] * 3
    assert world.write([Write(4, fill(4))], first=5) == lib.MP_STATUS_IO
    # Reads go on until the daemon has ended: a guest waits for the next one, and gets no error.
    assert world.read(0, 1).data == fill(1)
    assert world.checkpoint() == lib.MP_STATUS_IO
    assert "nothing is acknowledged" in (world.store.failure() or "")
    world.store.stop()
    world.reopen()
    assert world.read(0, 1).data == fill(1)
    assert world.store.failure() is None


def test_failure_that_nobody_waits_for_is_told_at_once(world: World) -> None:
    world.send_write([Write(0, fill(1))], first=1)
    world.store.hangup(1)  # no answer will wake the daemon
    world.sim.set(SimOptions(latency_ns=1000, fail_io=1, fail_op=Op.SYNC))
    world.sim.notified()
    while world.store.failure() is None:
        world.store.step(1000)
    assert world.sim.notified()


def test_failed_nth_io_for_every_n() -> None:
    """Whatever fails: what was acknowledged is there after reopening."""
    for nth in range(1, 60):
        world = World().format().open()
        world.create(blocks=64)
        world.sim.set(SimOptions(latency_ns=1000, fail_io=nth))
        acknowledged = 0
        for sequence in range(1, 8):
            if world.write([Write(sequence, fill(sequence, 3))], first=sequence) != OK:
                break
            acknowledged = sequence
            if sequence == 4:
                world.checkpoint()
        world.sim.set(SimOptions(latency_ns=1000))
        world.reopen()
        state = world.store.volume(VOLUME)
        assert state and state.applied_sequence >= acknowledged
        for sequence in range(1, state.applied_sequence + 1):
            assert world.read(sequence, 1).data == fill(sequence, 3)[:BLOCK]
        world.close()
