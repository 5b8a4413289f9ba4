"""A client that comes again: what it left on its old connection may not overtake what is newer."""

from collections.abc import Iterator

import pytest

from millpond.native.engine import EngineOptions
from sim.rig import BLOCK, READ, WRITE, Rig

VOLUME = b"volume of a test"


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A cache and a store with an open volume."""
    rig = Rig()
    rig.start()
    rig.open(VOLUME)
    yield rig
    rig.close()


def test_write_that_waits_for_memory_does_not_come_after_newer_ones() -> None:
    rig = Rig(options=EngineOptions(buffer_bytes=1))  # the least there is
    rig.start()
    rig.open(VOLUME)
    old = rig.connect(VOLUME)
    rig.trim(old, 1000, 8192)
    hogs = [rig.connect(VOLUME) for _ in range(3)]
    for hog, blocks in zip(hogs, (1024, 1024, 16), strict=True):
        rig.sim.limit(hog, 0)  # they read no replies, which fill the memory
        rig.push(hog, rig.request(READ, 1000 * BLOCK, blocks * BLOCK) * 200)
        rig.turn()
    rig.carrying = False
    rig.engine.fetch_close(0)
    # The read waits for the store, the write for memory: the socket is not watched.
    stale = rig.request(WRITE, 0, 16 * BLOCK, b"\1" * 16 * BLOCK)
    rig.push(old, rig.request(READ, 0, BLOCK) + stale)
    for _ in range(20):
        rig.turn()
    before = rig.status(VOLUME).last_sequence
    assert (rig.status(VOLUME).writes, before) == (1, 1), "it is known, not done"
    rig.sim.hangup(old)
    new = rig.connect(VOLUME)
    rig.write(new, 0, 1)  # sent again
    rig.write(new, 0, 2)
    assert rig.status(VOLUME).last_sequence == before + 2, "the old one waits"
    for hog in hogs:
        rig.sim.limit(hog, 1 << 40)
    for _ in range(500):
        rig.turn()
    assert rig.read(new, 0) == 2
    rig.close()


def test_half_received_write_of_a_lost_connection_is_dropped(rig: Rig) -> None:
    old = rig.connect(VOLUME)
    rig.push(old, rig.request(WRITE, 0, 8 * BLOCK, b"\1" * BLOCK))
    rig.turn()
    rig.sim.hangup(old)
    new = rig.connect(VOLUME)
    rig.write(new, 0, 2)
    for _ in range(10):
        rig.turn()
    assert rig.read(new, 0) == 2
    assert rig.read(new, 1) == 0


def test_other_connections_that_live_are_left_alone(rig: Rig) -> None:
    first, second = rig.connect(VOLUME), rig.connect(VOLUME)
    rig.write(first, 0, 1)
    rig.write(second, 0, 2)
    assert rig.read(first, 0) == 2
    third = rig.connect(VOLUME)
    rig.flush(third)  # covers what the others were told
    status = rig.status(VOLUME)
    assert status.synced_sequence == status.last_sequence
    assert status.connections == 3
