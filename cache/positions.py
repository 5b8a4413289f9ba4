"""Whose writes are newest: the pure rules that compare a store's record with the device's memory.

Epochs are the evidence.  The store's epoch grows by one with every writable open, by whomever; so
an epoch that has not moved since ours, or by exactly one and to us, means that nobody else has
written.  By induction an open_holder that is us is enough for dirty records: this check ran before
each of our opens.  For read slots the proof has to be whole, see slots_are_valid.
"""

from millpond.cache.errors import VolumeRefused
from millpond.cache.replicas import VolumeRecord
from millpond.native.engine import VolumeStatus


def check_still_ours(record: VolumeRecord, known: VolumeStatus | None, cache_id: bytes) -> None:
    """Refuse to open when our newest writes and the store's history have parted.

    Raises VolumeRefused: nothing of the device may be shipped or dropped then.
    """
    ours = cache_id.hex()
    if known is None:
        if record.dirty_holder == ours:
            raise VolumeRefused(
                "the store says that this cache holds writes which were not shipped, but the device"
                " does not know the volume; was the device replaced?"
            )
        return
    if has_arrived(record, known, cache_id):
        return
    # A volume may have grown since, and shrunk when there was nothing left to ship.
    if known.has_undestaged and record.size_bytes < known.size_bytes:
        raise VolumeRefused(
            f"the store says {record.size_bytes} bytes, this device {known.size_bytes} and has"
            " writes that were not shipped"
        )
    if record.epoch < known.epoch or record.applied_sequence < known.destaged_sequence:
        raise VolumeRefused(
            f"the store (epoch {record.epoch}, sequence {record.applied_sequence}) is older than"
            f" what this cache has shipped ({known.epoch}, {known.destaged_sequence}): it lost data"
            " or was restored; repair it, or format this cache to accept the older state"
        )
    if known.has_undestaged and record.applied_sequence > known.last_sequence:
        raise VolumeRefused(
            f"the store (sequence {record.applied_sequence}) is ahead of the writes on this device"
            f" (up to {known.last_sequence}): the device was restored, or is a copy"
        )
    if not known.has_undestaged or record.open_holder == ours or record.epoch == known.epoch:
        return
    raise VolumeRefused(
        f"another cache took the volume over (epoch {record.epoch}, here {known.epoch});"
        f" {known.dirty_bytes} bytes of writes up to sequence {known.last_sequence} on this device"
        " were replaced by its history"
    )


def has_arrived(record: VolumeRecord, known: VolumeStatus, cache_id: bytes) -> bool:
    """All that the device takes for unshipped is in the store's history, and nothing else is ours.

    The device hears that a batch was applied, and remembers it at its next checkpoint: after a
    crash it may take for dirty what it shipped before it gave the volume back.  The proof is the
    store's list of writable opens: the one after ours began behind our last write, and the store
    has applied up to there.  Where "dirty" is on record for us there are newer writes of ours,
    which a device that was restored from a copy does not know: that is for check_still_ours.
    """
    if record.dirty_holder == cache_id.hex():
        return False
    ids = [lineage for lineage, _ in record.lineages]
    if known.lineage not in ids or record.applied_sequence < known.last_sequence:
        return False
    later = record.lineages[ids.index(known.lineage) + 1 :]
    return all(first_sequence > known.last_sequence for _, first_sequence in later)


def history_is_ours(record: VolumeRecord, known: VolumeStatus | None, cache_id: bytes) -> bool:
    """Nobody else has written since we did (record: before our open).

    An open_holder that is us is enough, by induction: whatever remembers the volume as it was is
    ended before we open it over somebody else's history, and it is not given back meanwhile.
    """
    if record.open_holder == cache_id.hex():
        return True
    return known is not None and record.epoch == known.epoch


def slots_are_valid(record: VolumeRecord, known: VolumeStatus | None, cache_id: bytes) -> bool:
    """The device's read slots show the store's image (record: before our open).

    The epoch must not have moved but by us, so that every record the store has applied came from
    this device; and the store must stand within the records that the device knows, the last of
    which may have been applied without our hearing of it.  The lineage of the store's position is
    not compared: one that never shipped a record is not in it, and a guest that only read would
    find its cache cold.  What the lineage proves, the epoch proves already.
    """
    if known is None:
        return False
    if not known.destaged_sequence <= record.applied_sequence <= known.last_sequence:
        return False
    moved_by_us = record.epoch == known.epoch + 1 and record.open_holder == cache_id.hex()
    return record.epoch == known.epoch or moved_by_us


def first_sequence_of(
    record: VolumeRecord, known: VolumeStatus | None, cache_id: bytes
) -> int | None:
    """Where a new lineage begins: behind what the device still has to ship, else at the store's."""
    if known is None or not known.has_undestaged or has_arrived(record, known, cache_id):
        return None
    return known.last_sequence + 1
