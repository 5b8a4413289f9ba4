"""The read cache's table: a hit, a miss that is admitted, in a table that is full.

Every figure contains the cffi calls of its steps, about 0.14 us each.
"""

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from millpond.native import ffi, lib

SLOTS = 1 << 18  # 16 GiB of 64 KiB slots, 1 GiB of 4 KiB slots
ORIGIN = 1


@pytest.fixture(scope="module")
def table() -> Iterator[Any]:
    """A full table of one-block slots: block n is in it for n < SLOTS."""
    slots = lib.mp_slots_new(SLOTS, 1, 1)
    assert slots
    for block in range(SLOTS):
        slot = lib.mp_slots_reserve(slots, ORIGIN, block)
        assert slot >= 0
        lib.mp_slots_install(slots, slot, block, block + 1)
        lib.mp_slots_unpin(slots, slot)
    yield slots
    lib.mp_slots_free(slots)


@pytest.mark.benchmark(group="slots")
def test_hit(benchmark: BenchmarkFixture, table: Any, dice: random.Random) -> None:
    """Find, pin, touch, unpin: a read that the table answers; blocks at random."""
    blocks = itertools.cycle([dice.randrange(SLOTS) for _ in range(65536)])
    checksum, restored = ffi.new("uint32_t *"), ffi.new("int *")

    def hit() -> int:
        block = next(blocks)
        slot = int(lib.mp_slots_find(table, ORIGIN, block, checksum, restored))
        lib.mp_slots_pin(table, slot)
        lib.mp_slots_touch(table, ORIGIN, block)
        lib.mp_slots_unpin(table, slot)
        return slot

    assert benchmark(hit) >= 0


@pytest.mark.benchmark(group="slots")
def test_miss_with_eviction(benchmark: BenchmarkFixture, table: Any) -> None:
    """A block seen twice asks for room in a full table: find, touch, duel, install."""
    blocks = itertools.count(SLOTS)
    checksum, restored = ffi.new("uint32_t *"), ffi.new("int *")

    def miss() -> None:
        block = next(blocks)
        lib.mp_slots_find(table, ORIGIN, block, checksum, restored)
        lib.mp_slots_touch(table, ORIGIN, block)
        lib.mp_slots_touch(table, ORIGIN, block)
        slot = lib.mp_slots_reserve(table, ORIGIN, block)
        if slot >= 0:
            lib.mp_slots_install(table, slot, block, 1)
            lib.mp_slots_unpin(table, slot)

    benchmark(miss)
