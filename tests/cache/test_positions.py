"""Which writes of a device have arrived, whatever it remembers: the pure rule, and a hand-over.

A device learns that a batch was applied, and keeps that with its next checkpoint.  After a crash it
takes for dirty what it shipped long ago; meanwhile another cache may have written.
"""

from dataclasses import replace

import pytest

from millpond.cache.errors import VolumeRefused
from millpond.cache.positions import check_still_ours, first_sequence_of, has_arrived
from millpond.cache.replicas import VolumeRecord
from millpond.native.engine import VolumeStatus
from sim.plan import Kind
from sim.torture import Case, run_case

US, OTHER = bytes(range(16)), bytes(range(1, 17))
OURS, THEIRS = 7, 8
NUMBERS = dict.fromkeys(VolumeStatus.__slots__, 0)
NUMBERS |= {"epoch": 4, "lineage": OURS, "destaged_sequence": 15, "last_sequence": 20}
KNOWN = VolumeStatus(**{**NUMBERS, "id": US})  # type: ignore[arg-type]  # all but the id are int


def record(
    applied: int,
    *lineages: tuple[int, int],
    holder: bytes | None = OTHER,
    dirty: bytes | None = None,
) -> VolumeRecord:
    """The volume, opened by others since."""
    return VolumeRecord(
        name="disk",
        id=US.hex(),
        size_bytes=0,
        epoch=5,
        lineage=lineages[-1][0],
        applied_sequence=applied,
        open_holder=holder.hex() if holder else None,
        dirty_holder=dirty.hex() if dirty else None,
        lineages=lineages,
    )


MOVED_ON = record(30, (OURS, 11), (THEIRS, 21))


def test_everything_was_shipped_before_the_volume_moved_on() -> None:
    assert has_arrived(MOVED_ON, KNOWN, US)
    check_still_ours(MOVED_ON, KNOWN, US)
    assert first_sequence_of(MOVED_ON, KNOWN, US) is None


def test_nobody_has_written_since() -> None:
    assert has_arrived(record(20, (OURS, 11), (THEIRS, 21)), KNOWN, US)
    assert has_arrived(record(20, (OURS, 11), holder=None), KNOWN, US)


def test_loss_was_accepted_and_the_other_history_began_before_our_last_write() -> None:
    taken_over = record(30, (OURS, 11), (THEIRS, 16))
    assert not has_arrived(taken_over, KNOWN, US)
    with pytest.raises(VolumeRefused):
        check_still_ours(taken_over, KNOWN, US)


def test_store_has_not_all_of_it() -> None:
    assert not has_arrived(record(18, (OURS, 11), holder=None), KNOWN, US)


def test_history_that_does_not_know_our_lineage_proves_nothing() -> None:
    assert not has_arrived(record(30, (THEIRS, 21)), KNOWN, US)
    assert not has_arrived(replace_lineages(()), KNOWN, US)


def test_we_opened_it_again_and_fell_before_the_engine_knew() -> None:
    """Nothing of ours is dirty on record: nothing can be missing."""
    assert has_arrived(record(30, (OURS, 11), (THEIRS, 21), holder=US), KNOWN, US)


def test_device_restored_from_a_copy_finds_us_dirty_on_record() -> None:
    """Newer writes of ours were on the device that the copy replaced."""
    ahead = record(30, (OURS, 11), (THEIRS, 21), holder=US, dirty=US)
    assert not has_arrived(ahead, KNOWN, US)
    with pytest.raises(VolumeRefused, match="restored, or is a copy"):
        check_still_ours(ahead, KNOWN, US)


def replace_lineages(lineages: tuple[tuple[int, int], ...]) -> VolumeRecord:
    """MOVED_ON, as a store says it that does not tell lineages."""
    fields = {name: getattr(MOVED_ON, name) for name in MOVED_ON.__struct_fields__}
    return VolumeRecord(**{**fields, "lineages": lineages})


def test_device_that_knows_more_than_the_store_is_no_arrival() -> None:
    assert not has_arrived(MOVED_ON, replace(KNOWN, last_sequence=40), US)


def test_host_crashes_after_the_guest_moved_away_and_the_guest_comes_back() -> None:
    """It took what it had shipped for dirty, and refused its volume until it was formatted."""
    kinds = (Kind.MOVE, Kind.KILL_CACHE, Kind.HOLD_STORE)
    assert run_case(Case(3, kinds=kinds)).error == ""
