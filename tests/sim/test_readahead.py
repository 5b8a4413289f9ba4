"""Fetches that are shared, and blocks that are fetched before anybody asks for them.

Counted in READ frames and blocks, never in time.  Failure modes: Illegal, or an assertion.
"""

from collections.abc import Iterator

import pytest

from millpond.native import lib
from millpond.native.drivers import Op
from millpond.native.engine import EngineOptions
from sim.rig import BLOCK, READ, REPLY_BYTES, Rig

VOLUME = b"a volume ......!"
BLOCKS = 1024


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A volume whose blocks are at the store only: the engine knows it, and has none of them."""
    rig = make_rig(0)
    yield rig
    rig.close()


def make_rig(faults: int) -> Rig:
    """See the fixture."""
    rig = Rig(options=EngineOptions(test_faults=faults))
    rig.start()
    rig.open(VOLUME, size_bytes=BLOCKS * BLOCK)
    guest = rig.connect(VOLUME)
    for first in range(0, BLOCKS, 64):
        rig.write(guest, first, token(first), 64)
    rig.flush(guest)
    rig.ship(VOLUME)
    rig.stop()
    rig.format_again()
    rig.start()
    rig.open(VOLUME, size_bytes=BLOCKS * BLOCK)
    return rig


def token(block: int) -> int:
    """What a block is full of at first."""
    return block // 64 + 1


def count(rig: Rig, name: str) -> int:
    """A counter of the engine."""
    return rig.engine.counters()[name]


def stalled(rig: Rig) -> int:
    """A guest; the store does not hear of misses until carrying is set again."""
    guest = rig.connect(VOLUME)
    rig.carrying = False
    return guest


def go_on(rig: Rig) -> None:
    """The store hears of everything, and answers."""
    rig.carrying = True
    for _ in range(20):
        rig.turn()


def test_two_reads_that_miss_the_same_blocks_share_one_fetch(rig: Rig) -> None:
    guest = stalled(rig)
    rig.ask(guest, READ, 100 * BLOCK, 8 * BLOCK)
    rig.ask(guest, READ, 102 * BLOCK, 2 * BLOCK)
    rig.turn()
    rig.turn()
    assert count(rig, "fetches") == 1 and count(rig, "fetches_joined") == 1
    go_on(rig)
    answers = rig.answers(guest, 2 * REPLY_BYTES + 10 * BLOCK)
    assert answers.count(bytes([token(100)]) * BLOCK) == 10


def test_read_over_the_end_of_a_fetch_under_way_asks_for_the_rest_only(rig: Rig) -> None:
    guest = stalled(rig)
    rig.ask(guest, READ, 10 * BLOCK, 8 * BLOCK)
    rig.ask(guest, READ, 14 * BLOCK, 8 * BLOCK)
    go_on(rig)
    rig.answers(guest, 2 * REPLY_BYTES + 16 * BLOCK)
    assert count(rig, "fetches") == 2
    assert rig.store.core.counters()["read_bytes"] < 13 * BLOCK


def test_read_that_shared_a_fetch_which_was_lost_with_its_connection_is_answered(rig: Rig) -> None:
    guest = stalled(rig)
    rig.ask(guest, READ, 0, BLOCK)
    rig.ask(guest, READ, 0, BLOCK)
    rig.turn()
    rig.lose_fetch_connection()
    go_on(rig)
    answers = rig.answers(guest, 2 * (REPLY_BYTES + BLOCK))
    assert answers.count(bytes([1]) * BLOCK) == 2


def test_sequential_reader_is_fetched_ahead_of(rig: Rig) -> None:
    guest = rig.connect(VOLUME)
    for block in range(512):
        assert rig.read(guest, block) == token(block)
    assert count(rig, "readahead_blocks") >= 500
    assert count(rig, "fetches") < 40, "one frame for many blocks"


def test_random_reader_is_not_fetched_ahead_of(rig: Rig) -> None:
    guest = rig.connect(VOLUME)
    for step in range(200):
        block = step * 389 % BLOCKS
        assert rig.read(guest, block) == token(block)
    assert count(rig, "readahead_blocks") == 0 and count(rig, "fetches") == 200


def test_stream_survives_random_readers_beside_it(rig: Rig) -> None:
    guest = rig.connect(VOLUME)
    for step in range(256):
        assert rig.read(guest, step) == token(step)
        other = 300 + step * 389 % 700
        assert rig.read(guest, other) == token(other)
    assert count(rig, "readahead_blocks") >= 200


def test_only_what_was_asked_for_is_offered_to_slots(rig: Rig) -> None:
    guest = rig.connect(VOLUME)
    for block in range(4):
        rig.read(guest, block)
    go_on(rig)
    assert count(rig, "readahead_blocks") >= 32
    assert count(rig, "slot_bytes_written") <= 4 * BLOCK


def test_miss_of_a_guest_goes_before_what_is_read_ahead(rig: Rig) -> None:
    guest = rig.connect(VOLUME)
    rig.read(guest, 0)
    rig.read(guest, 1)
    rig.carrying = False
    both = rig.request(READ, 2 * BLOCK, BLOCK) + rig.request(READ, 900 * BLOCK, BLOCK)
    rig.push(guest, both)
    rig.turn()
    assert rig.asked() == [2, 900, 3]


def read_ahead(rig: Rig) -> int:
    """A guest that has read blocks 0 to 2; those behind are here."""
    guest = rig.connect(VOLUME)
    for block in range(3):
        rig.read(guest, block)
    go_on(rig)
    assert count(rig, "readahead_blocks") >= 32
    return guest


def test_block_that_was_written_after_it_was_read_ahead_is_not_shown_as_it_was(rig: Rig) -> None:
    guest = read_ahead(rig)
    rig.write(guest, 10, 99)
    assert rig.read(guest, 10) == 99
    rig.flush(guest)
    rig.ship(VOLUME)
    for step in range(6 * 16):  # the log goes round: the segment of block 10 is released
        rig.write(guest, 512 + step % 8 * 64, 100, 64)
        rig.flush(guest)
        rig.ship(VOLUME)
    assert rig.read(guest, 10) == 99


def trim_what_was_read_ahead(rig: Rig) -> int:
    """Trimmed, shipped, swept: nothing here knows of the trim any more."""
    guest = read_ahead(rig)
    rig.trim(guest, 8, 16)
    rig.flush(guest)
    rig.ship(VOLUME)
    for _ in range(200):
        rig.turn()
    return rig.read(guest, 10)


def test_block_that_was_trimmed_after_it_was_read_ahead_is_not_shown_as_it_was(rig: Rig) -> None:
    assert trim_what_was_read_ahead(rig) == 0


def test_fault_stale_fill_shows_what_was_trimmed_after_it_was_read_ahead() -> None:
    """The proof that the test above can fail."""
    rig = make_rig(int(lib.MP_FAULT_STALE_FILL))
    try:
        assert trim_what_was_read_ahead(rig) == token(10)
    finally:
        rig.close()


def test_what_was_read_ahead_is_forgotten_when_the_volume_is_opened_again(rig: Rig) -> None:
    read_ahead(rig)
    before = count(rig, "fetches")
    rig.disconnect_all()
    rig.open(VOLUME, size_bytes=BLOCKS * BLOCK)
    assert rig.read(rig.connect(VOLUME), 20) == 1
    assert count(rig, "fetches") == before + 1


def test_engine_stops_while_the_store_owes_what_was_read_ahead(rig: Rig) -> None:
    guest = rig.connect(VOLUME)
    for block in range(2):
        rig.read(guest, block)
    rig.carrying = False
    rig.ask(guest, READ, 2 * BLOCK, BLOCK)
    for _ in range(4):
        rig.turn()
    assert count(rig, "readahead_blocks") >= 32
    rig.stop()
    rig.start()


def test_slots_that_were_filled_one_after_the_other_are_read_at_once(rig: Rig) -> None:
    """One device read of 256 KiB, not one per slot."""
    guest = rig.connect(VOLUME)
    for _ in range(2):
        rig.done(guest, READ, 0, 64 * BLOCK)
        for _ in range(50):
            rig.turn()
    before, hits = rig.sim.count(Op.READ), count(rig, "slot_hits")
    assert rig.done(guest, READ, 0, 64 * BLOCK) == bytes([token(0)]) * (64 * BLOCK)
    assert count(rig, "slot_hits") == hits + 64
    assert rig.sim.count(Op.READ) == before + 1
