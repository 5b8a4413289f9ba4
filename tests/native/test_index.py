"""The log index against a plain dictionary, and its walks while entries come and go."""

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.native import check, ffi, lib

ENTRY_BYTES = 24
BLOCKS = 700  # of the log: 1024 slots, the least there are

# Few keys, many of them at once, so that runs of neighbours form, meet and split.
KEYS = st.tuples(st.integers(0, 3), st.integers(0, 400))
STEPS = st.lists(st.tuples(st.sampled_from(["put", "put", "delete"]), KEYS), max_size=800)


class Index:
    """A table, freed at the end."""

    def __init__(self, log_blocks: int, seed: int) -> None:
        self.c = ffi.new("struct index *")
        check(lib.index_init(self.c, log_blocks, seed))

    def __enter__(self) -> "Index":
        return self

    def __exit__(self, *_: object) -> None:
        lib.index_free(self.c)

    def put(self, key: tuple[int, int], address: int) -> None:
        lib.index_put(self.c, *key, address).checksum = address * 3

    def find(self, key: tuple[int, int]) -> Any:
        return lib.index_find(self.c, *key)

    def delete(self, key: tuple[int, int]) -> None:
        lib.index_delete(self.c, self.find(key))


def key_of(slot: Any) -> tuple[int, int]:
    """(volume number, block) of a live slot."""
    return (slot.key - 1) >> 40, (slot.key - 1) & ((1 << 40) - 1)


@given(STEPS, st.integers(0, 2**64 - 1))
def test_any_order_of_puts_and_deletes_is_a_dictionary(
    steps: list[tuple[str, tuple[int, int]]], seed: int
) -> None:
    model: dict[tuple[int, int], int] = {}
    with Index(BLOCKS, seed) as index:
        for address, (what, key) in enumerate(steps):
            if what == "put" and len(model) < 900:
                index.put(key, address % 5)
                model[key] = address % 5
            elif key in model:
                index.delete(key)
                del model[key]
        assert index.c.used == len(model)
        assert index.c.zeros == sum(address == 0 for address in model.values())
        for key, address in model.items():
            slot = index.find(key)
            assert key_of(slot) == key
            assert (slot.address, slot.checksum) == (address, address * 3)
        for block in range(401, 500):
            assert index.find((0, block)) == ffi.NULL


@settings(max_examples=50)
@given(st.integers(0, 2**64 - 1), st.integers(700, 940))
def test_a_walk_meets_what_stays_while_the_rest_comes_and_goes(seed: int, count: int) -> None:
    chance = Random(seed)
    keys = [(chance.randrange(4), block) for block in range(count)]
    staying = set(chance.sample(keys, count // 2))
    leaving = [key for key in keys if key not in staying]
    chance.shuffle(leaving)
    met = []
    with Index(BLOCKS, seed) as index:
        for key in keys:
            index.put(key, 1)
        start, step = lib.index_walk_start(index.c), 0
        while step < index.c.capacity:
            slot = lib.index_walk(index.c, start, step)
            if slot.key:
                met.append(key_of(slot))
            step += 1
            if step < index.c.capacity and lib.index_may_pause(index.c, start, step):
                for _ in range(min(3, len(leaving))):
                    index.delete(leaving.pop())
                if chance.random() < 0.3 and index.c.used < 940:
                    index.put((9, step), 1)
    assert staying <= set(met)
    old = [key for key in met if key[0] != 9]
    assert len(old) == len(set(old)), "an old entry was met twice"


def test_a_walk_may_delete_all_that_it_meets() -> None:
    with Index(BLOCKS, 3) as index:
        for block in range(900):
            index.put((block % 2, block), 1)
        start, step = lib.index_walk_start(index.c), 0
        while step < index.c.capacity:
            slot = lib.index_walk(index.c, start, step)
            if slot.key and key_of(slot)[0] == 1:
                lib.index_delete(index.c, slot)
            else:
                step += 1
        assert index.c.used == 450
        assert all(index.find((1, block)) == ffi.NULL for block in range(1, 900, 2))


@pytest.mark.parametrize("segments", [6, 7, 100, 1280, 1281, 12_345])
def test_a_log_of_any_size_costs_at_most_32_bytes_per_block(segments: int) -> None:
    blocks = segments * 2048
    with Index(blocks, 1) as index:
        assert lib.index_memory_bytes(index.c) == index.c.capacity * ENTRY_BYTES
        assert lib.index_memory_bytes(index.c) <= 32 * blocks
        # Every block of the log written once, and zeroes as many as are let in.
        assert blocks + lib.index_zeros_limit(index.c, blocks) <= lib.index_limit(index.c)
        assert lib.index_zeros_limit(index.c, blocks) >= blocks // 10


def numbers(count: int) -> Iterator[tuple[int, int]]:
    return ((number % 7, number * 11) for number in range(count))


def test_a_log_filled_under_wider_limits_makes_the_table_grow() -> None:
    with Index(BLOCKS, 5) as index:
        for address, key in enumerate(numbers(900)):
            index.put(key, address)
        check(lib.index_reserve(index.c, 900))
        assert index.c.capacity == 1024
        check(lib.index_reserve(index.c, 5000))
        assert lib.index_limit(index.c) >= 5000
        assert (index.c.used, index.c.zeros) == (900, 1)
        for address, key in enumerate(numbers(900)):
            assert index.find(key).address == address
