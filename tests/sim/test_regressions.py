"""Situations in which the engine once lost or mixed up data, failed or hung; each by its name.

Failure modes: Illegal, or an assertion that says what a guest saw.
"""

import errno
from collections.abc import Iterator

import pytest

from millpond.native import lib
from millpond.native.drivers import Op, SimOptions
from millpond.native.engine import Batch, Closed, EngineOptions, NativeError
from sim.nodes import MIB
from sim.rig import BLOCK, FLUSH, READ, REPLY_BYTES, TRIM, WRITE, Rig

ONE, TWO = b"one volume ....!", b"two volumes ...!"


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Running, with nothing in it."""
    rig = Rig()
    rig.start()
    yield rig
    rig.close()


def checkpoints(rig: Rig) -> int:
    """How many were completed."""
    return rig.engine.counters()["checkpoints"]


def forget(rig: Rig, volume: bytes, cookie: int) -> None:
    """The guest goes, the volume is closed, the device forgets it."""
    rig.engine.disconnect(cookie)
    rig.turn()
    rig.engine.close_volume(volume, forget_slots=True, cookie=9)
    rig.wait(Closed)


def test_origin_of_a_forgotten_volume_is_not_given_out_again_after_a_restart(rig: Rig) -> None:
    """Its slots are still there: a hole of it, which needs no checksum, was read as another's."""
    rig.open(TWO)
    writer = rig.connect(TWO)
    rig.write(writer, 8, 7)
    rig.flush(writer)
    rig.ship(TWO)
    forget(rig, TWO, 1001)
    rig.stop()
    rig.start()
    rig.open(ONE)
    assert rig.read(rig.connect(ONE), 8) == 0  # a hole, remembered in a slot
    forget(rig, ONE, 1002)
    rig.stop()
    rig.start()
    rig.open(TWO, keep_slots=False)
    assert rig.read(rig.connect(TWO), 8) == 7


def test_block_written_after_a_trim_is_read_when_a_checkpoint_saw_only_the_trim() -> None:
    """The range was captured, then forgotten, then the block released before the walk met it."""
    big = 512 * MIB  # so that writing the checkpoint's index takes a while
    rig = Rig(device_bytes=big, log_bytes=240 * MIB, sim=SimOptions(device_bytes=big))
    try:
        rig.start()
        rig.open(ONE, size_bytes=MIB << 16)
        _trim_then_write(rig, rig.connect(ONE))
        rig.fall(SimOptions(seed=3))
        rig.start()
        rig.open(ONE, size_bytes=MIB << 16)
        guest = rig.connect(ONE)
        assert [rig.read(guest, block) for block in range(100, 200)] == list(range(100, 200))
    finally:
        rig.close()


def _trim_then_write(rig: Rig, guest: int) -> None:
    rig.trim(guest, 90, 1_000_000)  # sweeping that takes a while, after a restart too
    for block in range(100, 200):
        rig.write(guest, block, block)
    for first in range(0, 1000 * 9, 900):  # short: each leaves eight entries in the index
        trims = (
            rig.request(TRIM, (1000 + block) * BLOCK, 8 * BLOCK)
            for block in range(first, first + 900, 9)
        )
        rig.push(guest, b"".join(trims))
        rig.answers(guest, REPLY_BYTES * 100)
    for block in range(520):  # more than half of the log: releases are wanted
        rig.write(guest, 400_000 + 64 * block, 3, blocks=64)
    rig.flush(guest)
    rig.engine.cut(ONE, max_bytes=4 * MIB, cookie=3)
    batch = rig.wait(Batch)
    assert isinstance(batch, Batch) and batch.status == 0
    before = checkpoints(rig)
    rig.sim.set(SimOptions(seed=5, latency_ns=500_000))
    rig.put(TWO, MIB)
    rig.engine.open_volume(
        TWO, size_bytes=MIB, epoch=1, lineage=7, applied_sequence=0, keep_slots=False, cookie=1
    )
    rig.engine.step(0)  # a checkpoint begins, and captures the trim
    rig.deliver(ONE, bytes(rig.engine.take_batch(ONE, batch.bytes_count)))
    rig.until(lambda: checkpoints(rig) > before)


def test_more_ranges_trimmed_between_two_checkpoints_than_a_checkpoint_holds() -> None:
    """All were destaged, swept and forgotten; the log still had them all after a crash."""
    rig = Rig(device_bytes=256 * MIB, log_bytes=96 * MIB)
    try:
        rig.start()
        rig.open(ONE, size_bytes=MIB << 20)
        guest = rig.connect(ONE)
        count = 2 * lib.MP_RECORD_EXTENTS_MAX
        for part in range(5):
            for first in range(part * count, (part + 1) * count, 512):
                data = b"".join(
                    rig.request(TRIM, 20 * at * BLOCK, 10 * BLOCK)
                    for at in range(first, first + 512)
                )
                rig.push(guest, data)
                rig.answers(guest, REPLY_BYTES * 512)
            rig.flush(guest)
            rig.ship(ONE)
        for _ in range(3):
            rig.fall()
            rig.start()
            rig.open(ONE, size_bytes=MIB << 20)
    finally:
        rig.close()


