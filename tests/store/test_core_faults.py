"""The crash sweep can fail: each deliberate fault of store.h is found by it, on a fixed seed."""

import pytest

from millpond.native import lib
from millpond.native.store import StoreOpenError
from store import test_core_crash as sweep
from store_support import BLOCK, VOLUME, World, Write, fill

FAULTS = {
    "acknowledge before sync": (lib.MP_STORE_FAULT_ACK_BEFORE_SYNC, "power-torn-reordered"),
    "skip sync": (lib.MP_STORE_FAULT_SKIP_SYNC, "power"),
    "checkpoint before data": (lib.MP_STORE_FAULT_CHECKPOINT_BEFORE_DATA, "power-torn-reordered"),
    "punch early": (lib.MP_STORE_FAULT_PUNCH_EARLY, "daemon"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_sweep_finds(name: str) -> None:
    fault, kind = FAULTS[name]
    for seed in range(1, 9):
        for nth in range(1, 140):
            try:
                if not sweep.cut_at(nth, seed, faults=fault, **sweep.KINDS[kind]):
                    break
            except (AssertionError, StoreOpenError):
                return
    raise AssertionError(f"the fault '{name}' went unnoticed")


def torn_batch(faults: int) -> tuple[int, bytes]:
    """Two parts in one group, the second damaged before anything proves the sync."""
    world = World(test_faults=faults).format().open()
    world.create()
    data = fill(1, 8)
    assert world.write([Write(0, data)], first=1, parts=2) == lib.MP_STATUS_OK
    world.shut()
    for file in (1, 2, 3):
        stored = world.sim.peek(file=file, offset_bytes=0, length_bytes=32 * BLOCK)
        if (at := stored.find(data[7 * BLOCK : 7 * BLOCK + 64])) > 0:
            world.sim.poke(file=file, offset_bytes=at, data=b"torn")
            break
    world.open()
    state = world.store.volume(VOLUME)
    assert state
    result = (state.applied_sequence, world.image(8))
    world.close()
    return result


def test_batch_torn_between_its_parts_is_not_there_at_all() -> None:
    assert torn_batch(0) == (0, bytes(8 * BLOCK))


def test_fault_half_batch_is_what_whole_groups_prevent() -> None:
    applied, image = torn_batch(lib.MP_STORE_FAULT_HALF_BATCH)
    assert applied == 1 and image[: 4 * BLOCK] == fill(1, 8)[: 4 * BLOCK]
    assert image[4 * BLOCK :] == bytes(4 * BLOCK)
