"""Which read slots survive a restart: those of which it is proved that nobody wrote since.

The pure rule first, then real caches.  A crash is an image of the device that was taken while its
cache ran: what had completed is on it, no clean end is.
"""

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cache_rig import MIB, SIZE_BYTES, VOLUME, Cache, Guest, World, rig, run, until
from millpond.cache import limits
from millpond.cache.positions import slots_are_valid
from millpond.cache.replicas import VolumeRecord
from millpond.cache.volumes import State
from millpond.native.engine import VolumeStatus

US, OTHER = bytes(range(16)), bytes(range(1, 17))
OLD, NEW = b"old!" * (MIB // 4), b"new!" * (MIB // 4)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle times of a test."""
    monkeypatch.setattr(limits, "RELEASE_IDLE_S", 0.1)
    monkeypatch.setattr(limits, "GATHER_S", 0.02)


# -- the rule

RECORD = VolumeRecord(
    name=VOLUME, id=US.hex(), size_bytes=SIZE_BYTES, epoch=4, lineage=9, applied_sequence=20
)
NUMBERS = dict.fromkeys(VolumeStatus.__slots__, 0)
NUMBERS |= {"epoch": 4, "destaged_sequence": 20, "last_sequence": 20}
KNOWN = VolumeStatus(**{**NUMBERS, "id": US})  # type: ignore[arg-type]  # all but the id are int


def test_same_epoch_and_position_keeps_them() -> None:
    assert slots_are_valid(RECORD, KNOWN, US)


def test_a_device_that_does_not_know_the_volume_has_none() -> None:
    assert not slots_are_valid(RECORD, None, US)


def test_an_epoch_that_somebody_else_opened_drops_them() -> None:
    for holder in (None, OTHER.hex()):
        assert not slots_are_valid(replaced(epoch=5, open_holder=holder), KNOWN, US)


def test_an_open_of_ours_that_the_device_never_heard_of_keeps_them() -> None:
    assert slots_are_valid(replaced(epoch=5, open_holder=US.hex()), KNOWN, US)


def test_two_opens_that_the_device_never_heard_of_drop_them() -> None:
    """The first of the two may have been somebody else's."""
    assert not slots_are_valid(replaced(epoch=6, open_holder=US.hex()), KNOWN, US)


def test_an_answer_that_the_device_never_heard_keeps_them() -> None:
    """The store applied records of ours up to 20; the device knows only of 15."""
    assert slots_are_valid(RECORD, replace(KNOWN, destaged_sequence=15, last_sequence=25), US)


def test_a_store_outside_what_the_device_knows_drops_them() -> None:
    assert not slots_are_valid(replaced(applied_sequence=21), KNOWN, US)
    assert not slots_are_valid(replaced(applied_sequence=19), KNOWN, US)


def replaced(**changes: object) -> VolumeRecord:
    """RECORD with changes."""
    fields = {name: getattr(RECORD, name) for name in RECORD.__struct_fields__}
    return VolumeRecord(**{**fields, **changes})


# -- real caches


async def filled(world: World) -> None:
    """A volume whose first MiB is OLD at the store, written by a cache that is gone."""
    writer = await world.cache("writer")
    guest = await writer.guest()
    await guest.write(0, OLD)
    await world.stop(writer)
    assert (await world.record())["open_holder"] is None


async def read_and_saved(world: World, reader: Cache) -> None:
    """The reader's guest has read it all and gone; the slots are in a checkpoint."""
    guest = await reader.guest()
    assert await guest.read(0, MIB) == OLD
    counters = reader.daemon.engine.counters
    await until(lambda: counters()["slots_used"] == MIB // limits.SLOT_BYTES, "slots filled")
    await asyncio.sleep(0.05)  # counters are published every few milliseconds
    before = counters()["checkpoints"]
    guest.close()
    await until(lambda: counters()["checkpoints"] > before, "slots saved")


async def crashed(world: World, cache: Cache) -> None:
    """As if its process had died now, and a start of it had given the volume back."""
    image = cache.device.with_suffix(".image")
    shutil.copyfile(cache.device, image)
    await world.stop(cache)
    image.rename(cache.device)


async def fetches_of(cache: Cache, guest: Guest, expected: bytes) -> int:
    """Read the first MiB; how many reads of the store it took."""
    before = cache.daemon.engine.counters()["fetches"]
    assert await guest.read(0, MIB) == expected
    await asyncio.sleep(0.05)  # counters are published every few milliseconds
    return cache.daemon.engine.counters()["fetches"] - before


def test_what_was_read_before_a_crash_is_a_hit_after_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            await filled(world)
            reader = await world.cache("reader")
            await read_and_saved(world, reader)
            await crashed(world, reader)
            again = await world.cache("reader")
            assert await fetches_of(again, await again.guest(), OLD) == 0

    run(scenario())


def test_what_was_overwritten_before_a_crash_is_not_read_from_an_old_slot(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            await filled(world)
            reader = await world.cache("reader")
            await read_and_saved(world, reader)
            guest = await reader.guest()
            await guest.write(4096, NEW[:8192])
            await guest.flush()
            await until(lambda: not reader.has_undestaged(), "shipped")
            await crashed(world, reader)
            again = await world.cache("reader")
            expected = OLD[:4096] + NEW[:8192] + OLD[12288:]
            assert await fetches_of(again, await again.guest(), expected) <= 1

    run(scenario())


@pytest.mark.parametrize("writes", [True, False], ids=["writes", "only reads"])
def test_another_cache_opened_it_after_a_crash(tmp_path: Path, writes: bool) -> None:
    """Whatever the other did: its epoch is all that is known of it, so the slots go."""

    async def scenario() -> None:
        async with rig(tmp_path) as world:
            await filled(world)
            reader = await world.cache("reader")
            await read_and_saved(world, reader)
            await crashed(world, reader)
            other = await world.cache("other")
            guest = await other.guest()
            if writes:
                await guest.write(0, NEW)
            assert await guest.read(0, MIB) == (NEW if writes else OLD)
            await world.stop(other)
            again = await world.cache("reader")
            expected = NEW if writes else OLD
            assert await fetches_of(again, await again.guest(), expected) > 0

    run(scenario())


def test_another_cache_wrote_while_this_one_ran_without_the_volume(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            await filled(world)
            reader = await world.cache("reader")
            await read_and_saved(world, reader)
            await until(lambda: reader.volume.state is State.CLOSED, "given back")
            await until(lambda: not reader.volume._lock.locked(), "told to the store")
            other = await world.cache("other")
            guest = await other.guest()
            await guest.write(0, NEW)
            await world.stop(other)
            assert await fetches_of(reader, await reader.guest(), NEW) > 0

    run(scenario())
