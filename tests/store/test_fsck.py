"""Every kind of damage is found, and named: what, which volume, which segment and offset."""

import random
import secrets
from collections.abc import Iterator
from typing import Any

import pytest

from fsck_support import (
    check,
    check_clean,
    files,
    flip,
    forge,
    records,
    records_of,
    remove_file,
    superblock,
)
from millpond.native import ffi, lib
from millpond.native.store import StoreOpenError
from millpond.native.storefsck import FsckKind
from store.fsck_history import BLOCKS, Life
from store_support import BLOCK, VOLUME, World, Write, fill

OK = lib.MP_STATUS_OK
OTHER = bytes([9]) * 16


@pytest.fixture
def world() -> Iterator[World]:
    """Three segments of log behind a checkpoint, and some log behind that. Shut."""
    made = World().format().open()
    made.create(blocks=4096)
    made.create(OTHER, blocks=512)
    for turn in range(12):
        assert made.write([Write(turn * 40, fill(turn, 40))], first=turn + 1) == OK
    assert made.write([Write(8, fill(50, 4, compressible=True))], first=1, volume=OTHER) == OK
    assert made.checkpoint() == OK
    assert made.write([Write(0, fill(60, 4))], first=13) == OK
    made.settle(20)
    made.shut()
    check_clean(made)
    yield made
    made.close()


def batch(world: World, sequence: int, volume: bytes = VOLUME) -> Any:
    """The record that has this sequence of a volume."""
    (found,) = [
        placed
        for placed in records_of(world, lib.MP_RECORD_BATCH)
        if placed.record.volume == volume and placed.record.first_sequence == sequence
    ]
    return found


# ---- the log ----


def test_flipped_bit_in_a_raw_payload_is_named_to_the_block(world: World) -> None:
    placed = batch(world, 5)
    at = placed.payload_at(3) + 2 * BLOCK
    flip(world, placed.file, at + 77)
    found = check(world).only(FsckKind.DATA)
    assert (found.volume, found.first_block, found.block_count) == (VOLUME, 160 + 14, 1)
    assert (found.segment, found.offset_bytes) == (placed.file, at)


def test_flipped_bits_in_neighbouring_blocks_are_one_line(world: World) -> None:
    placed = batch(world, 5)
    for block in range(3, 9):
        flip(world, placed.file, placed.payload_at(0) + block * BLOCK)
    checked = check(world)
    found = checked.only(FsckKind.DATA)
    assert (found.first_block, found.block_count) == (163, 6)
    assert checked.summary.bad_bytes == 6 * BLOCK


def test_flipped_bit_in_a_compressed_payload_takes_its_extent(world: World) -> None:
    placed = batch(world, 1, OTHER)
    flip(world, placed.file, placed.payload_at(0))
    found = check(world).only(FsckKind.DATA)
    assert (found.volume, found.first_block, found.block_count) == (OTHER, 8, 4)


@pytest.mark.parametrize("at", [8, 30, 100, 192, 192 + 120 * 3 + 50], ids=lambda at: f"byte {at}")
def test_flipped_bit_in_a_record_or_its_table_is_found_and_its_data_still_verified(
    world: World, at: int
) -> None:
    placed = batch(world, 5)
    flip(world, placed.file, placed.offset + at)
    checked = check(world)
    found = checked.only(FsckKind.RECORD)
    assert (found.segment, found.offset_bytes) == (placed.file, placed.offset)
    assert checked.summary.unproven_blocks == 40
    flip(world, placed.file, placed.payload_at(2))  # what the table alone can tell
    (data,) = check(world).of(FsckKind.DATA)
    assert (data.first_block, data.block_count) == (168, 1)


def test_records_behind_a_damaged_one_are_still_compared(world: World) -> None:
    world.open()
    for sequence in (14, 15, 16):
        assert world.write([Write(sequence * 40, fill(sequence, 4))], first=sequence) == OK
    assert world.checkpoint() == OK
    world.shut()
    placed = batch(world, 14)
    assert placed.file == batch(world, 15).file == batch(world, 16).file
    flip(world, placed.file, placed.offset + 8)
    checked = check(world)
    assert checked.only(FsckKind.RECORD).offset_bytes == placed.offset
    assert checked.summary.unproven_blocks == 4


