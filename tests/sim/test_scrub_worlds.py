"""Background verification all the time, beside whole histories of a guest.

It must find nothing where nothing is damaged, whatever is filled, evicted, trimmed, overwritten,
given back, rescued or cut off while it reads; and hide nothing where something is.
"""

import random
from collections.abc import Callable

import pytest

from millpond.native.drivers import Op
from sim.history import SHAPES
from sim.nodes import MIB
from sim.settings import Settings
from sim.sweep import MODES, SCRUB_BYTES_PER_S
from sim.test_bit_flips import flip_in_cache
from sim.world import World


@pytest.mark.parametrize("mode", ["none", "cache-crash", "cache-torn"])
@pytest.mark.parametrize("shape", ["reread", "wrap"])
def test_all_the_time_beside_a_guest_finds_nothing_and_hides_nothing(
    shape: str, mode: str, record_property: Callable[[str, object], None]
) -> None:
    """Slots are filled, evicted, trimmed and overwritten, segments given back, while it reads."""
    passes = read_bytes = 0
    for seed in range(1, 5):
        settings = Settings(
            seed=seed,
            shape=SHAPES[shape],
            depth=seed,
            cut=MODES[mode].cut,
            lose=MODES[mode].lose,
            tear=MODES[mode].tear,
            reorder=True,
            cut_after=17 * seed if mode != "none" else 0,
            requests_after_cut=SHAPES[shape].requests,
            scrub_bytes_per_s=SCRUB_BYTES_PER_S,
        )
        world = World(settings)
        try:
            world.run()
            counters = world.cache.engine.counters()
            assert counters["scrub_slot_errors"] + counters["scrub_log_errors"] == 0
            passes += counters["scrub_passes"]
            read_bytes += counters["scrub_read_bytes"]
        except BaseException:
            print(f"repeat: {settings}")
            raise
        finally:
            world.close()
    assert passes >= 8 and read_bytes > 20 * MIB
    record_property("figure", f"{passes} passes, {read_bytes >> 20} MiB read, nothing found")


@pytest.mark.parametrize("op", [Op.SYNC, Op.WRITE])
def test_log_that_is_rescued_while_it_is_read(op: Op) -> None:
    """What a rescue left behind is not the chain any more, and no damage."""
    rescues = 0
    for number in range(4, 44, 2):
        world = World(
            Settings(
                seed=number,
                depth=6,
                fail_op=op,
                fail_io=number,
                reorder=True,
                scrub_bytes_per_s=SCRUB_BYTES_PER_S,
            )
        )
        try:
            world.run()
            counters = world.cache.engine.counters()
            assert counters["scrub_slot_errors"] + counters["scrub_log_errors"] == 0
            rescues += counters["log_rescues"]
        finally:
            world.close()
    assert rescues > 5


def test_flipped_bits_in_slots_beside_a_guest_who_sees_nothing_of_it() -> None:
    """What verification drops, a read misses; many are found before any guest comes."""
    found = 0
    for seed in (1, 2):
        world = World(
            Settings(seed=seed, shape=SHAPES["reread"], scrub_bytes_per_s=SCRUB_BYTES_PER_S)
        )
        rng, turn = random.Random(f"flips {seed}"), world.turn

        def turn_and_flip(rng=rng, turn=turn, world=world) -> None:  # type: ignore[no-untyped-def]
            turn()
            if rng.randrange(4) == 0:
                flip_in_cache(world.cache, rng, "slots")

        world.turn = turn_and_flip  # type: ignore[method-assign]
        try:
            world.run()
            found += world.cache.engine.counters()["scrub_slot_errors"]
        finally:
            world.close()
    assert found >= 20
