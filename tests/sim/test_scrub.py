"""Background verification of the cache device: what it finds without any guest, and what it leaves.

Found: a flipped bit in a slot (dropped), in destaged log (dropped), in undestaged log (the volume
stops).  Left: what changed while it was read; guests, who go first; the device, which it only
reads.
"""

import errno
from collections.abc import Iterator

import pytest

from millpond.native import lib
from millpond.native.drivers import Op, SimOptions
from millpond.native.engine import Batch, Closed, EngineOptions, ScrubFound, ScrubPass
from sim.nodes import MIB
from sim.rig import BLOCK, READ, REPLY_BYTES, Rig
from sim.test_bit_flips import superblock

ONE, TWO = b"one volume ....!", b"two volumes ...!"
FAST = 1024 * MIB  # a pass every quarter of a second
READ_BYTES = 128 * 1024  # SCRUB_READ_BYTES
BURST_BYTES = 4 * READ_BYTES
PATIENCE_NS = 50_000_000  # SCRUB_PATIENCE_NS
SLOT_BLOCKS = 4


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Started, without verification; with one open volume."""
    rig = Rig()
    rig.start()
    rig.open(ONE)
    yield rig
    rig.close()


def count(rig: Rig, name: str) -> int:
    """A counter."""
    return rig.engine.counters()[name]


def errors(rig: Rig) -> tuple[int, int]:
    """What verification found: (in slots, in the log)."""
    return count(rig, "scrub_slot_errors"), count(rig, "scrub_log_errors")


def found(rig: Rig) -> list[str]:
    """What it said."""
    events = [event for event in rig.events if isinstance(event, ScrubFound)]
    assert all(event.volume == ONE for event in events)
    return [event.message for event in events]


def write_blocks(rig: Rig, blocks: range) -> None:
    """Each full of its own byte, flushed."""
    guest = rig.connect(ONE)
    for block in blocks:
        rig.write(guest, block, 1 + block % 255)
    rig.flush(guest)


def into_slots(rig: Rig, blocks: range) -> None:
    """They are at the store, and in slots, and nowhere in the log."""
    write_blocks(rig, blocks)
    rig.ship(ONE)
    rig.disconnect_all()
    rig.engine.close_volume(ONE, forget_slots=False, cookie=9)
    rig.wait(Closed)
    rig.open(ONE, keep_slots=False)
    guest = rig.connect(ONE)
    for block in blocks:
        assert rig.read(guest, block) == 1 + block % 255
    assert count(rig, "slots_used") == len(blocks) // SLOT_BLOCKS


def place_of(rig: Rig, token: int, *, log: bool) -> int:
    """Where on the device the first block full of this byte is."""
    layout = superblock(rig.sim)
    begin, slots = int(layout.log_offset_bytes), int(layout.slots_offset_bytes)
    first, end = (begin, slots) if log else (slots, int(layout.device_bytes))
    data = rig.sim.peek(offset_bytes=first, length_bytes=(end - first) // BLOCK * BLOCK)
    at = data.index(bytes([token]) * BLOCK)
    assert at % BLOCK == 0
    return first + at


def flip(rig: Rig, offset_bytes: int) -> None:
    """One bit there."""
    (byte,) = rig.sim.peek(offset_bytes=offset_bytes, length_bytes=1)
    rig.sim.poke(offset_bytes=offset_bytes, data=bytes([byte ^ 4]))


def verify(rig: Rig, bytes_per_s: int = FAST) -> None:
    """A clean stop, and up again with verification; nobody has opened the volume."""
    rig.stop()
    rig.options = EngineOptions(scrub_bytes_per_s=bytes_per_s)
    rig.start()


def a_pass(rig: Rig) -> None:
    """Until another one has begun, and ended."""
    for _ in range(2):
        rig.events = [event for event in rig.events if not isinstance(event, ScrubPass)]
        rig.wait(ScrubPass)


# -- slots


def test_flipped_bit_in_a_slot_that_nobody_reads(rig: Rig) -> None:
    into_slots(rig, range(32))
    rig.stop()
    flip(rig, place_of(rig, 6, log=False) + 99)
    rig.start()
    verify(rig)
    a_pass(rig)
    assert errors(rig) == (1, 0) and count(rig, "slot_checksum_errors") == 0
    assert found(rig) == ["block 5: read slot 1 does not verify; dropped, the store has it"]
    rig.open(ONE)
    guest, before = rig.connect(ONE), count(rig, "misses")
    assert [rig.read(guest, block) for block in range(32)] == list(range(1, 33))
    assert count(rig, "misses") == before + 1
    assert count(rig, "slot_checksum_errors") == 0


def test_unreadable_slot_is_dropped_and_its_neighbours_are_not(rig: Rig) -> None:
    """A read covers several slots: the one that cannot be read is found one by one."""
    into_slots(rig, range(32))
    verify(rig)
    rig.sim.set(SimOptions(seed=1, fail_op=Op.READ, fail_io=1))
    rig.until(lambda: count(rig, "device_errors") == 1)
    assert errors(rig) == (0, 0)
    rig.sim.set(SimOptions(seed=1, fail_op=Op.READ, fail_io=3))
    a_pass(rig)
    assert errors(rig) == (SLOT_BLOCKS, 0) and count(rig, "slots_used") == 7
    assert all("cannot be read" in message for message in found(rig))
    rig.open(ONE)
    guest, before = rig.connect(ONE), count(rig, "misses")
    assert [rig.read(guest, block) for block in range(32)] == list(range(1, 33))
    assert count(rig, "misses") == before + SLOT_BLOCKS


@pytest.mark.parametrize("change", ["overwritten", "trimmed"])
def test_block_that_changes_while_its_slot_is_read(rig: Rig, change: str) -> None:
    """What was read is damaged, and nobody's any more: no finding, nothing dropped."""
    into_slots(rig, range(8))
    verify(rig)
    rig.open(ONE)
    guest = rig.connect(ONE)
    a_pass(rig)
    flip(rig, place_of(rig, 6, log=False))
    rig.sim.set(SimOptions(seed=1, reorder=True, latency_ns=40_000_000))
    before = count(rig, "scrub_read_bytes")
    rig.until(lambda: count(rig, "scrub_read_bytes") > before)
    rig.sim.set(SimOptions(seed=1, reorder=True))
    verified = count(rig, "scrub_verified_bytes")
    if change == "overwritten":
        rig.write(guest, 5, 77)
    else:
        rig.trim(guest, 5, 1)
    assert count(rig, "scrub_verified_bytes") == verified, "it is still being read"
    rig.until(lambda: count(rig, "scrub_verified_bytes") > verified)
    assert count(rig, "scrub_verified_bytes") == verified + 7 * BLOCK
    assert errors(rig) == (0, 0)
    assert rig.read(guest, 5) == (77 if change == "overwritten" else 0)