def test_many_short_trims_in_a_small_log(rig: Rig) -> None:
    """Each leaves eight index entries and hardly any log: they wait for room, and none is lost."""
    rig.open(ONE)
    guest = rig.connect(ONE)
    rig.write(guest, 5, 5)
    for first in range(0, 4000, 100):
        data = b"".join(
            rig.request(TRIM, (10 + 9 * at) * BLOCK, 8 * BLOCK) for at in range(first, first + 100)
        )
        rig.push(guest, data)
        got = b""
        while len(got) < REPLY_BYTES * 100:
            rig.ship(ONE)
            rig.turn()
            got += rig.sim.pop(guest)
    rig.fall()
    rig.start()
    rig.open(ONE)
    assert rig.read(rig.connect(ONE), 5) == 5


def test_more_idle_volumes_than_log_segments(rig: Rig) -> None:
    """Each held the head of its chain, for ever; 16 segments are all there are."""
    for number in range(24):
        volume = bytes([65 + number]) * 16
        rig.open(volume)
        guest = rig.connect(volume)
        rig.write(guest, number, 1 + number)
        rig.flush(guest)
        rig.ship(volume)
    for number in (0, 11, 23):
        assert rig.read(rig.connect(bytes([65 + number]) * 16), number) == 1 + number
    rig.fall()
    rig.start()
    for number in (0, 11, 23):
        volume = bytes([65 + number]) * 16
        rig.open(volume)
        guest = rig.connect(volume)
        assert rig.read(guest, number) == 1 + number
        rig.write(guest, 99, 77)
    rig.fall()
    rig.start()
    rig.open(b"L" * 16)
    assert rig.read(rig.connect(b"L" * 16), 99) == 77


def test_destage_scans_while_more_is_written_and_synced() -> None:
    """What is synced after the scan read its place may not be in the scan: it is no damage."""
    for seed in range(12):
        latencies = SimOptions(seed=seed, device_bytes=64 * MIB, latency_ns=3_000_000, reorder=True)
        rig = Rig(sim=latencies)
        try:
            rig.start()
            rig.open(ONE)
            guest = rig.connect(ONE)
            rig.write(guest, 0, 1)
            rig.flush(guest)
            for turn in range(30):
                rig.engine.cut(ONE, max_bytes=MIB, cookie=1)
                rig.ask(guest, WRITE, turn * BLOCK, BLOCK, bytes([turn + 1]) * BLOCK)
                rig.turn()
                rig.ask(guest, FLUSH)
                while (batch := rig.take(Batch)) is None:
                    rig.turn()
                assert isinstance(batch, Batch)
                assert batch.status in (0, -errno.ENODATA) and not rig.failures
                rig.answers(guest, 2 * REPLY_BYTES)
        finally:
            rig.close()


def test_confirmation_that_comes_while_the_same_is_cut_again(rig: Rig) -> None:
    """The reply to the first sending arrives while the second cut reads: no damage, no hole."""
    rig.open(ONE)
    guest = rig.connect(ONE)
    for token in range(1, 9):
        rig.write(guest, token % 3, token)
    rig.flush(guest)
    rig.engine.cut(ONE, max_bytes=MIB, cookie=1)
    first = rig.wait(Batch)
    assert isinstance(first, Batch)
    frame = bytes(rig.engine.take_batch(ONE, first.bytes_count))
    rig.sim.set(SimOptions(seed=1, latency_ns=50_000_000))
    rig.engine.cut(ONE, max_bytes=MIB, cookie=2)
    rig.engine.step(0)
    rig.deliver(ONE, frame)
    second = rig.wait(Batch)
    assert isinstance(second, Batch) and second.status in (0, -errno.ENODATA)
    assert not rig.failures


