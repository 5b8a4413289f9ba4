"""Shares of read slots: a minimum that others cannot take, a maximum that is not passed."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.native import ffi, lib

ANY = 2**32 - 1


def new(slot_count: int) -> Any:
    """A table of one block per slot."""
    return ffi.gc(lib.mp_slots_new(slot_count, 1, 1), lib.mp_slots_free)


def fill(table: Any, origin: int, block: int) -> bool:
    """One miss, as the engine makes it.  True: it was admitted."""
    lib.mp_slots_touch(table, origin, block)
    slot = lib.mp_slots_reserve(table, origin, block)
    if slot < 0:
        return False
    lib.mp_slots_install(table, slot, block, 7)
    lib.mp_slots_unpin(table, slot)
    return True


def valid(table: Any, origin: int, blocks: int) -> int:
    """How many of the first blocks an origin still has."""
    checksum, restored = ffi.new("uint32_t *"), ffi.new("int *")
    return sum(
        lib.mp_slots_find(table, origin, block, checksum, restored) >= 0 for block in range(blocks)
    )


def storm(table: Any, origin: int, accesses: int) -> None:
    """A guest that reads much, and some of it hot."""
    for number in range(accesses):
        fill(table, origin, number)
        fill(table, origin, number % 50)


def test_a_minimum_survives_a_storm_of_others() -> None:
    table = new(1000)
    lib.mp_slots_share(table, 1, 200, ANY)
    for block in range(200):
        fill(table, 1, block)
    storm(table, 2, 20_000)
    assert valid(table, 1, 200) == lib.mp_slots_held(table, 1) == 200
    assert lib.mp_slots_held(table, 2) == 800


def test_without_a_minimum_the_same_storm_takes_them() -> None:
    table = new(1000)
    for block in range(200):
        fill(table, 1, block)
    storm(table, 2, 20_000)
    assert valid(table, 1, 200) < 100


def test_beyond_its_minimum_an_origin_competes_like_all_others() -> None:
    table = new(1000)
    lib.mp_slots_share(table, 1, 100, ANY)
    for block in range(500):
        fill(table, 1, block)
    storm(table, 2, 20_000)
    assert 100 <= lib.mp_slots_held(table, 1) < 300


def test_below_its_minimum_an_origin_gets_slots_from_hotter_ones() -> None:
    table = new(1000)
    for _ in range(4):
        for block in range(1000):
            fill(table, 2, block)
    lib.mp_slots_share(table, 1, 150, ANY)
    for block in range(3000):
        fill(table, 1, block)
    assert lib.mp_slots_held(table, 1) >= 150


def test_at_its_maximum_an_origin_replaces_its_own() -> None:
    table = new(1000)
    for block in range(300):
        fill(table, 2, block)
    lib.mp_slots_share(table, 1, 0, 100)
    admitted = sum(fill(table, 1, block) for block in range(5000))
    assert lib.mp_slots_held(table, 1) == 100
    assert valid(table, 2, 300) == lib.mp_slots_held(table, 2) == 300
    assert admitted > 500, "newer blocks still get in"


def test_a_smaller_maximum_is_reached_from_a_larger_one() -> None:
    table = new(1000)
    for block in range(400):
        fill(table, 1, block)
    lib.mp_slots_share(table, 1, 0, 100)
    for block in range(400, 5000):
        fill(table, 1, block)
        assert lib.mp_slots_held(table, 1) <= 400
    lib.mp_slots_invalidate(table, 1, 0, 400)
    for block in range(5000, 6000):
        fill(table, 1, block)
    assert lib.mp_slots_held(table, 1) <= 400


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.integers(1, 400), st.integers(0, 60), st.sampled_from("ffffis")), max_size=400
    ),
    size=st.integers(4, 64),
)
def test_counts_are_those_of_the_table(steps: list[tuple[int, int, str]], size: int) -> None:
    """Many origins that come and go: what is counted is what is there."""
    table = new(size)
    origins = set()
    for origin, block, what in steps:
        origins.add(origin)
        if what == "i":
            lib.mp_slots_invalidate(table, origin, block, 8)
        elif what == "s":
            lib.mp_slots_share(table, origin, block % 3, ANY)
        else:
            fill(table, origin, block)
    for origin in origins:
        assert lib.mp_slots_held(table, origin) == valid(table, origin, 70)
