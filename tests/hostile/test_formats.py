"""Hostile bytes in everything that is stored: superblocks, checkpoints, log records, groups, pages.

Thousands of spoiled devices in the simulator, each in a forked process: never a crash, a hang or
wrong data; a refusal is one line.  What no checksum gives away (a forged one) may show what the
forger likes, but ends in nothing worse.  The real files are spoiled in test_spoiled_files.py.
"""

import random
from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial

import pytest

from hostile import spoiled_store
from hostile.forked import Broken, Tell, in_fork
from hostile.spoiled_cache import (
    Spoiled,
    as_super,
    make_world,
    records,
    regions,
    superblock,
)
from hostile.spoiling import Forger, damage
from sim.nodes import SEGMENT_BYTES
from sim.world import World
from torture.amounts import amount, seed_for

WORLDS = 3  # different lives; the cases are spread over them

Record = Callable[[str, object], None]


@lru_cache(maxsize=2 * WORLDS)
def cache_world(seed: int, clean: bool) -> World:
    """Made once: each case is a fork."""
    return make_world(seed, clean=clean)


def outlived(spoiled: Spoiled | spoiled_store.Spoiled, _: Tell) -> str:
    """With nothing to tell."""
    return spoiled.outlive()


def run_cases(
    name: str, record: Record, seed: int, case: Callable[[random.Random], str]
) -> Counter[str]:
    """case(chance) forks and returns what came of it; Broken gets the number."""
    outcomes: Counter[str] = Counter()
    count = amount("SPOILS", usual=80, prove=3000)
    for index in range(count):
        try:
            outcomes[case(random.Random(f"{seed} {name} {index}"))] += 1
        except Broken as error:
            raise AssertionError(f"{name}, seed {seed}, case {index}: {error}") from None
    summary = ", ".join(f"{outcome} {number}" for outcome, number in sorted(outcomes.items()))
    print(f"{name}: {count} cases: {summary}")
    record("figure", f"{name}: {count} cases ({summary})")
    return outcomes


@pytest.mark.parametrize("clean", [True, False], ids=["stopped", "killed"])
def test_cache_device_that_nobody_spoiled_is_whole(clean: bool) -> None:
    for seed in range(WORLDS):
        spoiled = Spoiled(cache_world(seed, clean), newest_only=True)
        assert in_fork(partial(outlived, spoiled)) == "whole"


@pytest.mark.parametrize("clean", [True, False], ids=["stopped", "killed"])
def test_damaged_cache_device_shows_right_data_or_an_error(
    clean: bool, record_property: Record
) -> None:
    seed = seed_for("tests/hostile/test_formats.py", 1)

    def case(chance: random.Random) -> str:
        world = cache_world(chance.randrange(WORLDS), clean)
        state = chance.getstate()

        def work(tell: Tell) -> str:
            chance.setstate(state)
            sim = world.cache.sim
            done = damage(
                chance,
                chance.choice(regions(world)),
                lambda at, length: sim.peek(offset_bytes=at, length_bytes=length),
                lambda at, data: sim.poke(offset_bytes=at, data=data),
            )
            tell(done.text)
            return Spoiled(world, newest_only=not done.cut).outlive()

        return in_fork(work)

    name = f"damaged cache device, {'stopped' if clean else 'killed'}"
    outcomes = run_cases(name, record_property, seed, case)
    assert len(outcomes) > 2, "the damage did nothing"


def forge_cache(chance: random.Random, world: World) -> str:
    """One to three forged fields: records, then the checkpoint, then the superblock."""
    forger = Forger(chance, world.cache.sim)
    block = superblock(world)
    found = as_super(block)
    places = [
        (offset, record.header_length_bytes)
        for index in range(found.log_segment_count)
        for offset, record in records(world, found.log_offset_bytes + index * SEGMENT_BYTES)
    ]
    wanted = sorted(chance.randrange(3) for _ in range(chance.choice((1, 1, 2, 3))))
    done = []
    for what in wanted:
        if what == 0:
            done.append(forger.log_record(places))
        elif what == 1 and wanted.count(1) == 1:
            done.append(forger.checkpoint(block))
        else:
            done.append(forger.super(superblock(world)))
    return "; ".join(done)


@pytest.mark.parametrize("clean", [True, False], ids=["stopped", "killed"])
def test_forged_cache_device_ends_in_nothing_worse_than_an_error(
    clean: bool, record_property: Record
) -> None:
    seed = seed_for("tests/hostile/test_formats.py", 2)

    def case(chance: random.Random) -> str:
        world = cache_world(chance.randrange(WORLDS), clean)
        state = chance.getstate()

        def work(tell: Tell) -> str:
            chance.setstate(state)
            tell(forge_cache(chance, world))
            return Spoiled(world, newest_only=False, trusted=False).outlive()

        return in_fork(work)

    run_cases(
        f"forged cache device, {'stopped' if clean else 'killed'}", record_property, seed, case
    )


# The store.


@lru_cache(maxsize=WORLDS)
def store_world(seed: int) -> World:
    """A store that took half of a life, with a checkpoint in the middle; down."""
    world = make_world(seed, clean=True)
    world.store.die()
    return world


def test_store_that_nobody_spoiled_is_whole() -> None:
    for seed in range(WORLDS):
        spoiled = spoiled_store.Spoiled(store_world(seed))
        assert in_fork(partial(outlived, spoiled)) == "whole"


def test_damaged_store_shows_an_earlier_disk_or_an_error(record_property: Record) -> None:
    seed = seed_for("tests/hostile/test_formats.py", 3)

    def case(chance: random.Random) -> str:
        world = store_world(chance.randrange(WORLDS))
        state = chance.getstate()

        def work(tell: Tell) -> str:
            chance.setstate(state)
            sim = world.store.sim
            file, region = chance.choice(spoiled_store.regions(world))
            done = damage(
                chance,
                region,
                lambda at, length: sim.peek(file=file, offset_bytes=at, length_bytes=length),
                lambda at, data: sim.poke(file=file, offset_bytes=at, data=data),
            )
            tell(done.text)
            return spoiled_store.Spoiled(world, may_lose=done.cut).outlive()

        return in_fork(work)

    outcomes = run_cases("damaged store", record_property, seed, case)
    assert len(outcomes) > 1, "the damage did nothing"


def test_forged_store_ends_in_nothing_worse_than_an_error(record_property: Record) -> None:
    seed = seed_for("tests/hostile/test_formats.py", 4)

    def case(chance: random.Random) -> str:
        world = store_world(chance.randrange(WORLDS))
        state = chance.getstate()

        def work(tell: Tell) -> str:
            chance.setstate(state)
            tell(spoiled_store.forge_store(chance, world.store.sim))
            return spoiled_store.Spoiled(world, trusted=False).outlive()

        return in_fork(work)

    run_cases("forged store", record_property, seed, case)
