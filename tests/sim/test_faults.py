"""Deliberate faults in the code, one at a time: each must be caught, by the oracle or a refusal.

The table, and how each is searched for, is in faults.py; what needs a hand-made batch has a
scenario of its own (test_fault_scenarios.py).  Rare ones are searched for in `make faults`, and
with MILLPOND_SIM_FULL=1.
"""

import logging
import os
from collections.abc import Callable, Iterator

import pytest

from sim.faults import FAULTS, SiteFault, SweepFault

FULL = bool(os.environ.get("MILLPOND_SIM_FULL"))
SEARCHED = [fault for fault in FAULTS if FULL or not fault.is_rare]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What daemons say while everything breaks is no news."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("fault", SEARCHED, ids=lambda fault: fault.name.replace(" ", "_"))
def test_deliberate_fault_is_caught(
    fault: SweepFault | SiteFault, record_property: Callable[[str, object], None]
) -> None:
    """And the same world passes without it."""
    how = fault.search()
    record_property("figure", f"caught: {how}")
    print(f"{fault.name}: {how}")
