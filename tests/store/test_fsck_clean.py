"""A store without a fault is clean, whatever happened to it; what may be missing is."""

import random
import secrets

import pytest

from fsck_support import check, check_clean, files, records_of
from millpond.native import lib
from store.fsck_history import Life
from store_support import BLOCK, VOLUME, World, Write, fill

OK = lib.MP_STATUS_OK
LIVES = 60


@pytest.mark.parametrize("crashes", [False, True], ids=["orderly", "crashing"])
def test_store_is_clean_whatever_happened_to_it(crashes: bool) -> None:
    seed = secrets.randbelow(1 << 30)
    print(f"seed {seed}")
    checks = missing = passes = 0

    def clean(world: World) -> None:
        nonlocal checks, missing, passes
        # Of much memory, and of next to none: then in passes.
        summary = check_clean(world, memory_bytes=random.Random(checks).choice([1, 1 << 20]))
        checks += 1
        missing += summary.missing_commits > 0
        passes = max(passes, summary.passes)

    for life in range(LIVES):
        lived = Life(seed + life, crashes=crashes, between=clean)
        lived.run(random.Random(seed + life).randrange(5, 90))
        lived.world.close()
    # Histories that never lose a segment or never need a second pass would prove little.
    assert checks > LIVES and missing > LIVES / 4 and passes > 2


def test_empty_store_is_clean() -> None:
    world = World().format()
    assert check_clean(world).records == 0
    world.close()


def rewrite(world: World, *, first: int, volume: bytes = VOLUME, turns: int = 12) -> int:
    """Fill segments that die at once; the next sequence."""
    for turn in range(turns):
        writes = [Write(0, fill(first + turn, 48))]
        assert world.write(writes, first=first + turn, volume=volume) == OK
    for _ in range(2):
        assert world.checkpoint() == OK
        world.settle()
    return first + turns


def test_volume_whose_birth_is_in_a_segment_that_is_gone_is_clean() -> None:
    world = World().format().open()
    world.create(blocks=512)
    rewrite(world, first=1)
    world.store.stop()
    world.shut()
    assert not records_of(world, lib.MP_RECORD_VOLUME)
    assert check_clean(world).missing_commits
    world.close()


def test_trim_that_is_gone_with_its_segment_leaves_a_legal_hole() -> None:
    """The log has the data, the map a hole, and nobody tells why any more."""
    world = World().format().open()
    other = bytes([9]) * 16
    world.create(blocks=512)
    world.create(other, blocks=512)
    assert world.write([Write(0, fill(1, 8)), Write(100, fill(2, 8))], first=1) == OK
    sequence = rewrite(world, first=1, volume=other)
    assert world.write([Write(0, block_count=8)], first=3) == OK
    rewrite(world, first=sequence, volume=other)
    world.store.stop()
    world.shut()
    trims = [
        extent
        for placed in records_of(world, lib.MP_RECORD_BATCH)
        for extent in placed.record.extents
        if extent.codec == lib.MP_CODEC_TRIM
    ]
    assert not trims
    assert check_clean(world).missing_commits
    world.close()


def test_deletion_that_is_gone_with_its_segment_is_clean() -> None:
    world = World().format().open()
    gone = bytes([9]) * 16
    world.create(blocks=512)
    world.create(gone, blocks=512)
    assert world.write([Write(0, fill(1, 8))], first=1) == OK  # keeps the first segment
    assert world.write([Write(0, fill(2, 8))], first=1, volume=gone) == OK
    other = bytes([8]) * 16
    world.create(other, blocks=512)
    sequence = rewrite(world, first=1, volume=other)
    assert world.delete(gone) == OK
    rewrite(world, first=sequence, volume=other)
    world.store.stop()
    world.shut()
    assert not records_of(world, lib.MP_RECORD_DELETE)
    assert any(placed.record.volume == gone for placed in records_of(world, lib.MP_RECORD_BATCH))
    check_clean(world)
    world.close()


def test_punched_ranges_are_not_asked_for_and_damage_in_them_is_none() -> None:
    world = World().format().open()
    world.create(blocks=512)
    assert world.write([Write(0, fill(1, 40))], first=1) == OK
    assert world.write([Write(4, fill(2, 32))], first=2) == OK
    assert world.checkpoint() == OK
    world.settle()
    assert world.store.counters()["punched_bytes"] > 28 * BLOCK
    world.store.stop()
    world.shut()
    check_clean(world)
    placed = records_of(world, lib.MP_RECORD_BATCH)[0]
    world.sim.poke(file=placed.file, offset_bytes=placed.payload_at(5), data=b"noise")
    check_clean(world)
    world.close()


def test_files_that_belong_to_nothing_are_no_matter() -> None:
    """Spares, and what a removal that a crash forgot left behind."""
    world = World().format().open()
    world.create(blocks=512)
    assert world.write([Write(0, fill(1, 40))], first=1) == OK
    assert world.checkpoint() == OK
    world.shut()  # no stop: the spares stay
    tables = {world.sim.peek(file=file, offset_bytes=0, length_bytes=8) for file in files(world)}
    assert bytes(8) in tables  # a spare
    check_clean(world)
    world.close()


def test_checks_one_after_the_other_and_the_store_opens_as_ever() -> None:
    world = World().format().open()
    world.create(blocks=512)
    assert world.write([Write(0, fill(1, 40))], first=1) == OK
    world.shut()
    assert check(world) == check(world)
    world.open()
    assert world.image(40) == fill(1, 40)
    world.close()