def test_last_reply_leaves_in_the_turn_that_frees_the_buffers_others_wait_for(rig: Rig) -> None:
    """Nothing else happens then: the engine must not sleep, the paused connection goes on."""
    rig.open(ONE)
    guest = rig.connect(ONE)
    count, length = 40, 4 * MIB  # more than one connection may hold
    rig.trim(guest, 0, length // BLOCK)  # answered from memory
    rig.push(guest, b"".join(rig.request(READ, 0, length) for _ in range(count)))
    begun_ns = rig.sim.now_ns
    got = 0
    while got < count * (REPLY_BYTES + length):
        rig.turn(10**12)
        got += len(rig.sim.pop(guest, 1 << 30))
        assert rig.sim.now_ns < begun_ns + 10**11, "asleep, with requests unread"


def test_unreadable_segment_behind_the_checkpoint_is_not_the_end_of_the_chain() -> None:
    """One read fails while recovery looks where the chain goes on: no start, nothing dropped."""
    rig = Rig()
    try:
        rig.start()
        rig.open(ONE)
        guest = rig.connect(ONE)
        for block in range(0, 1024, 64):
            rig.write(guest, block, 1 + block // 64, blocks=64)
        refused = 0
        for io in range(1, 40):
            rig.fall(SimOptions(seed=1, fail_io=io, fail_errno=errno.EIO, fail_op=Op.READ))
            driver = rig.sim.driver()
            try:
                rig.engine = type(rig.engine).open_driver(driver, rig.options)
            except NativeError as error:
                lib.mp_driver_destroy(driver)
                assert error.errno == errno.EIO
                refused += 1
                continue
            rig._up = True
            assert rig.status(ONE).last_sequence == 16
        assert refused > 16
        rig.fall()
        rig.start()
        rig.open(ONE)
        assert rig.read(rig.connect(ONE), 1023) == 16
    finally:
        rig.close()


def test_guest_that_is_in_the_middle_of_a_write_when_the_daemon_stops_is_told_no_error(
    rig: Rig,
) -> None:
    """It connects again and sends it again: an error would have been the file system's end."""
    rig.open(ONE)
    guest = rig.connect(ONE)
    rig.write(guest, 0, 1)
    whole = rig.request(WRITE, 0, 8 * BLOCK, bytes([2]) * (8 * BLOCK))
    rig.push(guest, whole[: 3 * BLOCK])
    rig.turn()
    rig.engine.disconnect(1001)
    got = b""
    with pytest.raises(BrokenPipeError):
        for _ in range(1000):
            rig.turn()
            got += rig.sim.pop(guest)
    assert got == b""
    assert rig.read(rig.connect(ONE), 0) == 1


def test_volume_of_a_size_that_no_index_key_names_is_refused(rig: Rig) -> None:
    """A block number of more than 40 bits would have ended the daemon."""
    rig.engine.open_volume(
        ONE, size_bytes=1 << 60, epoch=1, lineage=1, applied_sequence=0, keep_slots=False, cookie=5
    )
    rig.turn()
    assert [getattr(event, "status", 0) for event in rig.events] == [-errno.EFBIG]


def test_checkpoint_every_record(rig: Rig) -> None:
    """Checkpoints follow one another while trims are swept and forgotten: nothing stays."""
    rig.stop()
    rig.options = EngineOptions(checkpoint_every_bytes=1)
    rig.start()
    rig.open(ONE)
    guest = rig.connect(ONE)
    for at in range(40):
        rig.trim(guest, at * 20, 15)
        rig.write(guest, at * 20 + 3, 1 + at)
    rig.flush(guest)
    rig.ship(ONE)
    assert [rig.read(guest, at * 20 + 3) for at in range(40)] == list(range(1, 41))


def test_end_that_was_cut_off_is_not_read_from_the_log_when_the_volume_grew_again(rig: Rig) -> None:
    """Everything was shipped, but its segment was still in the log, and the position the same."""
    rig.open(ONE, size_bytes=MIB)
    guest = rig.connect(ONE)
    rig.write(guest, 200, 7)
    rig.flush(guest)
    rig.ship(ONE)
    rig.engine.disconnect(1001)
    rig.turn()
    rig.engine.close_volume(ONE, forget_slots=False, cookie=9)
    rig.wait(Closed)
    rig.put(ONE, MIB // 2)
    rig.put(ONE, MIB)
    rig.open(ONE, size_bytes=MIB, keep_slots=False)
    assert rig.read(rig.connect(ONE), 200) == 0


def test_crash_after_an_open_volume_grew(rig: Rig) -> None:
    """Writes behind the end that the last checkpoint knows are recovered and shipped."""
    rig.open(ONE, size_bytes=MIB)
    rig.put(ONE, 2 * MIB)
    rig.engine.grow_volume(ONE, size_bytes=2 * MIB)
    guest = rig.connect(ONE)
    rig.write(guest, 300, 7)
    rig.flush(guest)
    rig.fall(SimOptions(seed=2))
    rig.start()
    assert rig.status(ONE).size_bytes == MIB
    rig.open(ONE, size_bytes=2 * MIB)
    assert rig.read(rig.connect(ONE), 300) == 7
    rig.ship(ONE)
    rig.stop()
