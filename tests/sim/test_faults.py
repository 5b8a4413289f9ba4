"""Deliberate faults in the code, one at a time: each must be caught, by the oracle or a refusal.

A fault is searched for in the worlds of the crash sweep; the world that catches it must pass
without it.  What no history meets often enough has a scenario of its own (test_fault_scenarios).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest

from millpond.native import lib
from sim.sweep import TO_THE_END_EVERY, Caught, Place, run_place

WORLDS_MAX = 1500


@dataclass(frozen=True, slots=True)
class Fault:
    """A switch, and where it hurts."""

    name: str
    modes: tuple[str, ...]
    shape: str = "usual"
    to_the_end: bool = False  # only worlds that go on to the end after the cut

    @property
    def is_of_store(self) -> bool:
        """Which core has the switch."""
        return self.name.startswith("MP_STORE")

    def worlds(self) -> Iterator[Place]:
        """Worlds with the fault, early and late cuts mixed."""
        bit = int(getattr(lib, self.name))
        for count in range(WORLDS_MAX):
            place = Place(
                self.modes[count % len(self.modes)],
                seed=1 + count % 7,
                cut_after=self._cut_after(count),
                shape=self.shape,
            )
            if place.mode == "none":
                place = replace(place, seed=1 + count, cut_after=0)
            if self.is_of_store:
                yield replace(place, store_faults=bit)
            else:
                yield replace(place, engine_faults=bit)

    def _cut_after(self, count: int) -> int:
        if self.to_the_end:
            return TO_THE_END_EVERY * (1 + count * 7 % 31)
        return 1 + count * 37 % 251


FAULTS = (
    Fault("MP_FAULT_ACK_BEFORE_WRITE", ("cache-crash",)),
    Fault("MP_FAULT_SKIP_DATA_CHECKSUM", ("cache-torn",)),
    Fault("MP_FAULT_SKIP_SYNC", ("cache-power",)),
    Fault("MP_FAULT_REUSE_SEGMENT_EARLY", ("cache-crash",), "wrap"),
    Fault("MP_FAULT_SHIP_UNSYNCED", ("cache-power", "cache-torn")),
    Fault("MP_FAULT_NO_INCARNATION", ("cache-torn",), "small"),
    Fault("MP_FAULT_NO_BLOCK_LOCK", ("none",)),
    Fault("MP_FAULT_KEEP_STALE_SLOTS", ("cache-crash",), "reread", to_the_end=True),
    Fault("MP_FAULT_STALE_FILL", ("none",), "wrap"),
    Fault("MP_FAULT_DROP_TOMBSTONE", ("none",)),
    Fault("MP_FAULT_CUT_WITHOUT_LAST", ("none",)),
    Fault("MP_FAULT_ACK_BEFORE_DIRTY", ("none",)),
    Fault("MP_STORE_FAULT_ACK_BEFORE_SYNC", ("store-power",)),
    Fault("MP_STORE_FAULT_SKIP_SYNC", ("store-power",)),
    Fault("MP_STORE_FAULT_OLD_EPOCH", ("cache-crash",)),
    Fault("MP_STORE_FAULT_CHECKPOINT_BEFORE_DATA", ("store-torn",)),
    Fault("MP_STORE_FAULT_PUNCH_EARLY", ("store-power",)),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_deliberate_fault_is_caught(
    fault: Fault, record_property: Callable[[str, object], None]
) -> None:
    """And the same world passes without it."""
    for count, place in enumerate(fault.worlds(), start=1):
        try:
            run_place(place)
        except Caught as caught:
            run_place(replace(place, engine_faults=0, store_faults=0))
            how = str(caught).partition("\n")[0]
            record_property("figure", f"caught in world {count}: {how}")
            print(f"{fault.name}: world {count}: {how}")
            return
    pytest.fail(f"{fault.name} was not caught in {WORLDS_MAX} worlds")
