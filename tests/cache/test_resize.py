"""A volume gets another size or name: under a guest, across crashes, with a cache that remembers.

A crash is an image of the device, taken while its cache ran: what had completed is on it.
"""

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cache_rig import MIB, SIZE_BYTES, VOLUME, World, rig, run, until
from millpond.cache import limits
from millpond.cache.errors import VolumeRefused
from millpond.cache.exports import ExportError
from millpond.cache.positions import check_still_ours
from millpond.cache.replicas import VolumeRecord
from millpond.cache.shaping import RateLimits
from millpond.cache.volumes import State
from millpond.native.engine import VolumeStatus
from nbdclient import NbdReplyError

NEW_BYTES = 2 * SIZE_BYTES
NOISE = random.Random(7).randbytes(MIB)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle times of a test."""
    monkeypatch.setattr(limits, "RELEASE_IDLE_S", 0.1)
    monkeypatch.setattr(limits, "GATHER_S", 0.02)


RECORD = VolumeRecord(
    name=VOLUME,
    id="00" * 15 + "01",
    size_bytes=SIZE_BYTES,
    epoch=4,
    lineage=9,
    applied_sequence=20,
    open_holder="11" * 16,
)
NUMBERS = dict.fromkeys(VolumeStatus.__slots__, 0)
NUMBERS |= {"size_bytes": SIZE_BYTES, "epoch": 4, "destaged_sequence": 20, "last_sequence": 25}
KNOWN = VolumeStatus(**{**NUMBERS, "id": b"1"})  # type: ignore[arg-type]  # all but the id are int


def test_device_with_unshipped_writes_refuses_a_store_that_is_smaller() -> None:
    ours = bytes.fromhex("11" * 16)
    larger = msgspec.structs.replace(RECORD, size_bytes=NEW_BYTES)
    check_still_ours(larger, KNOWN, ours)
    smaller = msgspec.structs.replace(RECORD, size_bytes=SIZE_BYTES // 2)
    with pytest.raises(VolumeRefused, match="writes that were not shipped"):
        check_still_ours(smaller, KNOWN, ours)
    check_still_ours(smaller, replace(KNOWN, last_sequence=20), ours)


async def tell_store(world: World, op: str, **arguments: Any) -> dict[str, Any]:
    client = await world.client()
    try:
        return dict((await client.call(op, name=VOLUME, **arguments))["volume"])
    finally:
        await client.close()


def test_volume_grows_under_a_guest_and_the_next_connection_sees_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a")
            old = await cache.guest()
            await old.write(0, NOISE)
            await tell_store(world, "volume.resize", size_bytes=NEW_BYTES)
            with pytest.raises(NbdReplyError):
                await old.write(SIZE_BYTES, NOISE)
            new = await cache.guest()
            assert new.client.size_bytes == NEW_BYTES
            assert await new.read(SIZE_BYTES, MIB) == bytes(MIB)
            await new.write(NEW_BYTES - MIB, NOISE)
            await new.flush()
            assert await old.read(0, MIB) == NOISE
            await until(lambda: not cache.has_undestaged(), "shipped")
            await world.stop(cache)
            other = await world.cache("b")
            guest = await other.guest()
            assert await guest.read(NEW_BYTES - MIB, MIB) == NOISE

    run(scenario())


@pytest.mark.expects_warnings  # the store is away while it dies
def test_cache_dies_after_the_store_has_grown_and_before_it_heard(tmp_path: Path) -> None:
    """The store's record is first: a device that remembers less, and has writes, goes on."""

    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a", rates=RateLimits(64 * 1024, 64 * 1024))
            guest = await cache.guest()
            await guest.write(0, NOISE)
            await guest.flush()
            await tell_store(world, "volume.resize", size_bytes=NEW_BYTES)
            await died(world, cache)
            again = await world.cache("a")
            guest = await again.guest()
            assert guest.client.size_bytes == NEW_BYTES
            assert await guest.read(0, MIB) == NOISE
            await guest.write(SIZE_BYTES, NOISE)
            await until(lambda: not again.has_undestaged(), "shipped")

    run(scenario())


@pytest.mark.expects_warnings  # the store is away while it dies
def test_cache_dies_with_writes_behind_the_end_that_its_checkpoint_knows(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a", rates=RateLimits(64 * 1024, 64 * 1024))
            await cache.guest()
            await tell_store(world, "volume.resize", size_bytes=NEW_BYTES)
            guest = await cache.guest()
            await guest.write(SIZE_BYTES + MIB, NOISE)
            await guest.flush()
            await died(world, cache)
            again = await world.cache("a")
            guest = await again.guest()
            assert await guest.read(SIZE_BYTES + MIB, MIB) == NOISE
            await until(lambda: not again.has_undestaged(), "shipped")

    run(scenario())


async def died(world: World, cache: Any) -> None:
    """As if its process had died now: the device is as it was, the store's record, too."""
    image = cache.device.with_suffix(".image")
    shutil.copyfile(cache.device, image)
    world.wire.cut()
    cache.daemon.failed.set_result("killed")
    world.caches.remove(cache)
    await cache.stop()
    assert (await world.record())["open_holder"] == cache.id
    world.wire.heal()
    image.rename(cache.device)


def test_end_that_was_cut_off_reads_as_zeroes_when_the_volume_grows_again(tmp_path: Path) -> None:
    """The same cache wrote it, remembers it in log and slots, and the position did not move."""

    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a")
            guest = await cache.guest()
            await guest.write(0, NOISE)
            await guest.write(SIZE_BYTES - MIB, NOISE)
            await guest.flush()
            guest.close()
            await until(lambda: cache.volume.state is State.CLOSED, "given back")
            await until(lambda: not cache.volume._lock.locked(), "told to the store")
            await tell_store(world, "volume.resize", size_bytes=SIZE_BYTES // 2, shrink=True)
            await tell_store(world, "volume.resize", size_bytes=SIZE_BYTES)
            guest = await cache.guest()
            assert await guest.read(0, MIB) == NOISE
            assert await guest.read(SIZE_BYTES - MIB, MIB) == bytes(MIB)

    run(scenario())


def test_renamed_volume_is_found_by_its_new_name_while_it_is_open(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a")
            guest = await cache.guest()
            await guest.write(0, NOISE)
            await tell_store(world, "volume.rename", new_name="web")
            await guest.write(MIB, NOISE)
            second = await cache.guest("web")
            assert await second.read(MIB, MIB) == NOISE
            assert cache.volume.record is not None and cache.volume.record.name == "web"
            with pytest.raises(ExportError, match="no volume named"):
                await cache.guest(VOLUME)

    run(scenario())
