"""Scrubbing: what lies on the disk and no longer verifies is found, once a pass, at its rate."""

from collections.abc import Iterator

import pytest

from fsck_support import check, check_clean, files, flip, records_of
from millpond.native import ffi, lib
from millpond.native.drivers import Op, SimOptions
from millpond.native.store import ScrubFinding, ScrubKind
from millpond.native.storefsck import FsckKind
from store_support import BLOCK, VOLUME, World, WorldEnded, Write, fill

OK = lib.MP_STATUS_OK
MIB = 1 << 20
SECOND_NS = 1_000_000_000
WINDOW_BYTES = 128 * 1024
OTHER = bytes([9]) * 16


def make(*, scrub_bytes_per_s: int = 64 * MIB, **options: int) -> World:
    """A store with raw and compressed extents, live, in part and dead, in several segments."""
    world = World(None, scrub_bytes_per_s=scrub_bytes_per_s, **options).format().open()
    world.create(blocks=4096)
    world.create(OTHER, blocks=512)
    for turn in range(8):
        assert world.write([Write(turn * 40, fill(turn, 40))], first=turn + 1) == OK
    assert world.write([Write(8, fill(50, 8, compressible=True))], first=1, volume=OTHER) == OK
    assert world.write([Write(41, fill(51, 2)), Write(81, block_count=12)], first=9) == OK
    return world


@pytest.fixture
def world() -> Iterator[World]:
    """One that scrubs without a rest."""
    made = make()
    yield made
    made.close()


def passes(world: World, count: int) -> dict[str, int]:
    """Turn until so many more passes are finished."""
    wanted = world.store.counters()["scrub_passes"] + count
    for _ in range(20_000):
        if world.store.counters()["scrub_passes"] >= wanted:
            return dict(world.store.counters())
        assert world.store.step(SECOND_NS) >= 0
    raise AssertionError("the pass does not end")


def one_pass(world: World) -> list[ScrubFinding]:
    """What a whole pass finds: the one under way may have begun too early."""
    passes(world, 1)
    while world.store.scrub_findings():
        pass
    passes(world, 1)
    return world.store.scrub_findings()


def test_store_without_damage_is_verified_whole(world: World) -> None:
    assert one_pass(world) == []
    before = world.store.counters()
    after = passes(world, 1)
    live = before["live_bytes"]
    assert after["scrub_verified_bytes"] - before["scrub_verified_bytes"] >= live
    assert after["scrub_bad_last_pass"] == after["scrub_bad"] == 0
    assert after["scrub_finished_ns"] > before["scrub_finished_ns"]
    assert after["checksum_errors"] == 0


def test_flipped_bit_in_every_kind_of_live_extent_is_found(world: World) -> None:
    """Raw, raw in part, compressed: each is named, and found once a pass."""
    wanted = {}
    for placed in records_of(world, lib.MP_RECORD_BATCH):
        for index, extent in enumerate(placed.record.extents):
            at = placed.payload_at(index)
            if extent.codec == lib.MP_CODEC_LZ4:
                flip(world, placed.file, at)
                wanted[placed.file, at] = (placed.record.volume, extent.first_block, 4)
            elif extent.first_block in (0, 40, 160):
                skip = 3 if extent.first_block == 40 else 1  # 41 and 42 are overwritten
                flip(world, placed.file, at + skip * BLOCK + 9)
                wanted[placed.file, at] = (VOLUME, extent.first_block + skip, 1)
    assert len(wanted) == 5
    for _ in range(2):  # every pass tells it again
        found = {
            (each.segment, each.offset_bytes): (each.volume, each.first_block, each.block_count)
            for each in one_pass(world)
        }
        assert found == wanted
    counters = world.store.counters()
    assert counters["scrub_bad_last_pass"] == len(wanted)
    # Damage does not stop the store; the block is the error that it always was.
    assert world.store.failure() is None and counters["failed"] == 0
    assert world.read(1, 1).status == lib.MP_STATUS_CORRUPT
    assert world.read(2, 1).data == fill(0, 40)[2 * BLOCK : 3 * BLOCK]
    assert world.write([Write(0, fill(99, 4))], first=11) == OK
    assert len(one_pass(world)) == len(wanted) - 1


def test_flipped_bit_in_what_is_dead_is_no_matter(world: World) -> None:
    (placed,) = [
        each
        for each in records_of(world, lib.MP_RECORD_BATCH)
        if each.record.first_sequence == 2 and each.record.volume == VOLUME
    ]
    flip(world, placed.file, placed.payload_at(0) + BLOCK + 9)  # block 41 was overwritten
    assert one_pass(world) == []


@pytest.mark.parametrize("at", [0, 8, 100, 192, 230])
def test_flipped_bit_in_a_record_or_its_table_is_found(world: World, at: int) -> None:
    placed = records_of(world, lib.MP_RECORD_BATCH)[3]
    flip(world, placed.file, placed.offset + at)
    (found,) = one_pass(world)
    assert found.kind is ScrubKind.RECORD and found.block_count == 0
    assert (found.segment, found.offset_bytes) == (placed.file, placed.offset)


