"""What goes wrong in a world of the torture, and when: all of it from the seed.

A plan is a list of events, each at a number of requests answered by then.  Which kinds a world
knows is chosen first, so that some worlds have only crashes and others everything.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from sim.history import SHAPES


class Kind(StrEnum):
    """What may happen."""

    KILL_CACHE = "the cache's process ends between two I/Os"
    POWER_CACHE = "the hypervisor loses its power"
    KILL_STORE = "the store's process ends between two I/Os"
    POWER_STORE = "the store's box loses its power"
    POWER_BOTH = "both lose their power at once"
    STOP_CACHE = "the cache is restarted as planned"
    STOP_STORE = "the store is restarted as planned"
    CUT_CACHE = "some of the cache's connections break"
    CUT_STORE = "some of the store's connections break"
    HOLD_STORE = "the store answers nothing for a while"
    HOLD_CACHE = "the cache answers nothing for a while"
    SEND_AGAIN = "a batch of before arrives once more"
    STORE_FULL = "the store's disk is full for a while"
    CACHE_EIO = "I/Os of the cache's device fail"
    STORE_EIO = "I/Os of the store's disk fail"
    CACHE_FLIP = "bits flip on the cache's device"
    STORE_FLIP = "bits flip on the store's disk"
    CACHE_MISDIRECT = "a write of the cache lands in the wrong place"
    STORE_MISDIRECT = "a write of the store lands in the wrong place"
    CACHE_GONE = "the cache's device vanishes, a new one takes its place"
    CACHE_OLD = "the cache's device is restored from an old copy"
    MOVE = "the guest moves to the other hypervisor"
    KILL_GUEST = "the guest dies and starts again at once"
    RESTART_CACHE = "the cache is restarted as planned, its guests stay connected"


# After these a request may fail, or be refused; data may be gone where an operator accepts it.
DAMAGES_CACHE = {Kind.CACHE_EIO, Kind.CACHE_FLIP, Kind.CACHE_MISDIRECT, Kind.CACHE_GONE}
DAMAGES_CACHE |= {Kind.CACHE_OLD}
DAMAGES_STORE = {Kind.STORE_FLIP, Kind.STORE_MISDIRECT}
HARMLESS = [kind for kind in Kind if kind not in DAMAGES_CACHE | DAMAGES_STORE]
for drawn_apart in (Kind.KILL_GUEST, Kind.RESTART_CACHE):  # seeds of before stay what they were
    HARMLESS.remove(drawn_apart)


@dataclass(frozen=True, slots=True)
class Happening:
    """One event of a plan."""

    at: int  # requests answered
    kind: Kind
    dice: int  # for whatever else it chooses


@dataclass(frozen=True, slots=True)
class Plan:
    """A world of the torture."""

    seed: int
    happenings: tuple[Happening, ...]
    shapes: tuple[str, ...]  # one guest each
    depth: int
    latency_ns: int
    checkpoint_bytes: int

    @property
    def kinds(self) -> set[Kind]:
        """What happens in it."""
        return {happening.kind for happening in self.happenings}

    @property
    def may_fail(self) -> bool:
        """A request may get an error, and a volume may be refused."""
        return may_fail(self.happenings)

    @property
    def damages_cache(self) -> bool:
        """Something of a cache's device was not what was written."""
        return bool(self.kinds & DAMAGES_CACHE)

    @property
    def damages_store(self) -> bool:
        """The same of the store's disk."""
        return bool(self.kinds & DAMAGES_STORE)


def may_fail(happenings: Iterable[Happening]) -> bool:
    """A request may get an error then."""
    kinds = {happening.kind for happening in happenings}
    return bool(kinds & (DAMAGES_CACHE | DAMAGES_STORE | {Kind.STORE_EIO}))


def make_plan(seed: int, kinds: Sequence[Kind] = ()) -> Plan:
    """The plan of a seed; kinds: only these happen, often."""
    rng = random.Random(f"plan {seed}")
    known = [kind for kind in HARMLESS if rng.randrange(3) == 0] or [rng.choice(HARMLESS)]
    if rng.randrange(3) == 0:  # otherwise nothing may fail at all
        known += [kind for kind in sorted(DAMAGES_CACHE) if rng.randrange(4) == 0]
    if rng.randrange(6) == 0:
        known += [kind for kind in sorted(DAMAGES_STORE) if rng.randrange(2)]
    if random.Random(f"guest {seed}").randrange(4) == 0:
        known.append(Kind.KILL_GUEST)
    if random.Random(f"restart {seed}").randrange(4) == 0:
        known.append(Kind.RESTART_CACHE)
    shapes = tuple(rng.choice(sorted(SHAPES)) for _ in range(1 + (rng.randrange(3) == 0)))
    requests = sum(SHAPES[shape].requests for shape in shapes)
    count = rng.randrange(4, 9) if kinds else rng.randrange(1, 7)
    moments = sorted(rng.randrange(requests) for _ in range(count))
    happenings = tuple(
        Happening(at, rng.choice(kinds or known), rng.randrange(1 << 30)) for at in moments
    )
    return Plan(
        seed=seed,
        happenings=happenings,
        shapes=shapes,
        # With one request at a time it is exact what an error may have left behind.
        depth=1 if may_fail(happenings) else rng.choice((1, 2, 4, 8, 16)),
        latency_ns=rng.choice((5_000, 20_000, 100_000, 1_000_000)),
        checkpoint_bytes=rng.choice((1, 2, 16, 64)) << 20,
    )
