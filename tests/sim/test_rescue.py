"""A write or sync of the cache's disk fails once: nothing acknowledged may be lost for it.

What a failed sync covered stays in doubt for ever in the simulated disk: a later sync that
succeeds does not save it, as on real disks.  So these worlds lose power some time after.
"""

import pytest

from millpond.native.drivers import Op
from sim.settings import Settings
from sim.world import World

FIRST = 4  # the failures before these meet recovery, which refuses to open
SEEDS = (1, 2)


def live(settings: Settings) -> tuple[int, int]:
    """(rescues, falls) of one world.  Illegal."""
    world = World(settings)
    rescues = 0
    try:
        original = world.cache.die

        def die() -> None:
            nonlocal rescues
            if world.cache.is_up:
                rescues += world.cache.engine.counters()["log_rescues"]
            original()

        world.cache.die = die  # type: ignore[method-assign]
        world.run()
        die()
        return rescues, world.falls
    finally:
        world.close()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("op", [Op.SYNC, Op.WRITE])
def test_failed_io_of_the_log_is_rescued_and_the_disk_goes_on(op: Op, seed: int) -> None:
    rescues = 0
    for number in range(FIRST, FIRST + 40):
        settings = Settings(seed=seed, depth=1 + seed % 6, fail_op=op, fail_io=number)
        try:
            rescues += live(settings)[0]
        except BaseException:
            print(f"repeat: {settings}")
            raise
    assert rescues >= 10


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("op", [Op.SYNC, Op.WRITE])
def test_power_loss_after_a_failed_io_keeps_every_flushed_write(op: Op, seed: int) -> None:
    rescues = falls = 0
    for number in range(FIRST, FIRST + 30):
        for cut_after in range(2 * number + 3, 2 * number + 63, 7):
            settings = Settings(
                seed=seed,
                depth=1 + number % 6,
                fail_op=op,
                fail_io=number,
                lose=True,
                tear=True,
                reorder=True,
                cut="cache",
                cut_after=cut_after,
            )
            try:
                lived = live(settings)
            except BaseException:
                print(f"repeat: {settings}")
                raise
            rescues += lived[0]
            falls += lived[1]
    assert rescues >= 50 and falls >= 100
