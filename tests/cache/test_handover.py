"""A guest's connection goes on in the next process: real engines, a real store, the same socket."""

import asyncio
import random
from pathlib import Path

import pytest

from cache_rig import MIB, VOLUME, Cache, World, rig, run
from millpond.cache.exports import Agreed, ExportError
from millpond.cache.handover import HandoverError, Kept, decode, encode
from nbdclient import ConnectionLost

NOISE = random.Random(3).randbytes(MIB)
KEPT = Kept(
    fd=7,
    volume=b"v" * 16,
    agreed=Agreed(structured=True, read_only=True),
    received=b"\0\xff half",
    tag="nbd3",
)
OURS = b"c" * 16


def test_what_is_passed_on_comes_back() -> None:
    data = encode(OURS, {"one": KEPT, "two": Kept(8, b"w" * 16, Agreed(), b"")})
    assert list(decode(data, OURS, {"one": 7, "two": 8})) == [
        KEPT,
        Kept(8, b"w" * 16, Agreed(), b""),
    ]
    assert list(decode(data, OURS, {"one": 9}))[0].fd == 9, "the number it has now"


def test_what_was_kept_for_another_cache_or_version_is_refused() -> None:
    data = encode(OURS, {"one": KEPT})
    with pytest.raises(HandoverError, match="not this one"):
        decode(data, b"d" * 16, {"one": 7})
    with pytest.raises(HandoverError, match="version 2"):
        decode(data.replace(b'"version":1', b'"version":2'), OURS, {"one": 7})
    for damaged in (data[:-3], b"", b"\xff", data.replace(b'"volume":"', b'"volume":"x')):
        with pytest.raises(HandoverError):
            decode(damaged, OURS, {"one": 7})


async def restart(world: World, cache: Cache) -> tuple[Cache, list[bool]]:
    """As a planned restart does."""
    kept = await cache.give_back()
    await world.stop(cache)
    again = await world.cache("a")
    return again, [await again.daemon.adopt(each) for each in kept]


def test_guest_works_on_over_a_restart_and_loses_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a")
            guest = await cache.guest()
            await guest.write(0, NOISE)
            for turn in range(5):
                write = asyncio.ensure_future(guest.write(MIB, NOISE))
                await asyncio.sleep(0.001 * turn)  # somewhere in it
                cache, adopted = await restart(world, cache)
                assert adopted == [True]
                await write
                assert await guest.read(0, 2 * MIB) == NOISE + NOISE
            guest.close()

    run(scenario())


@pytest.mark.expects_warnings
def test_volume_that_another_host_has_meanwhile_is_not_served_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a")
            guest = await cache.guest()
            await guest.write(0, NOISE)
            kept = await cache.give_back()
            assert [each.volume for each in kept] == [cache.volume.id]
            await world.stop(cache)
            other = await (await world.cache("b")).guest()
            again = await world.cache("a")
            assert [await again.daemon.adopt(each) for each in kept] == [False]
            with pytest.raises(ConnectionLost):
                await guest.read(0, MIB)
            guest.close()
            assert await other.read(0, MIB) == NOISE

    run(scenario())


def test_cache_that_stops_offers_nothing_new(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a")
            await cache.give_back()
            with pytest.raises(ExportError, match="shutting down"):
                await cache.guest(VOLUME)

    run(scenario())
