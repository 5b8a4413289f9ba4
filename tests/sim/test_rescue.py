"""A write or sync of the cache's disk fails once: nothing acknowledged may be lost for it.

What a failed sync covered stays in doubt for ever in the simulated disk: a later sync that
succeeds does not save it, as on real disks.  So these worlds lose power some time after.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from millpond.native import lib
from millpond.native.drivers import Op, SimOptions
from sim.oracle import Illegal
from sim.rig import BLOCK, FLUSH, REPLY_BYTES, Rig
from sim.settings import Settings
from sim.world import World

FIRST = 4  # the failures before these meet recovery, which refuses to open
SEEDS = (1, 2)
DEVICE_BYTES = 64 << 20  # of a Rig


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


def power_cuts(op: Op, seed: int, *, engine_faults: int = 0) -> Iterator[Settings]:
    """Worlds whose power fails some time after an I/O of the log has failed."""
    for number in range(FIRST, FIRST + 30):
        for cut_after in range(2 * number + 3, 2 * number + 63, 7):
            yield Settings(
                seed=seed,
                depth=1 + number % 6,
                fail_op=op,
                fail_io=number,
                lose=True,
                tear=True,
                reorder=True,
                cut="cache",
                cut_after=cut_after,
                engine_faults=engine_faults,
            )


@pytest.mark.long
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("op", [Op.SYNC, Op.WRITE])
def test_power_loss_after_a_failed_io_keeps_every_flushed_write(op: Op, seed: int) -> None:
    rescues = falls = 0
    for settings in power_cuts(op, seed):
        try:
            lived = live(settings)
        except BaseException:
            print(f"repeat: {settings}")
            raise
        rescues += lived[0]
        falls += lived[1]
    assert rescues >= 50 and falls >= 100


def test_deliberate_fault_failed_sync_is_good_is_found_out(
    record_property: Callable[[str, object], None],
) -> None:
    """It is tried again, and succeeds, without what the first one covered."""
    for settings in power_cuts(Op.SYNC, 1, engine_faults=lib.MP_FAULT_FAILED_SYNC_IS_GOOD):
        try:
            live(settings)
        except Illegal as error:
            live(replace(settings, engine_faults=0))
            record_property("figure", f"caught: {error}")
            return
    pytest.fail("nobody notices")


def place_on_device(rig: Rig, block: bytes) -> int:
    """Where the log has this block; it is there once."""
    found = [
        offset
        for offset in range(0, DEVICE_BYTES, BLOCK)
        if rig.sim.peek(offset_bytes=offset, length_bytes=BLOCK) == block
    ]
    assert len(found) == 1
    return found[0]


def test_write_that_does_not_read_back_after_a_failed_sync_fails_its_volume() -> None:
    volume = bytes(range(16))
    rig = Rig()
    rig.start()
    rig.open(volume)
    guest = rig.connect(volume)
    rig.write(guest, 0, 1)
    rig.flush(guest)
    rig.write(guest, 1, 2)
    place = place_on_device(rig, bytes([2]) * BLOCK)
    rig.sim.set(SimOptions(fail_io=1, fail_op=Op.SYNC))
    rig.ask(guest, FLUSH)
    rig.until(lambda: rig.engine.counters()["device_errors"])
    rig.sim.poke(offset_bytes=place, data=bytes(BLOCK))  # as a disk that dropped what it covered
    assert rig.answers(guest, REPLY_BYTES)[4:8] == (5).to_bytes(4, "big")
    (failure,) = rig.failures
    assert "did not survive a failed sync of the cache device" in str(failure)
    assert rig.status(volume).error == -5 and not rig.engine.counters()["failed"]
    # What a FLUSH had promised is there after a restart.
    rig.fall()
    rig.start()
    rig.open(volume)
    assert rig.read(rig.connect(volume), 0) == 1
    rig.close()