# -- log


@pytest.mark.parametrize("where", ["block", "header"])
def test_flipped_bit_in_undestaged_log_stops_its_volume(rig: Rig, where: str) -> None:
    """As when destage finds it: it is the only copy."""
    write_blocks(rig, range(20))
    rig.stop()
    flip(rig, place_of(rig, 6, log=True) + (7 if where == "block" else 100 - BLOCK))
    rig.start()
    verify(rig)
    rig.until(lambda: rig.failures)
    what = "block 5" if where == "block" else "record 6"
    assert rig.failures[0].message == found(rig)[0]
    assert found(rig)[0].startswith(f"{what} of the write log does not verify; destage stopped")
    assert errors(rig) == (0, 1) and count(rig, "log_checksum_errors") == 0
    assert rig.status(ONE).error == -errno.EIO
    rig.engine.cut(ONE, max_bytes=MIB, cookie=3)
    batch = rig.wait(Batch)
    assert batch.status == -errno.EIO
    assert rig.status(ONE).dirty_bytes > 0, "nothing was dropped"


def test_flipped_bit_in_an_undestaged_block_that_was_overwritten_since(rig: Rig) -> None:
    """No read would ever meet it; the batch that holds it could never be cut."""
    write_blocks(rig, range(20))
    guest = rig.connect(ONE)
    rig.write(guest, 5, 200)
    rig.flush(guest)
    assert rig.read(guest, 5) == 200
    rig.stop()
    flip(rig, place_of(rig, 6, log=True))
    rig.start()
    verify(rig)
    rig.until(lambda: rig.failures)
    assert found(rig)[0].startswith("block 5 of the write log does not verify")


