"""What goes wrong around a store and a cache: drawn from a seed, done, and over before the next.

    trouble = Trouble(pair, proxy, disk, random.Random(seed), long=False)
    trouble.make()        # one of it; it prints what, before it does it
    trouble.end()         # whatever it has left behind: everything runs, nothing fails

The order and every number are the seed's; what they meet is the machine's.
"""

import errno
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator

from millpond.native.drivers import Op
from torture.cachefile import superblock
from torture.commands import wait_until
from torture.daemons import FOR_EVER, Daemon, Pair
from torture.proxy import Proxy
from torture.smalldisk import SmallDisk

PATIENCE_S = 120.0  # against hanging for ever
# cache/limits.py: calls give up after 30 s, batches after 60 s; handshakes after 10 s.
LONG_S = (11.0, 35.0, 65.0)
SHORT_S = (0.05, 2.0)


class Trouble:
    """One thread calls it."""

    def __init__(
        self, pair: Pair, proxy: Proxy, disk: SmallDisk, chance: random.Random, *, long: bool
    ) -> None:
        """long: pauses beyond every time-out, too."""
        self.counts: Counter[str] = Counter()
        self._pair, self._proxy, self._disk = pair, proxy, disk
        self._schedule = self.schedule(chance, long=long)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items()))
        return f"{self.counts.total()} troubles: {counts}"

    @classmethod
    def kinds(cls) -> "dict[str, Callable[[Trouble, random.Random, float], None]]":
        """By name."""
        return {
            "store killed": cls._store_killed,
            "cache killed": cls._cache_killed,
            "store killed in a row": cls._store_killed_in_a_row,
            "store restarted": cls._store_restarted,
            "cache restarted": cls._cache_restarted,
            "store frozen": cls._store_frozen,
            "cache frozen": cls._cache_frozen,
            "connections cut": cls._connections_cut,
            "network held": cls._network_held,
            "disk full": cls._disk_full,
            "no room for a segment": cls._no_room_for_a_segment,
            "store's disk failing": cls._store_disk_failing,
            "log failing": cls._log_failing,
            "slots failing": cls._slots_failing,
        }

    @classmethod
    def schedule(cls, chance: random.Random, *, long: bool) -> "Iterator[tuple[str, int]]":
        """For ever: which, and the seed of its numbers.  Each kind once before any comes again."""
        while True:
            names = list(cls.kinds())
            chance.shuffle(names)
            for name in names:
                yield name, chance.getrandbits(32) << 1 | (long and chance.randrange(8) == 0)

    def make(self) -> None:
        """The next one, from its beginning to its end."""
        name, number = next(self._schedule)
        numbers = random.Random(number)
        duration_s = numbers.choice(LONG_S) if number & 1 else numbers.uniform(*SHORT_S)
        print(f"{name}, {duration_s:.2f} s", flush=True)
        for daemon in (self._pair.store, self._pair.cache):
            assert daemon.alive(), f"it has ended by itself:\n{daemon.log()}"
        self.kinds()[name](self, numbers, duration_s)
        self.counts[name] += 1
        time.sleep(numbers.uniform(*SHORT_S))

    def end(self) -> None:
        """Peace; after a failure half way, too."""
        self._proxy.let()
        self._disk.give()
        for daemon in (self._pair.store, self._pair.cache):
            if not daemon.alive():
                continue
            daemon.resume()
            daemon.heal()

    # -- processes

    def _store_killed(self, numbers: random.Random, duration_s: float) -> None:
        self._again(self._pair.store, duration_s)

    def _cache_killed(self, numbers: random.Random, duration_s: float) -> None:
        self._again(self._pair.cache, duration_s)

    def _again(self, daemon: Daemon, away_s: float) -> None:
        daemon.kill()
        time.sleep(away_s)
        daemon.start()

    def _store_killed_in_a_row(self, numbers: random.Random, duration_s: float) -> None:
        """While it starts, recovers, or has just begun to serve."""
        store = self._pair.store
        store.kill()
        for _ in range(numbers.randrange(2, 5)):
            store.spawn()
            time.sleep(numbers.uniform(0.05, 1.2))
            store.kill()
        store.start()

    def _store_restarted(self, numbers: random.Random, duration_s: float) -> None:
        self._pair.store.stop()
        self._pair.store.start()

    def _cache_restarted(self, numbers: random.Random, duration_s: float) -> None:
        self._pair.cache.stop()
        self._pair.cache.start()

    def _store_frozen(self, numbers: random.Random, duration_s: float) -> None:
        self._frozen(self._pair.store, duration_s)

    def _cache_frozen(self, numbers: random.Random, duration_s: float) -> None:
        self._frozen(self._pair.cache, duration_s)

    def _frozen(self, daemon: Daemon, duration_s: float) -> None:
        daemon.pause()
        time.sleep(duration_s)
        daemon.resume()

    # -- between them

    def _connections_cut(self, numbers: random.Random, duration_s: float) -> None:
        for _ in range(numbers.randrange(1, 6)):
            self._proxy.cut()
            time.sleep(duration_s / 5)

    def _network_held(self, numbers: random.Random, duration_s: float) -> None:
        self._proxy.hold()
        time.sleep(duration_s)
        if numbers.randrange(2):
            self._proxy.cut()  # what waited is lost
        self._proxy.let()

    # -- disks

    def _disk_full(self, numbers: random.Random, duration_s: float) -> None:
        self._disk.take()
        time.sleep(duration_s)
        if numbers.randrange(2):
            self._pair.store.kill()
            self._pair.store.start()
        self._disk.give()

    def _no_room_for_a_segment(self, numbers: random.Random, duration_s: float) -> None:
        self._pair.store.fail(Op.ALLOCATE, count=FOR_EVER, error=errno.ENOSPC)
        time.sleep(duration_s)
        self._pair.store.heal()

    def _store_disk_failing(self, numbers: random.Random, duration_s: float) -> None:
        """The store must end by itself, with a code; an operator starts it again."""
        store = self._pair.store
        store.fail(numbers.choice((Op.WRITE, Op.SYNC)), skip=numbers.randrange(8))
        assert store.wait_end() == 1, store.log()
        assert "nothing is acknowledged any more" in store.complaint()
        time.sleep(duration_s)
        store.start()

    def _log_failing(self, numbers: random.Random, duration_s: float) -> None:
        """Once: it is rescued.  Only where there is room to rescue it to."""
        engine = self._pair.status()["engine"]
        if engine["segments_free"] < engine["segments_total"] // 4:
            return
        found = superblock(self._pair.device)
        area = (found.log_offset_bytes, found.slots_offset_bytes)
        op = numbers.choice((Op.WRITE, Op.SYNC))
        self._pair.cache.fail(op, area=area, skip=numbers.randrange(16))
        wait_until("it has failed", lambda: self._pair.cache.failed() > 0, timeout_s=PATIENCE_S)
        time.sleep(duration_s)
        self._pair.cache.heal()

    def _slots_failing(self, numbers: random.Random, duration_s: float) -> None:
        found = superblock(self._pair.device)
        area = (found.slots_offset_bytes, found.device_bytes)
        op = numbers.choice((Op.READ, Op.WRITE))
        self._pair.cache.fail(op, area=area, skip=numbers.randrange(16), count=50)
        time.sleep(duration_s)
        self._pair.cache.heal()
