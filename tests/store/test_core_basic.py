"""The store's core: apply and read, what is refused, checkpoints and reopening."""

from collections.abc import Iterator

import pytest

from millpond.native import lib
from millpond.native.drivers import SimOptions
from store_support import BLOCK, LINEAGE, VOLUME, World, Write, fill

OK = lib.MP_STATUS_OK


@pytest.fixture
def world() -> Iterator[World]:
    made = World().format().open()
    yield made
    made.close()


def test_what_was_written_is_read_back(world: World) -> None:
    world.create()
    data = fill(1, 7)
    assert world.write([Write(3, data)], first=1) == OK
    assert world.image(16) == bytes(3 * BLOCK) + data + bytes(6 * BLOCK)
    state = world.store.volume(VOLUME)
    assert state and state.applied_sequence == 1 and state.lineage == LINEAGE


def test_compressed_extents_survive_partial_overwrites(world: World) -> None:
    world.create()
    data = fill(1, 8, compressible=True)
    new = fill(2, 2)
    assert world.write([Write(0, data), Write(3, new)], first=1) == OK
    assert world.image(8) == data[: 3 * BLOCK] + new + data[5 * BLOCK :]


def test_a_sync_waits_for_the_writes_that_are_under_way() -> None:
    """Four batches on their way are one sync, not two or more."""
    world = World(SimOptions(latency_ns=1_000_000)).format(segment_bytes=32 << 20).open()
    world.create()
    before = world.store.counters()["syncs"]
    requests = [
        world.send_write([Write(number * 600, fill(number, 600))], first=number + 1)
        for number in range(4)
    ]
    assert [world.wait(request).status for request in requests] == [OK] * 4
    assert world.store.counters()["syncs"] == before + 1
    world.close()


def test_trim_reads_as_zeroes(world: World) -> None:
    world.create()
    assert world.write([Write(0, fill(1, 16)), Write(4, block_count=8)], first=1) == OK
    image = world.image(16)
    assert image[4 * BLOCK : 12 * BLOCK] == bytes(8 * BLOCK)
    assert image[: 4 * BLOCK] == fill(1, 16)[: 4 * BLOCK]


def test_everything_is_there_after_reopening(world: World) -> None:
    world.create()
    data = fill(1, 300)
    assert (
        world.write([Write(0, data[: 150 * BLOCK]), Write(150, data[150 * BLOCK :])], first=1) == OK
    )
    world.reopen()
    assert world.image(300) == data


def test_everything_is_there_after_checkpoint_and_reopening(world: World) -> None:
    world.create()
    data = fill(1, 100)
    assert world.write([Write(0, data)], first=1) == OK
    assert world.checkpoint() == OK
    assert world.write([Write(50, data[: 10 * BLOCK])], first=2) == OK
    world.reopen()
    assert world.image(100) == data[: 50 * BLOCK] + data[: 10 * BLOCK] + data[60 * BLOCK :]


def test_clean_stop_leaves_nothing_to_roll_forward(world: World) -> None:
    world.create()
    assert world.write([Write(0, fill(1, 4))], first=1) == OK
    world.store.stop()
    world.reopen()
    assert world.image(4) == fill(1, 4)
    assert world.store.counters()["applied_batches"] == 0


def test_deleted_volume_is_unknown(world: World) -> None:
    world.create()
    assert world.write([Write(0, fill(1, 4))], first=1) == OK
    assert world.delete() == OK
    assert world.store.volume(VOLUME) is None
    assert world.read(0, 1).status == lib.MP_STATUS_UNKNOWN_VOLUME
    assert world.write([Write(0, fill(1))], first=2) == lib.MP_STATUS_UNKNOWN_VOLUME
    assert world.delete() == lib.MP_STATUS_UNKNOWN_VOLUME
    world.settle()
    assert world.store.counters()["live_bytes"] == 0