def test_flipped_bit_in_a_volume_state_is_found(world: World) -> None:
    placed = records_of(world, lib.MP_RECORD_VOLUME)[1]
    flip(world, placed.file, placed.offset + lib.MP_RECORD_HEADER_BYTES + 200)
    found = check(world).of(FsckKind.RECORD)[0]
    assert (found.segment, found.offset_bytes) == (placed.file, placed.offset)


@pytest.mark.parametrize("at", [3, 20, 33, 40, 60, 70], ids=lambda at: f"byte {at}")
def test_flipped_bit_in_a_group_header_is_found(world: World, at: int) -> None:
    placed = batch(world, 5)
    flip(world, placed.file, placed.group_offset + at)
    found = check(world).only(FsckKind.RECORD)
    assert (found.segment, found.offset_bytes) == (placed.file, placed.group_offset)


def test_zeroed_group_at_the_end_of_a_segment_is_no_lost_evidence(world: World) -> None:
    """A small group that held records is not taken for one that held none."""
    world.open()
    world.store.stop()
    world.shut()
    world.open()
    assert world.write([Write(0, fill(1, 1, compressible=True))], first=14) == OK
    assert world.checkpoint() == OK  # before there is evidence
    world.shut()
    placed = batch(world, 14)
    assert placed.group_offset == 0
    world.sim.poke(file=placed.file, offset_bytes=0, data=bytes(BLOCK))
    assert check(world).findings
    world.open()


def test_changed_extent_is_not_what_table_and_map_say(world: World) -> None:
    placed = batch(world, 5)

    def move(header: Any, data: bytearray) -> None:
        extent = ffi.cast("struct mp_extent *", ffi.from_buffer(data) + lib.MP_RECORD_HEADER_BYTES)
        extent.first_block += 1000

    forge(world, placed, move)
    checked = check(world)
    assert checked.kinds == {FsckKind.EXTENTS, FsckKind.MAP}
    assert {(f.volume, f.segment, f.offset_bytes) for f in checked.of(FsckKind.EXTENTS)} == {
        (VOLUME, placed.file, placed.payload_at(0))
    }
    ranges = {(f.first_block, f.block_count) for f in checked.of(FsckKind.MAP)}
    assert ranges == {(160, 4), (1160, 4)}


def test_trim_that_the_map_did_not_follow_is_found(world: World) -> None:
    world.open()
    assert world.write([Write(80, block_count=4)], first=14) == OK
    assert world.checkpoint() == OK
    world.shut()
    check_clean(world)

    def move(header: Any, data: bytearray) -> None:
        extent = ffi.cast("struct mp_extent *", ffi.from_buffer(data) + lib.MP_RECORD_HEADER_BYTES)
        extent.first_block = 120

    forge(world, batch(world, 14), move)
    hole, old = check(world).findings
    assert hole.kind is old.kind is FsckKind.MAP
    assert (hole.first_block, hole.block_count) == (80, 4) and "hole" in hole.text
    assert (old.first_block, old.block_count) == (120, 4) and "older" in old.text


def test_state_that_the_catalogue_does_not_have_is_found(world: World) -> None:
    placed = records_of(world, lib.MP_RECORD_VOLUME)[1]

    def raise_epoch(header: Any, data: bytearray) -> None:
        state = ffi.cast("struct mp_volume_state *", ffi.from_buffer(data) + 192)
        state.epoch += 7

    forge(world, placed, raise_epoch)
    checked = check(world)
    assert checked.kinds == {FsckKind.CATALOGUE}
    assert {found.volume for found in checked.findings} == {OTHER}
    assert any("epoch" in found.text for found in checked.findings)


def test_damage_behind_the_checkpoint_is_what_an_open_refuses(world: World) -> None:
    placed = batch(world, 13)
    flip(world, placed.file, placed.payload_at(0))
    refused, lost = check(world).findings
    assert refused.kind is FsckKind.OPEN
    assert f"segment {placed.file} is damaged at offset {placed.group_offset}" in refused.text
    assert lost.kind is FsckKind.DATA and lost.volume == VOLUME
    assert (lost.first_block, lost.block_count) == (0, 1)
    assert (lost.segment, lost.offset_bytes) == (placed.file, placed.payload_at(0))
    with pytest.raises(StoreOpenError):
        world.open()


@pytest.mark.parametrize("where", ["group", "record"])
def test_damaged_header_behind_the_checkpoint_is_named(world: World, where: str) -> None:
    placed = batch(world, 13)
    at = placed.group_offset if where == "group" else placed.offset
    flip(world, placed.file, at + 40)
    (found,) = check(world).of(FsckKind.RECORD)
    assert (found.segment, found.offset_bytes) == (placed.file, at)


