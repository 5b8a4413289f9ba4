"""Bits flip on the simulated disks: never data, and never a loss that nobody hears of.

A slot is a miss.  A log block, a checkpoint or a record of the store is either not needed any more,
or an error that somebody says; what the store has stays an exact state of the disk.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest

from millpond.native import ffi, lib
from millpond.native.drivers import Sim
from sim.history import BLOCK, SHAPES, Shape
from sim.nodes import CacheNode, decode_read_reply
from sim.oracle import Illegal, is_durable
from sim.settings import Settings
from sim.world import PAUSE_NS, VOLUME, World

# Short: what is damaged is still needed by something.
SHORT = Shape(requests=60)
LOUD = ("VolumeFailed", "got error 5", "does not open: -5", "the cache does not open")


def superblock(sim: Sim) -> Any:
    """The newer one of a cache device."""
    copies = []
    for offset in (0, 65536):
        copy = ffi.new("struct mp_cache_super *")
        ffi.memmove(copy, sim.peek(offset_bytes=offset, length_bytes=BLOCK), BLOCK)
        copies.append(copy)
    return max(copies, key=lambda copy: int(copy.generation))


def flip(sim: Sim, rng: random.Random, file: int, first: int, end: int) -> None:
    """One bit, in a block of the range that holds something."""
    for _ in range(2000):
        offset = rng.randrange(first, end) // BLOCK * BLOCK
        data = sim.peek(file=file, offset_bytes=offset, length_bytes=BLOCK)
        used = BLOCK - len(data) + len(data.rstrip(b"\0"))
        if used:
            at = rng.randrange(used)
            sim.poke(
                file=file,
                offset_bytes=offset + at,
                data=bytes([data[at] ^ 1 << rng.randrange(8)]),
            )
            return


def flip_in_cache(node: CacheNode, rng: random.Random, region: str) -> None:
    """One bit in the log, the slots or the checkpoint that counts."""
    layout = superblock(node.sim)
    log, slots = int(layout.log_offset_bytes), int(layout.slots_offset_bytes)
    if region == "log":
        flip(node.sim, rng, 0, log, slots)
    elif region == "slots":
        flip(node.sim, rng, 0, slots, int(layout.device_bytes))
    else:
        first = int(layout.checkpoint_offset_bytes[layout.checkpoint_area])
        flip(node.sim, rng, 0, first, first + int(layout.checkpoint_length_bytes))


@pytest.mark.parametrize("mode", ["", "cache"])
@pytest.mark.parametrize("seed", range(1, 5))
def test_flipped_bits_in_slots_are_misses(
    seed: int, mode: str, record_property: Callable[[str, object], None]
) -> None:
    """All the time, across a crash too: the guest sees nothing of it."""
    world = World(
        Settings(
            seed=seed,
            shape=SHAPES["reread"],
            cut=mode,
            cut_after=60 * seed,
            requests_after_cut=SHAPES["reread"].requests,
        )
    )
    rng = random.Random(f"flips {seed}")
    turn, found = world.turn, 0

    def turn_and_flip() -> None:
        turn()
        if rng.randrange(2) == 0:
            flip_in_cache(world.cache, rng, "slots")

    world.turn = turn_and_flip  # type: ignore[method-assign]
    try:
        world.run()
        counters = world.cache.engine.counters()
        found = counters["slot_checksum_errors"] + counters["slot_stale_after_restart"]
    finally:
        world.close()
    assert found > 0, "no flipped bit was ever read"
    record_property("figure", f"{found} damaged slot blocks were fetched again")


def quiet_world(seed: int, *, drained: bool) -> World:
    """A world whose guest is done; everything is flushed, and the syncs are told."""
    world = World(Settings(seed=seed, shape=SHORT))
    world.eagerness = 0.03
    world.bring_up()
    while not world.guest.is_done:
        world.turn()
    if drained:
        world.drain()
    world.flush()
    for node in (world.cache, world.store):
        for _ in range(40):
            node.step()
        node.sim.advance_ns(PAUSE_NS)
        for _ in range(40):
            node.step()
    return world


def loud(error: Illegal) -> None:
    """Somebody said it; anything else would be data, or a silent loss."""
    if not any(word in str(error) for word in LOUD):
        raise error


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("region", ["log", "checkpoint"])
def test_flipped_bit_in_what_only_the_cache_has(
    region: str, restart: bool, record_property: Callable[[str, object], None]
) -> None:
    """Harmless, or loud.  Nothing that is damaged is shipped, nothing flushed is forgotten."""
    said = 0
    for seed in range(1, 41):
        world = quiet_world(seed, drained=False)
        try:
            assert all(map(is_durable, world.disk.mutations))
            flip_in_cache(world.cache, random.Random(f"flip {seed}"), region)
            if restart:
                world.crash_cache()
                world.bring_up()
            world.go_on()
        except Illegal as error:
            loud(error)
            world.check_image()
            said += 1
        finally:
            world.close()
    assert said >= (5 if region == "log" or restart else 0), "the flips hit nothing"
    record_property("figure", f"40 flips in the {region}: {said} loud, the others harmless")


def read_store(world: World) -> int:
    """Block by block: right, or refused.  The number of refusals."""
    state = world.store.core.volume(VOLUME)
    assert state is not None
    refused = 0
    for number, block in enumerate(world.disk.blocks):
        wanted = ffi.new("struct mp_read_request *")
        wanted.volume, wanted.epoch = VOLUME, state.epoch
        wanted.first_block, wanted.block_count = number, 1
        reply = world.store.call(lib.MP_FRAME_READ, bytes(ffi.buffer(wanted)))
        if reply.status == lib.MP_STATUS_CORRUPT:
            refused += 1
        else:
            assert decode_read_reply(reply) == block.contents[-1], f"block {number} is wrong"
    return refused


@pytest.mark.parametrize("restart", [False, True])
def test_flipped_bit_in_a_segment_of_the_store(
    restart: bool, record_property: Callable[[str, object], None]
) -> None:
    """A read is right or refused; after a restart too, or the store says that it cannot."""
    said = 0
    for seed in range(1, 31):
        world = quiet_world(seed, drained=True)
        rng = random.Random(f"flip {seed}")
        try:
            files = segments(world.store.sim)
            file, length_bytes = rng.choice(files)
            flip(world.store.sim, rng, file, 0, length_bytes)
            if restart:
                world.store.die()
                world.store.start()
                state = world.store.core.volume(VOLUME)
                assert state is not None and state.applied_sequence == world.confirmed
            said += read_store(world) > 0
        except Illegal as error:
            assert "the store does not open" in str(error)
            said += 1
        finally:
            world.close()
    assert said >= 5, "the flips hit nothing"
    record_property("figure", f"30 flips: {said} refused, the others harmless; none a wrong block")


def segments(sim: Sim) -> list[tuple[int, int]]:
    """(file, length) of what a store has on its disk."""
    found = []
    for file in range(1, 64):
        try:
            sim.peek(file=file, offset_bytes=0, length_bytes=BLOCK)
        except OSError:
            continue
        length_bytes = BLOCK
        while length_bytes < 1 << 20:
            try:
                sim.peek(file=file, offset_bytes=length_bytes, length_bytes=BLOCK)
            except OSError:
                break
            length_bytes += BLOCK
        found.append((file, length_bytes))
    return found
