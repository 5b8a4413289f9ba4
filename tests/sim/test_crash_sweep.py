"""A history of 200 requests, cut after every Nth I/O of cache and store, for every N.

After each cut: the store alone is an exact earlier state of the disk; what comes up again has
what was promised, and nothing that never was; the guest goes on, and all of it reaches the store.
Every other place is cut once more while it comes up.  `make test` takes every eighth N;
MILLPOND_SIM_FULL=1 all of them, and more seeds.
"""

import os
from collections.abc import Callable

import pytest

from sim.sweep import CUTS, sweep

STEP = 1 if os.environ.get("MILLPOND_SIM_FULL") else 8
SEEDS = range(3 if os.environ.get("MILLPOND_SIM_FULL") else 1)


@pytest.mark.parametrize("round_", SEEDS)
@pytest.mark.parametrize("mode", CUTS)
def test_cut_after_every_io(
    mode: str, round_: int, record_property: Callable[[str, object], None]
) -> None:
    """Different modes take different seeds, so that one round sees many histories."""
    seed = 1 + round_ * len(CUTS) + CUTS.index(mode)
    places = sweep(mode, seed, step=STEP)
    assert places > 60 // STEP, f"the history has only {places} I/Os to cut after"
    record_property("figure", f"{places} cuts, none with a lost or wrong block")