# ---- files ----


def test_removed_segment_is_named_and_what_it_held(world: World) -> None:
    placed = batch(world, 5)
    held = [each for each in records_of(world, lib.MP_RECORD_BATCH) if each.file == placed.file]
    remove_file(world, placed.file)
    checked = check(world)
    (found,) = checked.of(FsckKind.FILE)
    assert found.segment == placed.file and "missing" in found.text
    lost = {f.first_block: f.block_count for f in checked.of(FsckKind.DATA)}
    assert sum(lost.values()) == 40 * len(held)
    assert {f.volume for f in checked.of(FsckKind.DATA)} == {VOLUME}
    assert not checked.of(FsckKind.MAP) and checked.of(FsckKind.OPEN)


def test_removed_segment_of_pages_is_named(world: World) -> None:
    file = superblock(world).checkpoint_segment
    world.open()  # a second checkpoint, elsewhere: the first one's pages are still in use
    assert world.write([Write(4000, fill(1))], first=14) == OK
    assert world.checkpoint() == OK
    world.shut()
    check_clean(world)
    assert superblock(world).checkpoint_segment != file
    remove_file(world, file)
    checked = check(world)
    assert [found.segment for found in checked.of(FsckKind.FILE)] == [file]
    assert {FsckKind.FILE, FsckKind.PAGE} <= checked.kinds


def test_removed_end_of_the_log_is_found_by_what_is_behind_it(world: World) -> None:
    for sequence in (14, 15):
        world.open()
        assert world.write([Write(0, fill(sequence, 4))], first=sequence) == OK
        world.settle(20)
        world.shut()
    placed = batch(world, 14)
    assert placed.group_offset == 0
    remove_file(world, placed.file)
    assert FsckKind.OPEN in check(world).kinds


# ---- what is derived ----


def checkpoint_record(world: World) -> Any:
    """The one record of the newest checkpoint."""
    found = superblock(world)
    (placed,) = [
        placed
        for placed in records_of(world, lib.MP_RECORD_CHECKPOINT)
        if placed.file == found.checkpoint_segment
        and placed.group_offset == found.checkpoint_offset_bytes
    ]
    return placed


def pages_of(world: World) -> Iterator[tuple[int, int, bytes]]:
    """(file, offset, volume or zero) of every page of the newest checkpoint's file."""
    for placed in records_of(world, lib.MP_RECORD_PAGES):
        length = placed.record.payload_length_bytes
        at = placed.offset + placed.record.header_length_bytes
        payload = world.sim.peek(file=placed.file, offset_bytes=at, length_bytes=length)
        count = next(
            n for n in range(257) if n == 256 or payload[n * 48 : n * 48 + 48] == bytes(48)
        )
        first = at + length - count * BLOCK
        for index in range(count):
            volume = payload[index * 48 : index * 48 + 16]
            yield placed.file, first + index * BLOCK, volume


def test_flipped_bit_in_every_page_of_maps_and_tables(world: World) -> None:
    world.open()
    world.store.stop()  # a checkpoint that is all there is
    world.shut()
    check_clean(world)
    found_in = set()
    for file, offset, volume in list(pages_of(world)):
        flip(world, file, offset + 100)
        checked = check(world)
        flip(world, file, offset + 100)
        if not checked.findings:
            continue  # an older version of a page: nobody refers to it
        page = checked.of(FsckKind.PAGE)[0]
        assert (page.segment, page.offset_bytes) == (file, offset)
        assert page.volume == (volume if any(volume) else None)
        assert checked.kinds == {FsckKind.PAGE}
        found_in.add(volume)
    assert found_in == {VOLUME, OTHER, bytes(16)}


def test_damaged_checkpoint_leaves_the_records_to_be_verified(world: World) -> None:
    flip(world, checkpoint_record(world).file, checkpoint_record(world).offset + 300)
    checked = check(world)
    assert "checkpoint" in checked.only(FsckKind.OPEN).text
    assert not checked.summary.compared and checked.summary.records > 14
    placed = batch(world, 5)
    flip(world, placed.file, placed.payload_at(0))
    flip(world, batch(world, 7).file, batch(world, 7).offset + 9)
    checked = check(world)
    assert checked.kinds == {FsckKind.OPEN, FsckKind.DATA, FsckKind.RECORD}
    assert checked.of(FsckKind.DATA)[0].volume == VOLUME


