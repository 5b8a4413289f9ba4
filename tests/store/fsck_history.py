"""Random lives of a store, from one seed: writes, trims, resizes, deletions, crashes."""

import random
from collections.abc import Callable

from millpond.native import lib
from millpond.native.drivers import SimOptions
from store_support import BLOCK, World, WorldEnded, Write, fill

BLOCKS = 3000  # six leaves, two levels
SMALL_BLOCKS = 1000
TRIMS = (1, 3, 100, 512, 1024, BLOCKS)


class Life:
    """A store and what happens to it. `between` is called whenever it is shut."""

    def __init__(self, seed: int, *, crashes: bool, between: Callable[[World], None]) -> None:
        self.chance = random.Random(seed)
        self.crashes = crashes
        self.between = between
        self.world = World(page_cache_bytes=64 * BLOCK)
        self.world.format(segment_bytes=128 * 1024).open()
        self.world.sim.set(self._weather())
        self.made = 0
        self.alive: list[bytes] = []

    def run(self, steps: int) -> None:
        """So many things happen; then it is shut."""
        for _ in range(steps):
            try:
                self._step(self.chance.random())
            except WorldEnded:
                self._reopen()
        self.world.shut()
        self.between(self.world)

    def _weather(self) -> SimOptions:
        seed = self.chance.randrange(1 << 30)
        if not self.crashes or self.chance.random() < 0.3:
            return SimOptions(seed=seed, latency_ns=3000, reorder=True)
        return SimOptions(
            seed=seed,
            latency_ns=3000,
            reorder=True,
            lose_unsynced=self.chance.random() < 0.7,
            tear=self.chance.random() < 0.7,
            crash_after_io=self.chance.randrange(5, 60),
        )

    def _step(self, dice: float) -> None:
        if not self.alive or dice < 0.05:
            self.made += 1
            volume = self.made.to_bytes(16, "little")
            self.world.create(volume, blocks=BLOCKS)
            self.alive.append(volume)
        elif dice < 0.65:
            self._write(self.chance.choice(self.alive))
        elif dice < 0.7 and len(self.alive) > 1:
            volume = self.chance.choice(self.alive)
            assert self.world.delete(volume) == lib.MP_STATUS_OK
            self.alive.remove(volume)
        elif dice < 0.8:
            assert self.world.checkpoint() == lib.MP_STATUS_OK
        elif dice < 0.85:
            self.world.settle(40)
        elif dice < 0.92:
            if self.chance.random() < 0.5:
                self.world.store.stop()
            self._reopen()
        else:
            volume = self.chance.choice(self.alive)
            for blocks in (SMALL_BLOCKS, BLOCKS):
                self._resize(volume, blocks)

    def _write(self, volume: bytes) -> None:
        state = self.world.state(volume)
        writes = []
        for _ in range(self.chance.randrange(1, 6)):
            first = self.chance.randrange(BLOCKS)
            if self.chance.random() < 0.25:
                blocks = min(self.chance.choice(TRIMS), BLOCKS - first)
                writes.append(Write(first, block_count=blocks))
                continue
            blocks = min(self.chance.randrange(1, 12), BLOCKS - first)
            packed = self.chance.random() < 0.5
            data = fill(self.chance.randrange(1 << 20), blocks, compressible=packed)
            writes.append(Write(first, data))
        first = state.applied_sequence + 1
        status = self.world.write(writes, first=first, volume=volume, epoch=state.epoch)
        assert status == lib.MP_STATUS_OK

    def _resize(self, volume: bytes, blocks: int) -> None:
        """Shrinking takes an epoch, as the catalogue has it."""
        state = self.world.state(volume)
        shrinks = blocks * BLOCK < state.size_bytes
        resized = state.with_changes(size_bytes=blocks * BLOCK, epoch=state.epoch + shrinks)
        assert self.world.put(resized) == lib.MP_STATUS_OK

    def _reopen(self) -> None:
        self.world.shut()
        self.between(self.world)
        self.world.sim.set(SimOptions(latency_ns=3000))
        self.world.open()
        states = self.world.store.volumes()
        self.alive = [state.id for state in states]
        for state in states:
            if state.size_bytes < BLOCKS * BLOCK:
                self._resize(state.id, BLOCKS)
        self.world.sim.set(self._weather())