def test_bit_that_flips_on_its_way_from_undestaged_log(rig: Rig) -> None:
    """Wrong once and right the second time: no volume stops for it.  So is a read that fails."""
    write_blocks(rig, range(20))
    rig.stop()
    place = place_of(rig, 6, log=True)
    rig.start()
    verify(rig)
    flip(rig, place)
    rig.until(lambda: count(rig, "scrub_read_bytes") > READ_BYTES)  # it is read once more
    flip(rig, place)
    rig.sim.set(SimOptions(seed=1, fail_op=Op.READ, fail_io=2))
    a_pass(rig)
    assert count(rig, "device_errors") == 1
    assert errors(rig) == (0, 0) and not rig.failures and not found(rig)


@pytest.mark.parametrize("where", ["block", "header"])
def test_damaged_record_whose_batch_is_on_its_way(rig: Rig, where: str) -> None:
    """What was cut was verified then: to stop the volume would stop the good copy."""
    write_blocks(rig, range(20))
    verify(rig)
    rig.open(ONE)
    rig.engine.cut(ONE, max_bytes=4 * MIB, cookie=3)
    batch = rig.wait(Batch)
    frame = bytes(rig.engine.take_batch(ONE, batch.bytes_count))
    flip(rig, place_of(rig, 6, log=True) + (7 if where == "block" else 100 - BLOCK))
    a_pass(rig)
    assert errors(rig) == (0, 0) and not rig.failures
    rig.deliver(ONE, frame)
    a_pass(rig)
    assert errors(rig) == (0, 1) and not rig.failures
    guest = rig.connect(ONE)
    assert [rig.read(guest, block) for block in range(20)] == list(range(1, 21))


def test_undestaged_log_that_cannot_be_read_stops_its_volume(rig: Rig) -> None:
    write_blocks(rig, range(20))
    verify(rig, 4 * MIB)  # so that the second read comes some turns after the first
    rig.sim.set(SimOptions(seed=1, fail_op=Op.READ, fail_io=1))
    rig.until(lambda: count(rig, "device_errors") == 1)
    rig.sim.set(SimOptions(seed=1, fail_op=Op.READ, fail_io=1))
    rig.until(lambda: count(rig, "device_errors") == 2)
    rig.until(lambda: rig.failures)
    assert "cannot be read" in rig.failures[0].message


@pytest.mark.parametrize("where", ["block", "header"])
def test_flipped_bit_in_destaged_log_is_a_miss(rig: Rig, where: str) -> None:
    """The store has it; after a crash the index does not find it again."""
    write_blocks(rig, range(20))
    rig.ship(ONE)
    rig.stop()
    flip(rig, place_of(rig, 6, log=True) + (7 if where == "block" else 100 - BLOCK))
    rig.start()
    verify(rig)
    before = count(rig, "checkpoints")
    a_pass(rig)
    rig.until(lambda: count(rig, "checkpoints") > before)
    assert errors(rig) == (0, 1) and not rig.failures
    for _ in range(2):
        rig.open(ONE)
        guest, before = rig.connect(ONE), count(rig, "misses")
        assert [rig.read(guest, block) for block in range(20)] == list(range(1, 21))
        assert count(rig, "misses") == before + (1 if where == "block" else 15)
        assert count(rig, "log_checksum_errors") == 0
        rig.fall(SimOptions(seed=2, lose_unsynced=True))
        rig.start()


def test_fetch_that_began_before_the_log_block_was_dropped_is_not_kept(rig: Rig) -> None:
    """It brings what the store had before the block was written: that must not become a slot."""
    write_blocks(rig, range(20))
    rig.ship(ONE)
    verify(rig)
    rig.open(ONE)
    guest = rig.connect(ONE)
    rig.carrying = False
    rig.ask(guest, READ, 100 * BLOCK, BLOCK)  # zeroes, for now
    rig.turn()
    stale = rig.fetch.take()
    rig.store.core.feed(2, stale)
    for _ in range(50):
        rig.turn()
    answer = rig.store.core.take(2)
    rig.carrying = True
    rig.write(guest, 100, 9)
    rig.flush(guest)
    rig.ship(ONE)
    a_pass(rig)
    flip(rig, _newest(rig, 9))
    rig.until(lambda: errors(rig) == (0, 1))
    rig.fetch.feed(answer)
    rig.answers(guest, REPLY_BYTES + BLOCK)
    assert rig.read(guest, 100) == 9