@pytest.mark.parametrize("at", [0, 8, 50])
def test_flipped_bit_in_a_group_header_is_found(world: World, at: int) -> None:
    placed = records_of(world, lib.MP_RECORD_BATCH)[3]
    flip(world, placed.file, placed.group_offset + at)
    (found,) = one_pass(world)
    assert (found.segment, found.offset_bytes) == (placed.file, placed.group_offset)


def test_flipped_bit_in_a_volume_state_is_found(world: World) -> None:
    placed = records_of(world, lib.MP_RECORD_VOLUME)[1]
    flip(world, placed.file, placed.offset + lib.MP_RECORD_HEADER_BYTES + 40)
    (found,) = one_pass(world)
    assert (found.kind, found.offset_bytes) == (ScrubKind.RECORD, placed.offset)


def test_unreadable_sector_hides_nothing_beside_it(world: World) -> None:
    passes(world, 1)
    while world.store.scrub_findings():
        pass
    world.sim.set(SimOptions(latency_ns=1000, fail_io=1, fail_op=Op.READ))  # once
    passes(world, 2)
    found = world.store.scrub_findings()
    # A read of many extents is done again, one by one, and then succeeds.
    assert len(found) <= 1 and world.store.failure() is None
    assert all(each.kind is ScrubKind.UNREADABLE for each in found)


def test_nothing_is_read_when_it_is_off() -> None:
    world = make(scrub_bytes_per_s=0)
    world.settle(300)
    world.sim.set(SimOptions(latency_ns=1000))
    for _ in range(50):
        world.sim.advance_ns(1000 * SECOND_NS)
        world.store.step(SECOND_NS)
    assert world.sim.count(Op.READ) == 0
    counters = world.store.counters()
    assert not any(value for name, value in counters.items() if name.startswith("scrub"))
    world.close()


