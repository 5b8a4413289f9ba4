"""A history of a whole site, cut after every Nth send, for every N, at the cache and the store.

A send is a piece of a stream between any two processes: handshakes, control calls, requests of the
guest, misses, batches, and their answers.  Odd cuts take the machine's power, even ones only the
process.  `make test` takes every 43rd; MILLPOND_SIM_FULL=1 all.
"""

import logging
import os
from collections.abc import Callable, Iterator

import pytest

from sim.many import run_many
from sim.torture import Case, run_case

STEP = 1 if os.environ.get("MILLPOND_SIM_FULL") else 43
AT_ONCE = 32
SEEDS = {"cache": 5, "store": 9}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What daemons say while everything breaks is no news."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.long
@pytest.mark.parametrize("cut", SEEDS)
def test_cut_after_every_send(cut: str, record_property: Callable[[str, object], None]) -> None:
    """Until a world has no fall: all of its sends had their turn."""
    places = 0
    for first in range(1, 1 << 20, AT_ONCE * STEP):
        cases = [
            Case(SEEDS[cut], cut=cut, cut_after=number)
            for number in range(first, first + AT_ONCE * STEP, STEP)
        ]
        for case, outcome in zip(cases, run_many(run_case, cases), strict=True):
            assert not outcome.error, f"{outcome.error}\n  again: {case.command}"
            places += outcome.falls > 0
        if outcome.falls == 0:
            break
    assert places > 400 // STEP
    record_property("figure", f"{places} cuts, none with a lost or wrong block")
