"""Deliberate faults in the code, one at a time, and the worlds in which each is found out.

    python -m sim.faults        the table: fault, where it was caught, how

A fault is a switch of a core (enum mp_engine_fault, enum mp_store_fault) or a patch of the control
plane.  It is searched for in worlds of the crash sweep, in simulated sites, or in a scenario with
the store alone; whatever catches it must pass without it.
Failure modes: NotCaught; a world that fails without the fault is an error of its own.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

from millpond.cache import opening, volumes
from millpond.cache.destage import VolumeDestage
from millpond.native import lib
from millpond.native.engine import Batch
from millpond.store import catalogue
from sim.many import run_many
from sim.plan import Kind
from sim.sweep import TO_THE_END_EVERY, Caught, Place, run_place
from sim.torture import Case, Outcome, run_case

WORLDS_MAX = 1500
SITES_MAX = 240
SITES_AT_ONCE = 2 * len(os.sched_getaffinity(0))


class NotCaught(AssertionError):
    """The harness has a hole."""


@dataclass(frozen=True, slots=True)
class SweepFault:
    """A switch that worlds of the crash sweep find out."""

    name: str
    modes: tuple[str, ...]
    shape: str = "usual"
    to_the_end: bool = False  # only worlds that go on to the end after the cut
    is_rare: bool = False  # see SiteFault

    def search(self) -> str:
        """How it was caught.  NotCaught."""
        for count, place in enumerate(self._worlds(), start=1):
            try:
                run_place(place)
            except Caught as caught:
                run_place(replace(place, engine_faults=0, store_faults=0))
                return f"sweep, world {count}: {str(caught).partition(chr(10))[0]}"
        raise NotCaught(f"{self.name} was not caught in {WORLDS_MAX} worlds")

    def _worlds(self) -> Iterator[Place]:
        """Early and late cuts mixed."""
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
            if self.name.startswith("MP_STORE"):
                yield replace(place, store_faults=bit)
            else:
                yield replace(place, engine_faults=bit)

    def _cut_after(self, count: int) -> int:
        if self.to_the_end:
            return TO_THE_END_EVERY * (1 + count * 7 % 31)
        return 1 + count * 37 % 251


@dataclass(frozen=True, slots=True)
class SiteFault:
    """A switch, or a patch, that simulated sites find out where these things happen."""

    name: str
    kinds: tuple[Kind, ...] = ()
    patched: Callable[[], AbstractContextManager[object]] = nullcontext
    is_rare: bool = False  # many sites go by before one meets it: `make faults` has the time

    def search(self) -> str:
        """How it was caught.  NotCaught."""
        bit = int(getattr(lib, self.name, 0))
        is_of_store = self.name.startswith("MP_STORE")
        engine_faults, store_faults = (0, bit) if is_of_store else (bit, 0)
        for first in range(1, SITES_MAX, SITES_AT_ONCE):
            cases = [
                Case(seed, engine_faults, store_faults, self.kinds)
                for seed in range(first, first + SITES_AT_ONCE)
            ]
            with self.patched():
                outcomes = list(run_many(run_case, cases))
            for outcome in outcomes:
                if outcome.error:
                    return self._caught(outcome)
        raise NotCaught(f"{self.name} was not caught in {SITES_MAX} sites")

    def _caught(self, outcome: Outcome) -> str:
        without = run_case(Case(outcome.seed, kinds=self.kinds))
        assert not without.error, f"it fails without the fault, too: {without.error}"
        return f"site, seed {outcome.seed}: {outcome.error}"


def _destaged_before_the_answer() -> AbstractContextManager[object]:
    original = VolumeDestage._ship

    async def ship(self: VolumeDestage, batch: Batch) -> bool:
        self._engine.destaged(self._id, batch.last_sequence)
        return await original(self, batch)

    return patch.object(VolumeDestage, "_ship", ship)


def _slots_are_always_trusted() -> AbstractContextManager[object]:
    return patch.object(opening, "slots_are_valid", lambda record, known, cache_id: True)


def _clean_on_record_before_the_engine_knows() -> AbstractContextManager[object]:
    async def clear(self: volumes.Volume) -> bool:
        self.dirty_recorded = False
        return True

    return patch.object(volumes.Volume, "_clear_at_engine", clear)


def _dirty_volumes_open_elsewhere() -> AbstractContextManager[object]:
    return patch.object(catalogue, "_check_not_held", lambda state, cache_id: None)


FAULTS: tuple[SweepFault | SiteFault, ...] = (
    SweepFault("MP_FAULT_ACK_BEFORE_WRITE", ("cache-crash",)),
    SweepFault("MP_FAULT_SKIP_DATA_CHECKSUM", ("cache-torn",)),
    SweepFault("MP_FAULT_SKIP_SYNC", ("cache-power",)),
    SweepFault("MP_FAULT_REUSE_SEGMENT_EARLY", ("cache-crash",), "wrap"),
    SweepFault("MP_FAULT_SHIP_UNSYNCED", ("cache-power", "cache-torn")),
    SweepFault("MP_FAULT_NO_INCARNATION", ("cache-torn",), "small", is_rare=True),
    SweepFault("MP_FAULT_NO_BLOCK_LOCK", ("none",)),
    SweepFault("MP_FAULT_KEEP_STALE_SLOTS", ("cache-crash",), "reread", to_the_end=True),
    SweepFault("MP_FAULT_STALE_FILL", ("none",), "wrap", is_rare=True),
    SweepFault("MP_FAULT_DROP_TOMBSTONE", ("none",)),
    SweepFault("MP_FAULT_CUT_WITHOUT_LAST", ("none",)),
    SweepFault("MP_FAULT_ACK_BEFORE_DIRTY", ("none",)),
    SiteFault("MP_FAULT_ACK_OUT_OF_ORDER"),
    SiteFault("MP_FAULT_ACK_TRIM_EARLY"),
    SiteFault("MP_FAULT_DIRTY_IS_MISS", (Kind.CACHE_FLIP, Kind.CACHE_MISDIRECT), is_rare=True),
    SweepFault("MP_STORE_FAULT_ACK_BEFORE_SYNC", ("store-power",)),
    SweepFault("MP_STORE_FAULT_SKIP_SYNC", ("store-power",)),
    SweepFault("MP_STORE_FAULT_OLD_EPOCH", ("cache-crash",)),
    SweepFault("MP_STORE_FAULT_CHECKPOINT_BEFORE_DATA", ("store-torn",)),
    SweepFault("MP_STORE_FAULT_PUNCH_EARLY", ("store-power",)),
    SiteFault(
        "MP_STORE_FAULT_FAILED_SYNC_IS_GOOD", (Kind.STORE_EIO, Kind.POWER_STORE), is_rare=True
    ),
    SiteFault(
        "destaged is told before the store has answered",
        (Kind.POWER_STORE, Kind.HOLD_STORE),
        _destaged_before_the_answer,
    ),
    SiteFault(
        "slots are trusted whoever wrote since",
        (Kind.MOVE, Kind.CUT_CACHE),
        _slots_are_always_trusted,
    ),
    SiteFault(
        "clean is on record before the engine knows",
        (Kind.KILL_CACHE, Kind.CUT_CACHE),
        _clean_on_record_before_the_engine_knows,
        is_rare=True,
    ),
    SiteFault(
        "a dirty volume opens elsewhere",
        (Kind.MOVE, Kind.HOLD_STORE),
        _dirty_volumes_open_elsewhere,
    ),
)


def main() -> int:
    """Print the table; the number of faults that got through."""
    logging.disable(logging.CRITICAL)
    table = Table(title="deliberate faults")
    for column in ("fault", "caught"):
        table.add_column(column, overflow="fold")
    missed = 0
    for fault in FAULTS:
        try:
            how = fault.search()
        except NotCaught as error:
            how, missed = f"NOT CAUGHT: {error}", missed + 1
        print(f"{fault.name}: {how}", flush=True)
        table.add_row(fault.name, how)
    Console(width=None if sys.stdout.isatty() else 160, markup=False).print(table)
    print(f"{len(FAULTS) - missed} of {len(FAULTS)} caught")
    return missed


if __name__ == "__main__":
    sys.exit(main())
