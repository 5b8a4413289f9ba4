"""Faults of the store that need a hand-made batch: refused without them, found out with them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from millpond.native import lib
from store_support import BLOCK, LINEAGE, World, Write, batch_payload, fill

BLOCKS = 16
OLD = fill(1, BLOCKS)
NEW = fill(2, BLOCKS)
SECOND, THIRD = 2, 3


@contextmanager
def store(faults: int) -> Iterator[World]:
    """A store with OLD at sequence 1."""
    world = World(test_faults=faults).format().open()
    try:
        world.create()
        assert world.write([Write(0, OLD)], first=1) == lib.MP_STATUS_OK
        yield world
    finally:
        world.close()


def send(world: World, payload: bytes) -> int:
    """A batch; the status."""
    return world.call(lib.MP_FRAME_BATCH, payload, connection=1).status


def half_a_batch(world: World) -> int:
    """The second of two parts is cut off."""
    whole = batch_payload([Write(0, NEW)], first=SECOND, parts=2)
    return send(world, whole[: whole.index(b"MPNDREC1", 8)])


def after_a_gap(world: World) -> int:
    """The batch before it was lost on the way."""
    return send(world, batch_payload([Write(0, NEW)], first=THIRD))


def with_a_flipped_bit(world: World) -> int:
    """In the payload, on the way."""
    payload = bytearray(batch_payload([Write(0, NEW)], first=SECOND))
    payload[-BLOCK] ^= 8
    return send(world, bytes(payload))


def of_an_older_epoch(world: World) -> int:
    """Its writer was fenced off meanwhile."""
    state = world.state()
    assert world.put(state.with_changes(epoch=state.epoch + 1)) == lib.MP_STATUS_OK
    return send(world, batch_payload([Write(0, NEW)], first=SECOND, epoch=state.epoch))


def of_a_lineage_that_nobody_opened(world: World) -> int:
    """Its writer's open was never put on record, or is forgotten."""
    return send(world, batch_payload([Write(0, NEW)], first=SECOND, lineage=LINEAGE + 1))


SCENARIOS = (
    ("MP_STORE_FAULT_HALF_BATCH", half_a_batch, "MP_STATUS_INVALID"),
    ("MP_STORE_FAULT_APPLY_GAP", after_a_gap, "MP_STATUS_GAP"),
    ("MP_STORE_FAULT_SKIP_CHECKSUM", with_a_flipped_bit, "MP_STATUS_CORRUPT"),
    ("MP_STORE_FAULT_OLD_EPOCH", of_an_older_epoch, "MP_STATUS_STALE_EPOCH"),
    ("MP_STORE_FAULT_OLD_LINEAGE", of_a_lineage_that_nobody_opened, "MP_STATUS_LINEAGE"),
)


@pytest.mark.parametrize(("fault", "scenario", "refusal"), SCENARIOS, ids=lambda case: str(case))
def test_store_refuses_and_with_the_fault_is_caught(
    fault: str,
    scenario: Callable[[World], int],
    refusal: str,
    record_property: Callable[[str, object], None],
) -> None:
    """Refused: nothing changes, now and after a restart.  With the fault it is not refused."""
    with store(0) as world:
        assert scenario(world) == getattr(lib, refusal)
        for _ in range(2):
            assert world.state().applied_sequence == 1
            assert world.image(BLOCKS, epoch=world.state().epoch) == OLD
            world.reopen()
    with store(getattr(lib, fault)) as world:
        assert scenario(world) == lib.MP_STATUS_OK, "the switch does nothing"
    record_property("figure", f"caught: {refusal} is not said")
