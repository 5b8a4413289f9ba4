"""What becomes of blocks whose log segment is given back."""

from collections.abc import Iterator

import pytest

from sim.nodes import MIB
from sim.rig import BLOCK, WRITE, Rig

ONE, TWO = b"1" * 16, b"2" * 16
COLD, WARM = 64, 640  # blocks, each in a slot of its own
SLICE_BLOCKS = 64


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A started machine with a log of 16 segments."""
    rig = Rig()
    rig.start()
    yield rig
    rig.close()


def fill(rig: Rig, guest: int, from_block: int, length_bytes: int) -> None:
    """Write that much log, sequentially."""
    for at in range(length_bytes // (SLICE_BLOCKS * BLOCK)):
        data = bytes([at % 255 + 1]) * (SLICE_BLOCKS * BLOCK)
        rig.done(guest, WRITE, (from_block + at * SLICE_BLOCKS) * BLOCK, len(data), data)
    rig.flush(guest)


def misses(rig: Rig) -> int:
    """Blocks that no cache had."""
    return rig.engine.counters()["misses"]


@pytest.mark.parametrize(("filled_mib", "beside_mib", "kept"), [(10, 0, True), (11, 5, False)])
def test_unread_block_is_kept_only_while_writes_are_not_short_of_log(
    rig: Rig, filled_mib: int, beside_mib: int, kept: bool
) -> None:
    """A block that was read is kept in any case."""
    rig.open(ONE)
    guest = rig.connect(ONE)
    rig.write(guest, COLD, 3)
    rig.write(guest, WARM, 4)
    assert rig.read(guest, WARM) == 4
    fill(rig, guest, 4096, filled_mib * MIB)
    if beside_mib:  # one volume alone may not be short of log: it is slowed before
        rig.open(TWO)
        fill(rig, rig.connect(TWO), 4096, beside_mib * MIB)
        assert rig.engine.counters()["segments_free"] < 4
    rig.ship(ONE)
    for _ in range(400):
        rig.turn()
    before = misses(rig)
    assert rig.read(guest, WARM) == 4 and misses(rig) == before
    assert rig.read(guest, COLD) == 3
    assert (misses(rig) == before) == kept


def test_segments_are_given_back_when_the_guests_rest(rig: Rig) -> None:
    """Until the log is short, a burst of writes has the device for itself."""
    rig.open(ONE)
    guest = rig.connect(ONE)
    fill(rig, guest, 4096, 13 * MIB)
    for _ in range(20):  # destaged meanwhile, and no pause is as long as a rest
        rig.write(guest, COLD, 3)
        rig.flush(guest)
        if rig.engine.counters()["batches"] == 0:
            rig.ship(ONE)
        rig.sim.advance_ns(20_000_000)
    counters = rig.engine.counters()
    assert counters["segments_free"] < counters["segments_total"] // 2
    assert counters["slot_writes"] == 0
    rested_ns = rig.sim.now_ns
    while rig.engine.counters()["slot_writes"] == 0:
        rig.turn(timeout_ns=100_000_000_000)
    assert rig.sim.now_ns - rested_ns < 1_000_000_000, "a timer of its own ends the wait"
