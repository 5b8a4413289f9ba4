"""The counting sketch against exact counts, its fading, and the admission duel."""

import random
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.native import ffi, lib


def new(capacity: int, seed: int = 1) -> Any:
    """A sketch that frees itself."""
    sketch = lib.mp_sketch_new(capacity, seed)
    assert sketch != ffi.NULL
    return ffi.gc(sketch, lib.mp_sketch_free)


@settings(deadline=None)
@given(
    keys=st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 20), max_size=300),
    seed=st.integers(0, 2**64 - 1),
)
def test_never_below_the_true_count_before_fading(keys: list[int], seed: int) -> None:
    """Collisions only overestimate; 3 is the top."""
    sketch = new(capacity=32, seed=seed)  # fades after 320 accesses
    for key in keys:
        lib.mp_sketch_count(sketch, key)
    for key, count in Counter(keys).items():
        assert min(count, 3) <= lib.mp_sketch_estimate(sketch, key) <= 3


def test_overestimates_are_rare_at_the_load_it_is_made_for() -> None:
    """A thousand keys in a sketch for a thousand: one in twenty is too high, by collision."""
    sketch = new(1000)
    keys = [random.Random(1).getrandbits(64) ^ n for n in range(1000)]
    for key in keys:
        for _ in range(key % 4):
            lib.mp_sketch_count(sketch, key)
    wrong = sum(lib.mp_sketch_estimate(sketch, key) != key % 4 for key in keys)
    assert wrong <= 50


def test_everything_halves_every_ten_capacities() -> None:
    """3, 1, 0, while one other key is used all the time."""
    capacity = 1000
    sketch = new(capacity)
    for _ in range(20):
        lib.mp_sketch_count(sketch, 42)
    seen = []
    for _ in range(4):
        seen.append(lib.mp_sketch_estimate(sketch, 42))
        for _ in range(10 * capacity):
            lib.mp_sketch_count(sketch, 7)
    assert seen == [3, 1, 0, 0]
    assert lib.mp_sketch_ages(sketch) == 4
    assert lib.mp_sketch_estimate(sketch, 7) >= 1


def test_halving_is_spread_over_the_next_accesses() -> None:
    """No access pays for the whole table: at most 8 lines (64 bytes each) change with one."""
    capacity = 20_000
    sketch = new(capacity)
    keys = range(500)
    for key in keys:
        lib.mp_sketch_raise(sketch, key, 3)
    lines = lib.mp_sketch_memory_bytes(sketch) // 64
    for _ in range(10 * capacity):
        lib.mp_sketch_count(sketch, 10**9)
    assert lib.mp_sketch_ages(sketch) == 1
    left = [sum(lib.mp_sketch_estimate(sketch, key) == 3 for key in keys)]
    for _ in range(lines // 8 + 1):
        lib.mp_sketch_count(sketch, 10**9)
        left.append(sum(lib.mp_sketch_estimate(sketch, key) == 3 for key in keys))
    assert left[0] == len(keys)
    assert left[-1] == 0
    assert max(before - after for before, after in pairwise(left)) <= 40


@given(first=st.integers(0, 15), second=st.integers(0, 15))
def test_raise_is_a_maximum(first: int, second: int) -> None:
    """What leaves its slot never lowers what is known."""
    sketch = new(64)
    lib.mp_sketch_raise(sketch, 5, first)
    lib.mp_sketch_raise(sketch, 5, second)
    assert lib.mp_sketch_estimate(sketch, 5) == min(max(first, second), 3)


@pytest.mark.parametrize("capacity", [1, 2, 7, 1000, 10**6])
def test_memory_is_2_bytes_per_key(capacity: int) -> None:
    """As many 64-byte lines as that needs, a power of two or not."""
    used = lib.mp_sketch_memory_bytes(new(capacity))
    assert 2 * capacity <= used <= 2 * capacity + 256


def test_accesses_counted_elsewhere_fade_what_is_here() -> None:
    """Who keeps a key's count in its slot tells the sketch that time passes."""
    sketch = new(1000)
    lib.mp_sketch_raise(sketch, 5, 3)
    for _ in range(11_000):
        lib.mp_sketch_count_elsewhere(sketch)
    assert lib.mp_sketch_estimate(sketch, 5) == 1


def test_collisions_of_one_seed_do_not_help_with_another() -> None:
    """Who found keys that look hot by collision finds nothing on the next machine."""
    ours, theirs = new(256, seed=1), new(256, seed=2)
    for _ in range(9):
        lib.mp_sketch_count(ours, 1)
        lib.mp_sketch_count(theirs, 1)
    # In a sketch of 576 bytes, keys that share both counters with key 1 are found by trying.
    found = [k for k in range(2, 400_000) if lib.mp_sketch_estimate(ours, k) > 0][:50]
    assert sum(lib.mp_sketch_estimate(theirs, k) > 0 for k in found) <= 1


def test_the_more_frequent_wins_and_ties_rarely_admit() -> None:
    """Ties: one in 128 gets in, so that collisions cannot lock the door for ever."""
    state = ffi.new("uint64_t *", 1)
    assert lib.mp_duel(3, 2, state) == 1
    assert lib.mp_duel(2, 3, state) == 0
    assert state[0] == 1  # chance is asked on ties only
    admitted = sum(lib.mp_duel(4, 4, state) for _ in range(12_800))
    assert 50 <= admitted <= 150