def _newest(rig: Rig, token: int) -> int:
    """The last place in the log that holds this byte."""
    layout = superblock(rig.sim)
    first, end = int(layout.log_offset_bytes), int(layout.slots_offset_bytes)
    data = rig.sim.peek(offset_bytes=first, length_bytes=(end - first) // BLOCK * BLOCK)
    return first + data.rindex(bytes([token]) * BLOCK)


def test_destaged_block_over_a_trim_that_is_not_forgotten_yet(rig: Rig) -> None:
    """Dropped at once, it would read as zeroes: the older trim would hide what the store has.

    A checkpoint is being written meanwhile, so that no trim is forgotten before it ends.
    """
    verify(rig)
    rig.open(ONE)
    guest = rig.connect(ONE)
    rig.sim.set(SimOptions(seed=1, reorder=True, latency_ns=2_000_000_000))
    rig.put(TWO, MIB)
    rig.engine.open_volume(
        TWO, size_bytes=MIB, epoch=1, lineage=7, applied_sequence=0, keep_slots=False, cookie=1
    )
    rig.engine.step(0)
    rig.engine.step(0)
    rig.sim.set(SimOptions(seed=1, reorder=True))
    checkpoints = count(rig, "checkpoints")
    rig.trim(guest, 0, 64)
    rig.write(guest, 5, 9)
    rig.flush(guest)
    rig.ship(ONE)
    flip(rig, place_of(rig, 9, log=True))
    rig.until(lambda: found(rig))
    assert count(rig, "checkpoints") == checkpoints, "it is still running"
    assert found(rig)[0].endswith("kept until a trim before it is swept")
    rig.until(lambda: found(rig)[-1].endswith("dropped, the store has it"))
    assert count(rig, "checkpoints") > checkpoints
    assert rig.read(guest, 5) == 9 and rig.read(guest, 6) == 0 and not rig.failures


def test_segment_is_given_back_while_it_is_read(rig: Rig) -> None:
    """Its slot fills are done, its blocks left the index: it stays until the read is over."""
    write_blocks(rig, range(4))
    verify(rig)
    rig.open(ONE)
    guest = rig.connect(ONE)
    for at in range(60):  # most of the log
        rig.write(guest, 4096 + 64 * at, 1 + at, blocks=64)
    rig.flush(guest)
    rig.ship(ONE)
    for _ in range(1000):
        rig.turn()
    a_pass(rig)
    assert errors(rig) == (0, 0) and not rig.failures
    assert [rig.read(guest, block) for block in range(4)] == [1, 2, 3, 4]
    assert [rig.read(guest, 4096 + 64 * at) for at in range(60)] == list(range(1, 61))


def test_volume_that_is_forgotten_while_its_log_is_read(rig: Rig) -> None:
    """Not while a read is in flight; between two of them it just goes."""
    write_blocks(rig, range(100))
    rig.ship(ONE)
    verify(rig, 32 * MIB)
    rig.until(lambda: count(rig, "scrub_stage") == lib.MP_SCRUB_CLEAN)
    rig.sim.set(SimOptions(seed=1, latency_ns=5_000_000))
    rig.until(lambda: count(rig, "scrub_read_bytes") > BURST_BYTES)
    statuses: list[int] = []
    while not statuses or statuses[-1]:
        rig.engine.close_volume(ONE, forget_slots=True, cookie=9)
        statuses.append(rig.wait(Closed).status)
    assert statuses == [-errno.EBUSY] * (len(statuses) - 1) + [0] and len(statuses) > 1
    rig.open(TWO)
    guest = rig.connect(TWO)
    for block in range(50):
        rig.write(guest, block, 200)
    passes = count(rig, "scrub_passes")
    pass_time(rig, 20_000_000_000)
    rig.turn()
    assert count(rig, "scrub_passes") >= passes + 2
    assert errors(rig) == (0, 0) and not rig.failures


def test_place_that_a_rescue_left_while_it_was_read(rig: Rig) -> None:
    """A failed sync: the same records are elsewhere now, and the old place may hold anything."""
    verify(rig, 32 * MIB)
    rig.open(ONE)
    write_blocks(rig, range(100))
    guest = rig.connect(ONE)
    for block in range(100, 140):
        rig.write(guest, block, block)
    while count(rig, "scrub_read_bytes") < 8 * READ_BYTES:  # beyond what was synced
        rig.turn(10**10)
    places = [_newest(rig, block) for block in range(100, 140)]
    rig.sim.set(SimOptions(seed=1, fail_op=Op.SYNC, fail_io=1))
    rig.flush(guest)
    assert count(rig, "log_rescues") == 1
    for place in places:
        flip(rig, place)
    assert count(rig, "scrub_stage") == lib.MP_SCRUB_DIRTY, "it was still at that segment"
    passes = count(rig, "scrub_passes")
    pass_time(rig, 20_000_000_000)
    rig.turn()
    assert count(rig, "scrub_passes") >= passes + 2
    assert errors(rig) == (0, 0) and not rig.failures
    assert [rig.read(guest, block) for block in range(100, 140)] == list(range(100, 140))


# -- budget


def pass_time(rig: Rig, duration_ns: int) -> int:
    """So much time, nobody there: the number of turns it took."""
    end_ns, turns = rig.sim.now_ns + duration_ns, 0
    while rig.sim.now_ns < end_ns:
        rig.engine.step(end_ns - rig.sim.now_ns)
        turns += 1
    return turns


def test_rate_in_virtual_time(rig: Rig) -> None:
    guest = rig.connect(ONE)
    for at in range(32):
        rig.write(guest, 64 * at, 1 + at, blocks=64)
    rig.flush(guest)
    verify(rig, MIB)
    rig.turn()
    before = count(rig, "scrub_read_bytes")
    pass_time(rig, 5_000_000_000)
    read = count(rig, "scrub_read_bytes") - before
    assert 4.9 * MIB < read <= 5 * MIB + BURST_BYTES


def test_off_reads_nothing_and_sets_no_timer(rig: Rig) -> None:
    into_slots(rig, range(32))
    verify(rig, 0)
    pass_time(rig, 10_000_000_000)
    before = rig.sim.count(Op.READ)
    assert pass_time(rig, 3600_000_000_000) <= 2
    assert rig.sim.count(Op.READ) == before and count(rig, "scrub_stage") == 0


def test_little_to_verify_wakes_nobody_all_day(rig: Rig) -> None:
    """At the rate that is usual, half a MiB: a pass per minute, not one after the other."""
    into_slots(rig, range(128))
    verify(rig, 4 * MIB)
    turns = pass_time(rig, 3600_000_000_000)
    assert 50 <= count(rig, "scrub_passes") <= 57
    assert turns < 20 * count(rig, "scrub_passes")


def test_a_pass_writes_nothing(rig: Rig) -> None:
    into_slots(rig, range(64))
    guest = rig.connect(ONE)
    for block in range(100, 120):
        rig.write(guest, block, block)
    rig.flush(guest)
    verify(rig)
    a_pass(rig)
    before = rig.sim.io_count
    a_pass(rig)
    assert rig.sim.io_count == before and count(rig, "scrub_verified_bytes") > 84 * BLOCK


def test_guests_go_first(rig: Rig) -> None:
    """While one waits for the device, verification submits no read; but for its patience."""
    into_slots(rig, range(64))
    verify(rig)
    rig.open(ONE)
    guest = rig.connect(ONE)
    a_pass(rig)
    rig.sim.set(SimOptions(seed=1, reorder=True, latency_ns=20_000_000))
    begun_ns, asked = rig.sim.now_ns, []
    while rig.sim.now_ns < begun_ns + 2_000_000_000:
        rig.ask(guest, READ, 0, BLOCK)  # one per millisecond: there are always some that wait
        before = count(rig, "scrub_read_bytes")
        rig.turn(0)
        rig.sim.advance_ns(1_000_000)
        rig.sim.pop(guest)
        if count(rig, "scrub_read_bytes") > before:
            asked.append(rig.sim.now_ns)
    gaps = [later - earlier for earlier, later in zip(asked, asked[1:], strict=False)]
    assert len(gaps) >= 5, "a cache that never rests is verified, too"
    assert min(gaps) >= PATIENCE_NS, gaps


def test_waits_while_guests_wait_for_buffers(rig: Rig) -> None:
    """A connection that is paused for want of buffers comes first, too."""
    into_slots(rig, range(64))
    verify(rig)
    rig.open(ONE)
    guest = rig.connect(ONE)
    a_pass(rig)
    length = 4 * MIB
    rig.trim(guest, 1024, length // BLOCK)
    rig.sim.limit(guest, 1)  # nothing is sent: answers hold their buffers
    rig.push(guest, b"".join(rig.request(READ, 0, length) for _ in range(100)))
    for _ in range(20):
        rig.turn(0)
    before, begun_ns, asked = count(rig, "scrub_read_bytes"), rig.sim.now_ns, 0
    while rig.sim.now_ns < begun_ns + 1_000_000_000:
        rig.turn()
        asked += count(rig, "scrub_read_bytes") > before
        before = count(rig, "scrub_read_bytes")
    assert 0 < asked <= 20, "only what its patience allows"
