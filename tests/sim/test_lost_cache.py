"""The cache device is thrown away in the middle of everything, again and again.

What the store has is an exact earlier state of the disk each time: the writes carry numbers, and
the model knows the order.  Another cache goes on from there; the old one, should it come back, is
refused, whatever it still holds.
"""

from collections.abc import Callable

import pytest

from millpond.cache import positions
from millpond.cache.errors import VolumeRefused
from millpond.store.errors import Code, StoreError
from sim.nodes import CacheNode
from sim.settings import Settings
from sim.world import VOLUME, World

SEEDS = range(1, 9)
LOSSES = 4


def come_back(world: World, lost: CacheNode, lost_id: bytes) -> str:
    """The lost device is found and started again; who refuses it."""
    lost.start()
    volumes = lost.engine.list_volumes()
    known = next((status for status in volumes if status.id == VOLUME), None)
    before = world.record()
    try:
        positions.check_still_ours(before, known, lost_id)
        world.call(
            world.catalogue.open(
                VOLUME,
                cache_id=lost_id,
                lineage=1,
                first_sequence=None,
                expected_epoch=before.epoch,
                accept_loss=False,
            )
        )
    except VolumeRefused:
        return "the cache itself"
    except StoreError as error:
        assert error.code in (Code.BUSY, Code.DIRTY)
        return "the store"
    finally:
        lost.die()
        lost.sim.close()
    raise AssertionError("a cache that was given up may write again")


@pytest.mark.parametrize("seed", SEEDS)
def test_cache_is_thrown_away_and_the_store_goes_on_alone(
    seed: int, record_property: Callable[[str, object], None]
) -> None:
    world = World(Settings(seed=seed, depth=1 + seed % 6, reorder=seed % 2 == 0))
    behind = []
    try:
        world.bring_up()
        for loss in range(LOSSES):
            for _ in range(world.rng.randrange(20, 200)):
                world.turn()
            lost_id, sent = world.cache_id, len(world.disk.mutations)
            lost = world.lose_cache(b"cache number %3d" % loss)
            behind.append(sent - len(world.disk.mutations))
            come_back(world, lost, lost_id)
        world.go_on()
    finally:
        world.close()
    assert any(behind), "nothing was lost: the test did not look at anything"
    record_property("figure", f"{LOSSES} losses, {behind} mutations behind, each an exact state")
