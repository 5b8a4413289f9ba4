"""Cut the world after every Nth I/O, for every N: modes, and how a failing world is repeated.

Happy path: sweep() runs one mode and seed until the cut comes no more, which means that every
I/O of the history had its turn.  Failure modes: Illegal (or an assertion of ours), with the
command line that repeats that one world.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from sim.history import SHAPES
from sim.many import run_many
from sim.nodes import MIB
from sim.settings import Settings
from sim.world import World

_CACHE, _STORE = Settings(cut="cache"), Settings(cut="store")


def _power(settings: Settings) -> Settings:
    return replace(settings, lose=True)


def _torn(settings: Settings) -> Settings:
    return replace(settings, lose=True, tear=True, reorder=True)


def _crash_power(settings: Settings) -> Settings:
    """First the daemon, and then, soon after it came up again, the power."""
    return replace(_torn(settings), soft_first=True)


# Who is cut, and what the crash takes with it.
MODES: Mapping[str, Settings] = MappingProxyType(
    {
        "none": Settings(),
        "cache-crash": _CACHE,
        "cache-power": _power(_CACHE),
        "cache-torn": _torn(_CACHE),
        "cache-crash-power": _crash_power(_CACHE),
        "store-crash": _STORE,
        "store-power": _power(_STORE),
        "store-torn": _torn(_STORE),
        "store-crash-power": _crash_power(_STORE),
        "both-cache-torn": replace(_torn(_CACHE), cut_both=True),
        "both-store-torn": replace(_torn(_STORE), cut_both=True),
    }
)
CUTS = tuple(mode for mode in MODES if mode != "none")
# In every other pair of seeds the cache's device is verified all the time: a pass every 8 ms.
SCRUB_BYTES_PER_S = 32 * 1024 * MIB
AGAIN_MAX = 24  # a second cut comes up to so many I/Os after the first
AT_ONCE = 32  # places that are run before it is seen whether the history has ended
TO_THE_END_EVERY = 8  # of so many places one goes on to the end of its history


@dataclass(frozen=True, slots=True)
class Place:
    """One world of a sweep."""

    mode: str
    seed: int
    cut_after: int = 0
    shape: str = "usual"
    engine_faults: int = 0
    store_faults: int = 0

    def settings(self) -> Settings:
        """Odd places are cut once more, soon after they came up."""
        mode = MODES[self.mode]
        again = self.cut_after // 2 % AGAIN_MAX + 1 if self.cut_after % 2 or mode.soft_first else 0
        whole = self.cut_after % TO_THE_END_EVERY == 0
        return replace(
            mode,
            seed=self.seed,
            shape=SHAPES[self.shape],
            depth=SHAPES[self.shape].depth or 1 + self.seed % 6,
            checkpoint_bytes=(2 + self.seed % 2 * 62) * MIB,
            scrub_bytes_per_s=self.seed // 2 % 2 * SCRUB_BYTES_PER_S,
            cut_after=self.cut_after,
            cut_again_after=again,
            requests_after_cut=SHAPES[self.shape].requests if whole else 10,
            engine_faults=self.engine_faults,
            store_faults=self.store_faults,
        )

    @property
    def command(self) -> str:
        """Repeats it."""
        faults = f" {self.engine_faults} {self.store_faults}"
        return (
            f"PYTHONSAFEPATH=1 PYTHONPATH=tests .venv/bin/python -m sim"
            f" {self.mode} {self.seed} {self.cut_after} {self.shape}{faults}"
        )


class Caught(AssertionError):
    """A world that is not as it should be; the message has the command that repeats it."""


def run_place(place: Place) -> int:
    """One world; how often it fell.  Caught."""
    world = World(place.settings())
    try:
        world.run()
        _check_scrub(world)
    except Exception as error:
        raise Caught(f"{type(error).__name__}: {error}\n  again: {place.command}") from error
    finally:
        world.close()
    return world.falls


def _check_scrub(world: World) -> None:
    """Nothing was damaged.  AssertionError."""
    counters = world.cache.engine.counters()
    found = counters["scrub_slot_errors"] + counters["scrub_log_errors"]
    assert not found, f"verification found {found} damaged blocks where there are none"


def sweep(mode: str, seed: int, *, step: int = 1) -> int:
    """Every N (or every step'th) of one mode and seed; how many places were cut.  Caught."""
    cuts = 0
    for first in range(1 + seed % step, 1 << 30, AT_ONCE * step):
        numbers = range(first, first + AT_ONCE * step, step)
        falls = list(run_many(run_place, [Place(mode, seed, number) for number in numbers]))
        if 0 in falls:
            return cuts + falls.index(0)
        cuts += len(falls)
    raise AssertionError("a history that never ends")
