"""Destage over a wire that misbehaves: same bytes again, loud stops, rates as they pass it."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from cache_rig import MIB, Cache, World, frame_type, rig, run, until, with_status
from millpond.cache import limits
from millpond.cache.shaping import RateLimits
from millpond.cache.volumes import State
from millpond.native import lib


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle times of a test."""
    monkeypatch.setattr(limits, "RELEASE_IDLE_S", 0.1)
    monkeypatch.setattr(limits, "GATHER_S", 0.02)
    monkeypatch.setattr(limits, "STOP_RELEASE_S", 0.5)


async def write_at_random(cache: Cache, seed: int, count: int = 300) -> bytes:
    """Overlapping writes of any alignment; returns what the first 4 MiB hold then."""
    chance = random.Random(seed)
    image = bytearray(4 * MIB)
    guest = await cache.guest()
    for _ in range(count):
        length_bytes = chance.randrange(1, 64 * 1024)
        offset = chance.randrange(len(image) - length_bytes)
        payload = chance.randbytes(length_bytes) if chance.random() < 0.7 else bytes(length_bytes)
        await guest.write(offset, payload)
        image[offset : offset + length_bytes] = payload
    guest.close()
    return bytes(image)


async def expect_at_store(world: World, image: bytes) -> None:
    """What another cache, without anything of its own, reads."""
    guest = await (await world.cache("reader", through_wire=False)).guest()
    assert await guest.read(0, len(image)) == image


async def drained(cache: Cache) -> None:
    await until(lambda: cache.volume.state is State.CLOSED, "drained and given back", 60)
    await until(lambda: not cache.volume._lock.locked(), "told to the store")


def change_replies(world: World, change: Callable[[bytes], bytes], times: int) -> list[int]:
    """Apply change to the first so many BATCH_REPLY frames; returns the growing list of them."""
    seen: list[int] = []

    def filtered(frame: bytes) -> bytes:
        if frame_type(frame) != lib.MP_FRAME_BATCH_REPLY or len(seen) >= times:
            return frame
        seen.append(len(frame))
        return change(frame)

    world.wire.to_cache = filtered
    return seen


def test_the_store_gets_exactly_what_the_guest_wrote(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a")
            image = await write_at_random(cache, seed=1)
            await drained(cache)
            await expect_at_store(world, image)

    run(scenario())


@pytest.mark.expects_warnings
def test_a_connection_cut_again_and_again_loses_and_doubles_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a")

            async def torment() -> None:
                while True:
                    await asyncio.sleep(0.15)
                    world.wire.cut()
                    await asyncio.sleep(0.05)
                    world.wire.heal()

            tormenting = asyncio.create_task(torment())
            image = await write_at_random(cache, seed=2, count=150)
            await asyncio.sleep(1)
            tormenting.cancel()
            world.wire.heal()
            await drained(cache)
            await expect_at_store(world, image)

    run(scenario())


@pytest.mark.expects_warnings
def test_an_acknowledgement_that_gets_lost_is_asked_for_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a")

            def lose(frame: bytes) -> bytes:
                asyncio.get_running_loop().call_soon(world.wire.cut)
                asyncio.get_running_loop().call_later(0.05, world.wire.heal)
                return b""

            lost = change_replies(world, lose, times=3)
            image = await write_at_random(cache, seed=3, count=50)
            await drained(cache)
            assert len(lost) == 3
            await expect_at_store(world, image)

    run(scenario())


@pytest.mark.expects_warnings
@pytest.mark.parametrize(
    "status", [lib.MP_STATUS_FULL, lib.MP_STATUS_IO, lib.MP_STATUS_CORRUPT], ids=str
)
def test_a_store_that_cannot_now_is_asked_again(tmp_path: Path, status: int) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a")
            refused = change_replies(world, lambda frame: with_status(frame, status), times=3)
            image = await write_at_random(cache, seed=4, count=50)
            await drained(cache)
            assert len(refused) == 3
            await expect_at_store(world, image)

    run(scenario())


@pytest.mark.expects_warnings
@pytest.mark.parametrize(
    ("status", "words"),
    [
        (lib.MP_STATUS_STALE_EPOCH, "another cache has opened"),
        (lib.MP_STATUS_GAP, "GAP"),
        (lib.MP_STATUS_LINEAGE, "LINEAGE"),
        (lib.MP_STATUS_UNKNOWN_VOLUME, "UNKNOWN_VOLUME"),
        (99, "99"),
    ],
)
def test_a_store_that_contradicts_our_history_stops_the_volume_loudly(
    tmp_path: Path, status: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a")
            change_replies(world, lambda frame: with_status(frame, status), times=1)
            guest = await cache.guest()
            await guest.write(0, b"x" * 4096)
            await until(lambda: cache.volume.state is State.FAILED, "stopped")
            assert words in cache.volume.problem
            assert cache.has_undestaged()
            assert any("volume failed" in line.getMessage() for line in caplog.records)
            await until(lambda: cache.daemon.connection_count == 0, "guests disconnected")
            assert not cache.daemon.failed.done()

    run(scenario())


@pytest.mark.expects_warnings
def test_a_batch_that_is_corrupt_every_time_stops_the_volume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CORRUPT_RETRIES_MAX", 2)

    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a")
            corrupt = lib.MP_STATUS_CORRUPT
            change_replies(world, lambda frame: with_status(frame, corrupt), times=100)
            guest = await cache.guest()
            await guest.write(0, b"x" * 4096)
            await until(lambda: cache.volume.state is State.FAILED, "stopped")
            assert "corrupt" in cache.volume.problem and cache.has_undestaged()

    run(scenario())


def test_no_second_on_the_wire_carries_more_than_the_peak(tmp_path: Path) -> None:
    average, peak = MIB, 2 * MIB

    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a", rates=RateLimits(average, peak))
            guest = await cache.guest()
            chance = random.Random(5)
            started_s = asyncio.get_running_loop().time()
            for number in range(40):  # 10 MiB that does not compress
                await guest.write(number * 256 * 1024, chance.randbytes(256 * 1024))
            await asyncio.sleep(max(0.0, started_s + 7 - asyncio.get_running_loop().time()))
            batches = [each for each in world.wire.sent if each[1] > 1024]
            guest.close()
        total = first = worst = 0
        for time_s, count in batches:
            total += count
            while batches[first][0] < time_s - 1.0:
                total -= batches[first][1]
                first += 1
            worst = max(worst, total)
        assert worst <= peak
        sent = sum(count for _, count in batches)
        assert 4 * MIB < sent < 8 * MIB + peak  # 7 s at 1 MiB/s, from an empty bucket

    run(scenario())


def test_one_log_record_larger_than_a_seconds_peak_leaves_in_slices(tmp_path: Path) -> None:
    rate = 4 * limits.RATE_MIN_BYTES_PER_S

    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a", rates=RateLimits(None, rate))
            guest = await cache.guest()
            payload = random.Random(6).randbytes(MIB)
            started_s = asyncio.get_running_loop().time()
            await guest.write(0, payload)
            guest.close()
            await drained(cache)
            assert asyncio.get_running_loop().time() - started_s > MIB / rate - 1.5
            await expect_at_store(world, payload)

    run(scenario())