@pytest.mark.parametrize("rate", [MIB // 4, 16 * MIB])
def test_rate_is_kept_in_virtual_time(rate: int) -> None:
    world = make(scrub_bytes_per_s=rate)
    passes(world, 1)
    before, begin_ns = world.store.counters()["scrub_read_bytes"], world.sim.now_ns
    while world.sim.now_ns < begin_ns + 20 * SECOND_NS and (
        world.store.counters()["scrub_read_bytes"] - before < 8 * MIB
    ):
        assert world.store.step(SECOND_NS) >= 0
    read_bytes = world.store.counters()["scrub_read_bytes"] - before
    allowed = rate * (world.sim.now_ns - begin_ns) / SECOND_NS
    # What is read is within a read of what is allowed, and nothing else holds it up.
    assert allowed - 0.2 * allowed - WINDOW_BYTES <= read_bytes <= allowed + WINDOW_BYTES
    world.close()


def test_status_tells_where_it_is() -> None:
    world = make(scrub_bytes_per_s=MIB)
    passes(world, 1)
    seen = set()
    while world.store.counters()["scrub_passes"] < 3:
        world.store.step(SECOND_NS)
        counters = world.store.counters()
        seen.add((counters["scrub_segment"], counters["scrub_offset_bytes"]))
    held = {placed.file for placed in records_of(world, lib.MP_RECORD_BATCH)}
    assert held <= {segment for segment, _ in seen} <= held | {0}
    assert len(seen) > 2 * len(held)
    world.close()


def empty_groups(world: World) -> list[tuple[int, int]]:
    """(file, offset) of groups of the log without records."""
    found = []
    for file, length in files(world).items():
        at = 0
        while file and at < length:
            data = world.sim.peek(file=file, offset_bytes=at, length_bytes=BLOCK)
            group = ffi.cast("struct mp_group *", ffi.from_buffer(data))
            if group.segment != file or group.offset_bytes != at or group.kind != 1:
                break
            if group.record_count == 0:
                found.append((file, at))
            at += group.length_bytes
    return found


@pytest.mark.parametrize("behind", ["nothing", "a group", "a group and its evidence"])
def test_evidence_that_a_power_cut_took_back_is_no_damage(world: World, behind: str) -> None:
    """A group without records is not synced by itself, and a checkpoint may be behind it."""
    world.settle(20)
    assert world.checkpoint() == OK
    file, at = empty_groups(world)[-1]
    if behind != "nothing":
        assert world.write([Write(300, fill(77))], first=11) == OK
        assert any(placed.file == file for placed in records_of(world, lib.MP_RECORD_BATCH))
    if behind == "a group and its evidence":
        world.settle(20)
        assert len(empty_groups(world)) == 2
    world.shut()
    world.sim.poke(file=file, offset_bytes=at, data=bytes(BLOCK))
    if behind == "a group and its evidence":
        found = check(world).only(FsckKind.RECORD)  # there was a sync behind it
        assert (found.segment, found.offset_bytes) == (file, at)
        return
    check_clean(world)
    world.open()
    passes(world, 1)
    assert one_pass(world) == []
    assert world.image(40)[:BLOCK] == fill(0, 40)[:BLOCK]


def test_next_pass_begins_when_its_time_has_come() -> None:
    world = make(scrub_interval_ns=1000 * SECOND_NS)
    begin_ns = world.sim.now_ns
    first = passes(world, 1)
    assert first["scrub_segment"] == 0  # it rests
    while world.sim.now_ns < begin_ns + 990 * SECOND_NS:
        assert world.store.step(10 * SECOND_NS) >= 0
    resting = world.store.counters()
    assert resting["scrub_read_bytes"] == first["scrub_read_bytes"]
    passes(world, 1)
    assert world.sim.now_ns >= begin_ns + 1000 * SECOND_NS
    world.close()


@pytest.mark.parametrize("rate", [4 * MIB, 1 << 40])
def test_clients_go_first_and_still_a_pass_ends(rate: int) -> None:
    """While somebody always asks, an eighth of the rate is left, a hundred reads a second."""
    world = make(scrub_bytes_per_s=rate)
    passes(world, 1)
    before, begin_ns = dict(world.store.counters()), world.sim.now_ns
    reads = 0
    while world.sim.now_ns < begin_ns + 2 * SECOND_NS:
        assert world.read(reads % 300, 1).status == OK
        world.sim.advance_ns(1_000_000)
        reads += 1
    busy = world.store.counters()
    allowed = min(rate / 8, 100 * WINDOW_BYTES) * (world.sim.now_ns - begin_ns) / SECOND_NS
    read_bytes = busy["scrub_read_bytes"] - before["scrub_read_bytes"]
    assert allowed / 2 <= read_bytes <= allowed + 2 * WINDOW_BYTES
    assert busy["scrub_yields"] > before["scrub_yields"] and reads > 100
    world.settle(20)  # they have gone: the whole rate again
    before, begin_ns = dict(world.store.counters()), world.sim.now_ns
    for _ in range(40):
        assert world.store.step(SECOND_NS) >= 0
    read_bytes = world.store.counters()["scrub_read_bytes"] - before["scrub_read_bytes"]
    passed_s = (world.sim.now_ns - begin_ns) / SECOND_NS
    assert read_bytes > min(rate, 256 * MIB) * passed_s / 2
    world.close()


def test_segments_that_are_punched_and_removed_under_it_are_no_damage() -> None:
    """Everything is rewritten, trimmed and given back all the time; nothing is found."""
    world = make(scrub_bytes_per_s=256 * MIB)
    passes(world, 1)
    sequence = 11
    for turn in range(60):
        first = turn % 6 * 40
        writes = [Write(first, fill(turn, 40, compressible=turn % 3 == 0))]
        if turn % 4 == 0:
            writes.append(Write(first + 5, block_count=11))
        assert world.write(writes, first=sequence) == OK
        sequence += len(writes)
        if turn % 2:
            assert world.checkpoint() == OK
        for _ in range(turn % 7 * 10):
            world.store.step(20_000_000)  # quiet for long enough
    counters = passes(world, 2)
    assert counters["punched_bytes"] > 100 * BLOCK and counters["scrub_passes"] > 5
    assert world.store.scrub_findings() == [] and counters["scrub_bad"] == 0
    assert world.store.failure() is None
    world.close()


@pytest.mark.parametrize("rate", [1, 1 << 40], ids=["a day per read", "without end"])
def test_stop_does_not_wait_for_a_pass(rate: int) -> None:
    world = make(scrub_bytes_per_s=rate)
    world.sim.advance_ns(60 * SECOND_NS)  # it was empty when it was opened
    for _ in range(50):
        world.store.step(1_000_000)
    before, begin_ns = world.store.counters()["scrub_read_bytes"], world.sim.now_ns
    assert before
    world.store.stop()
    assert world.store.counters()["scrub_read_bytes"] <= before + WINDOW_BYTES
    assert world.sim.now_ns < begin_ns + SECOND_NS
    world.close()


def test_crash_at_any_moment_of_a_pass_changes_nothing() -> None:
    for moment in range(1, 60, 7):
        world = make()
        try:
            for _ in range(moment):
                world.store.step(1_000_000)
            world.sim.crash()
            world.settle(5)
        except WorldEnded:
            pass
        world.reopen()
        assert world.image(40)[: 40 * BLOCK] == fill(0, 40)
        assert one_pass(world) == []
        world.close()


def test_more_findings_than_are_taken_are_counted_and_bounded(world: World) -> None:
    passes(world, 1)
    for placed in records_of(world, lib.MP_RECORD_BATCH):
        if placed.record.volume == VOLUME and placed.record.first_sequence <= 8:
            for index in range(len(placed.record.extents)):
                flip(world, placed.file, placed.payload_at(index))
    counters = passes(world, 3)
    assert counters["scrub_bad_last_pass"] > 64
    assert len(world.store.scrub_findings(1000)) == 64