def test_one_damaged_superblock_is_found_and_two_are_worse(world: World) -> None:
    flip(world, 0, BLOCK + 40)
    found = check(world).only(FsckKind.SUPER)
    assert found.offset_bytes == BLOCK
    world.open()
    world.shut()
    check_clean(world)  # an open has written both
    flip(world, 0, 40)
    flip(world, 0, BLOCK + 40)
    checked = check(world)
    assert len(checked.of(FsckKind.SUPER)) == 2 and len(checked.of(FsckKind.OPEN)) == 1
    assert checked.summary.records > 14


def tables_of(data: bytearray) -> tuple[Any, Any, Any]:
    """Header, volumes and segments of a checkpoint's payload, writable."""
    at = ffi.from_buffer(data) + lib.MP_RECORD_HEADER_BYTES
    counts = ffi.cast("uint64_t *", at)
    volumes = ffi.cast("uint8_t *", at) + 128
    return counts, volumes, volumes + counts[2] * 736


@pytest.mark.parametrize("kind", [1, 2], ids=["data", "pages"])
def test_wrong_live_count_is_found(world: World, kind: int) -> None:
    changed: list[int] = []

    def count(header: Any, data: bytearray) -> None:
        counts, _, segments = tables_of(data)
        for index in range(counts[3]):
            entry = ffi.cast("uint64_t *", segments + index * 64)
            if ffi.cast("uint16_t *", segments + index * 64 + 52)[0] == kind and not changed:
                changed.append(entry[0])
                entry[1] += BLOCK

    forge(world, checkpoint_record(world), count)
    found = check(world).only(FsckKind.COUNT)
    assert [found.segment] == changed


def test_map_that_forgot_everything_is_found(world: World) -> None:
    volumes_found = []

    def forget(header: Any, data: bytearray) -> None:
        _, volumes, _ = tables_of(data)
        volumes_found.append(bytes(ffi.buffer(volumes, 16)))
        root = ffi.cast("uint64_t *", volumes + 736 - 48)
        assert root[0]
        root[0] = root[1] = 0

    forge(world, checkpoint_record(world), forget)
    checked = check(world)
    holes = checked.of(FsckKind.MAP)
    assert {FsckKind.MAP, FsckKind.EXTENTS} <= checked.kinds
    assert {found.volume for found in holes} == set(volumes_found)
    assert all("hole" in found.text for found in holes)


# ---- all of it ----


def outcome(world: World) -> list[object] | None:
    """Everything that readers can see. None: it does not open, or fails."""
    try:
        world.open()
    except StoreOpenError:
        world.shut()
        return None
    states = sorted(world.store.volumes(), key=lambda state: state.id)
    seen: list[object] = [*states]
    for state in states:
        for first in range(0, BLOCKS, 250):
            reply = world.read(first, 250, volume=state.id, epoch=state.epoch)
            seen.append((state.id, first, reply.status, reply.data))
    world.shut()
    return seen


def test_flipped_bit_anywhere_is_found_or_changes_nothing() -> None:
    """Sectors of a store with a past: what a check does not find, no reader may notice."""
    seed = secrets.randbelow(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    life = Life(seed, crashes=False, between=lambda world: None)
    life.run(60)
    world = life.world
    world.open()  # the last group may have no witness yet: README-store.md
    assert world.checkpoint() == OK
    world.create(bytes([9]) * 16)
    world.settle(20)
    world.shut()
    before = outcome(world)
    assert before is not None
    found = missed = 0
    for _ in range(120):
        file, length = chance.choice([item for item in files(world).items() if item[1]])
        at, mask = chance.randrange(length), 1 << chance.randrange(8)
        flip(world, file, at, mask)
        checked = check(world)
        if checked.findings:
            found += 1
            flip(world, file, at, mask)
            continue
        missed += 1
        assert outcome(world) == before, f"file {file} at {at}"
        if file in files(world):  # the open may have removed what belongs to nothing
            flip(world, file, at, mask)
    print(f"{found} found, {missed} no matter")
    assert found and missed
    world.close()


def test_records_are_what_the_check_counts(world: World) -> None:
    assert check_clean(world).records == sum(
        placed.record.type not in (lib.MP_RECORD_PAGES, lib.MP_RECORD_CHECKPOINT)
        for placed in records(world)
    )
