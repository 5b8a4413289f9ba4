"""Cut the world after every Nth I/O, for every N: modes, and how a failing world is repeated.

Happy path: sweep() runs one mode and seed until the cut comes no more, which means that every
I/O of the history had its turn.  Failure modes: Illegal (or an assertion of ours), with the
command line that repeats that one world.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from sim.world import Settings, World

_POWER = {"lose": True}
_TORN = {"lose": True, "tear": True, "reorder": True}
_BOTH = {"cut_both": True}

# Who is cut, and what the crash takes with it.
MODES: Mapping[str, Settings] = MappingProxyType(
    {
        "cache-crash": Settings(cut="cache"),
        "cache-power": Settings(cut="cache", **_POWER),
        "cache-torn": Settings(cut="cache", **_TORN),
        "store-crash": Settings(cut="store"),
        "store-power": Settings(cut="store", **_POWER),
        "store-torn": Settings(cut="store", **_TORN),
        # First the daemon, and then, soon after it came up again, the power.
        "cache-crash-power": Settings(cut="cache", **_TORN, soft_first=True),
        "store-crash-power": Settings(cut="store", **_TORN, soft_first=True),
        "both-cache-torn": Settings(cut="cache", **_TORN, **_BOTH),
        "both-store-torn": Settings(cut="store", **_TORN, **_BOTH),
    }
)


@dataclass(frozen=True, slots=True)
class Place:
    """One world of a sweep."""

    mode: str
    seed: int
    cut_after: int

    def settings(self) -> Settings:
        """Odd places are cut once more, soon after they came up."""
        mode = MODES[self.mode]
        again = self.cut_after // 2 % 12 + 1 if self.cut_after % 2 or mode.soft_first else 0
        return replace(
            mode,
            seed=self.seed,
            depth=1 + self.seed % 6,
            cut_after=self.cut_after,
            cut_again_after=again,
        )

    @property
    def command(self) -> str:
        """Repeats it."""
        return (
            f"PYTHONSAFEPATH=1 PYTHONPATH=tests .venv/bin/python -m sim"
            f" {self.mode} {self.seed} {self.cut_after}"
        )


def run_place(place: Place) -> int:
    """One world; how often it fell.  AssertionError with the command that repeats it."""
    world = World(place.settings())
    try:
        world.run()
    except Exception as error:
        if __import__("os").environ.get("TB"): raise
        raise AssertionError(f"{type(error).__name__}: {error}\n  again: {place.command}") from error
    finally:
        world.close()
    return world.falls


def sweep(mode: str, seed: int) -> int:
    """Every N of one mode and seed; how many there were."""
    cut_after = 1
    while run_place(Place(mode, seed, cut_after)):
        cut_after += 1
    return cut_after - 1


def seeds(usual: int, full: int) -> range:
    """How many seeds: MILLPOND_SIM_FULL=1 asks for more."""
    return range(1, 1 + (full if os.environ.get("MILLPOND_SIM_FULL") else usual))
