"""A client that comes again: what it left on its old connection may not overtake what is newer."""

from collections.abc import Callable

from millpond.native import lib
from millpond.native.drivers import SimOptions
from millpond.native.engine import EngineOptions
from sim.rig import BLOCK, READ, REPLY_BYTES, VOLUME, WRITE, Rig

DISC = 2


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


def _stuck_write(rig: Rig, old: int) -> None:
    """Of block 0 and half of block 1, whose other half the store must give, and does not."""
    rig.write(old, 0, 7)
    rig.carrying = False
    data = b"\1" * (BLOCK + BLOCK // 2)
    rig.push(old, rig.request(WRITE, 0, len(data), data))
    for _ in range(10):
        rig.turn()
    assert (rig.status(VOLUME).writes, rig.status(VOLUME).last_sequence) == (2, 1)


def _come_again(rig: Rig) -> int:
    """A guest dies with a write that waits; the next one looks, then the store answers."""
    old = rig.connect(VOLUME)
    _stuck_write(rig, old)
    rig.sim.hangup(old)
    new = rig.connect(VOLUME)
    assert rig.read(new, 0) == 7, "served, though the store is silent"
    rig.carrying = True
    for _ in range(200):
        rig.turn()
    return new


def test_write_of_a_dead_client_is_not_carried_out_once_the_next_one_has_looked(rig: Rig) -> None:
    """A guest that starts again reads its journal: it must stay as it was read."""
    new = _come_again(rig)
    assert rig.read(new, 0) == 7
    assert rig.read(new, 1) == 0
    assert rig.status(VOLUME).last_sequence == 1
    assert rig.status(VOLUME).connections == 1, "the old one is gone"


def test_deliberate_fault_no_fence_is_found_out(
    record_property: Callable[[str, object], None],
) -> None:
    rig = Rig(options=EngineOptions(test_faults=lib.MP_FAULT_NO_FENCE))
    rig.start()
    rig.open(VOLUME)
    new = _come_again(rig)
    assert rig.read(new, 0) == 1, "the switch does nothing"
    record_property("figure", "caught: a dead guest's write comes after the next one has looked")
    rig.close()


def test_dropped_write_is_in_nobodys_way(rig: Rig) -> None:
    old = rig.connect(VOLUME)
    _stuck_write(rig, old)
    rig.push(old, rig.request(WRITE, 0, BLOCK, b"\2" * BLOCK))  # waits behind it
    rig.turn()
    rig.sim.hangup(old)
    new = rig.connect(VOLUME)
    rig.write(new, 0, 3)
    assert rig.read(new, 0) == 3
    rig.carrying = True
    for _ in range(200):
        rig.turn()
    assert (rig.read(new, 0), rig.read(new, 1)) == (3, 0)


def test_client_that_said_goodbye_has_what_it_asked_for_done_before_the_next_is_served(
    rig: Rig,
) -> None:
    """DISC means: no more.  Not: forget it."""
    old = rig.connect(VOLUME)
    _stuck_write(rig, old)
    rig.push(old, rig.request(DISC, 0, 0))
    rig.turn()
    new = rig.connect(VOLUME)
    rig.ask(new, READ, 0, BLOCK)
    for _ in range(20):
        rig.turn()
    assert rig.status(VOLUME).reads == 0, "it waits"
    rig.carrying = True
    assert rig.answers(new, REPLY_BYTES + BLOCK)[REPLY_BYTES:] == b"\1" * BLOCK


def test_write_on_its_way_to_the_device_is_seen_by_the_next_client(rig: Rig) -> None:
    old = rig.connect(VOLUME)
    rig.write(old, 0, 7)
    rig.sim.set(SimOptions(latency_ns=50_000_000))
    rig.push(old, rig.request(WRITE, 0, BLOCK, b"\1" * BLOCK))
    rig.turn()
    assert rig.status(VOLUME).writes == 2
    rig.sim.hangup(old)
    new = rig.connect(VOLUME)
    rig.ask(new, READ, 0, BLOCK)
    assert rig.answers(new, REPLY_BYTES + BLOCK)[REPLY_BYTES:] == b"\1" * BLOCK
