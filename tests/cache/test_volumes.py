"""A volume at real caches and a real store: epochs, dirty on record, giving back, take-over."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache_rig import MIB, SIZE_BYTES, VOLUME, World, frame_type, rig, run, until
from millpond.cache import limits, opening
from millpond.cache.exports import ExportError
from millpond.cache.shaping import RateLimits
from millpond.cache.status import status_of, volumes_of
from millpond.cache.volumes import State
from millpond.native import lib
from nbdclient import ConnectionLost

BLOCK = bytes(range(256)) * 16
SLOW = RateLimits(limits.RATE_MIN_BYTES_PER_S, limits.RATE_MIN_BYTES_PER_S)
NEWER = bytes([9]) * MIB
NOISE = bytes(hash((number, 1)) & 0xFF for number in range(MIB))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle times of a test."""
    monkeypatch.setattr(limits, "DIRTY_IDLE_S", 0.3)
    monkeypatch.setattr(limits, "RELEASE_IDLE_S", 0.1)
    monkeypatch.setattr(limits, "GATHER_S", 0.02)
    monkeypatch.setattr(limits, "STOP_RELEASE_S", 0.5)


async def dirty_cache(world: World, name: str) -> Any:
    """A cache that was stopped with writes it could not ship in time."""
    cache = await world.cache(name, rates=SLOW)
    guest = await cache.guest()
    await guest.write(0, NOISE)
    await guest.flush()
    await world.stop(cache)
    record = await world.record()
    assert record["dirty_holder"] == cache.id
    assert record["applied_sequence"] < 1 + MIB // 4096
    return cache


def test_the_first_client_opens_and_the_last_gives_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a")
            assert (await world.record())["epoch"] == 0
            first, second = await cache.guest(), await cache.guest()
            record = await world.record()
            assert (record["epoch"], record["open_holder"]) == (1, cache.id)
            first.close()
            await asyncio.sleep(3 * limits.RELEASE_IDLE_S)
            assert cache.volume.state is State.OPEN
            second.close()
            await until(lambda: cache.volume.state is State.CLOSED, "given back")
            await until(lambda: not cache.volume._lock.locked(), "told to the store")
            assert (await world.record())["open_holder"] is None

    run(scenario())


def test_what_one_cache_wrote_another_reads_after_it_was_given_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            first = await world.cache("a")
            guest = await first.guest()
            await guest.write(4096 * 3 + 100, NOISE)  # any alignment
            guest.close()
            await until(lambda: first.volume.state is State.CLOSED, "drained and given back")
            second = await world.cache("b")
            guest = await second.guest()
            expected = bytes(4096 * 3 + 100) + NOISE
            assert await guest.read(0, len(expected)) == expected
            assert (await world.record())["epoch"] == 2

    run(scenario())


@pytest.mark.expects_warnings
def test_a_write_is_not_acknowledged_before_dirty_is_on_record(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a")
            guest = await cache.guest()
            world.wire.cut()
            write = asyncio.create_task(guest.write(0, BLOCK))
            await asyncio.sleep(0.5)
            assert not write.done()
            assert (await world.record())["dirty_holder"] is None
            world.wire.heal()
            await write
            assert cache.volume.dirty_recorded
            assert await guest.read(0, 4096) == BLOCK

    run(scenario())


def test_dirty_is_taken_off_the_record_when_idle_and_put_on_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a")
            guest = await cache.guest()
            for round_number in range(3):
                await guest.write(0, bytes([round_number + 1]) * 4096)
                assert cache.volume.dirty_recorded
                await until(lambda: not cache.volume.dirty_recorded, "drained and idle")
                await until(lambda: not cache.volume._lock.locked(), "told to the store")
                record = await world.record()
                assert (record["dirty_holder"], record["open_holder"]) == (None, cache.id)
            assert await guest.read(0, 4096) == bytes([3]) * 4096

    run(scenario())


@pytest.mark.expects_warnings
def test_a_lost_answer_to_clearing_dirty_puts_it_on_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a")
            guest = await cache.guest()
            await guest.write(0, BLOCK)
            lost: list[bytes] = []

            def lose_one(frame: bytes) -> bytes:
                told = frame_type(frame) == lib.MP_FRAME_CONTROL_REPLY
                if told and b'"dirty_holder":null' in frame and not lost:
                    lost.append(frame)
                    asyncio.get_running_loop().call_soon(world.wire.cut)
                    asyncio.get_running_loop().call_later(0.2, world.wire.heal)
                    return b""
                return frame

            world.wire.to_cache = lose_one
            await until(lambda: bool(lost), "dirty cleared, answer lost")
            await until(lambda: cache.volume.dirty_recorded, "put on again")
            assert (await world.record())["dirty_holder"] == cache.id
            await guest.write(4096, BLOCK)
            assert await guest.read(0, 8192) == BLOCK * 2

    run(scenario())


def test_a_second_cache_is_refused_while_the_first_has_the_volume(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            first, second = await world.cache("a"), await world.cache("b")
            await first.guest()
            with pytest.raises(ExportError, match="is open at cache") as refused:
                await second.guest()
            assert refused.value.code == "busy"
            assert (await world.record())["epoch"] == 1

    run(scenario())


def test_dirty_records_are_shipped_by_themselves_after_a_restart(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            stopped = await dirty_cache(world, "a")
            again = await world.cache("a")
            assert again.id == stopped.id
            await until(lambda: not again.has_undestaged(), "destage goes on without a client")
            await until(lambda: again.volume.state is State.CLOSED, "given back")
            await until(lambda: not again.volume._lock.locked(), "told to the store")
            record = await world.record()
            assert (record["dirty_holder"], record["open_holder"]) == (None, None)
            other = await (await world.cache("b")).guest()
            assert await other.read(0, MIB) == NOISE

    run(scenario())


def test_a_guest_goes_on_over_a_restart_with_dirty_records(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            await dirty_cache(world, "a")
            again = await world.cache("a", rates=SLOW)
            guest = await again.guest()
            await guest.write(4096, BLOCK)
            assert await guest.read(0, MIB) == NOISE[:4096] + BLOCK + NOISE[8192:]

    run(scenario())


@pytest.mark.expects_warnings
def test_a_cache_that_was_taken_over_keeps_its_dirty_records_and_ships_nothing(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            stopped = await dirty_cache(world, "a")
            await world.take_over()
            before = await world.record()
            again = await world.cache("a")
            await until(lambda: again.volume.state is State.FAILED, "refused at start")
            assert "another cache took the volume over" in again.volume.problem
            with pytest.raises(ExportError, match="took the volume over"):
                await again.guest()
            (shown,) = volumes_of(again.daemon)
            assert shown["dirty_bytes"] > 0 and "took the volume over" in shown["problem"]
            assert await world.record() == before
            await world.stop(again)
            third = await world.cache("a")
            await until(lambda: third.volume.state is State.FAILED, "and again")
            assert third.dirty_bytes() > 0 and third.id == stopped.id

    run(scenario())


@pytest.mark.expects_warnings
def test_deliberate_fault_nobody_asks_whether_it_is_ours_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    """Without the check a cache that was left behind shows its old writes over newer ones."""
    monkeypatch.setattr(opening, "check_still_ours", lambda record, known, cache_id: None)

    async def scenario() -> None:
        async with rig(tmp_path) as world:
            await dirty_cache(world, "a")
            await world.take_over(and_close=True)
            other = await world.cache("b")
            guest = await other.guest()
            await guest.write(0, NEWER)
            await world.stop(other)
            again = await world.cache("a")
            assert await (await again.guest()).read(0, len(NEWER)) != NEWER, "nothing happens"
            record_property("figure", "caught: old writes show over newer ones")

    run(scenario())


@pytest.mark.expects_warnings
def test_a_running_cache_that_is_taken_over_stops_the_volume_loudly(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a", rates=SLOW)
            guest = await cache.guest()
            await guest.write(0, NOISE)
            applied = (await world.record())["applied_sequence"]
            await world.take_over()
            await until(lambda: cache.volume.state is State.FAILED, "fenced")
            with pytest.raises(ConnectionLost):
                await guest.read(0, 4096)
            assert cache.has_undestaged()
            assert (await world.record())["applied_sequence"] <= applied + 16

    run(scenario())


@pytest.mark.expects_warnings
def test_a_volume_that_the_store_lost_is_never_an_empty_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            await dirty_cache(world, "a")
            client = await world.client()
            await client.call("volume.delete", name=VOLUME, force=True)
            await client.call("volume.create", name=VOLUME, size_bytes=SIZE_BYTES)
            await client.close()
            again = await world.cache("a")
            await until(lambda: len(again.daemon.volumes) == 1, "resumed")
            await until(lambda: again.volume.state is State.FAILED, "refused")
            assert again.dirty_bytes() > 0

    run(scenario())


def test_an_unknown_name_is_refused_and_the_empty_one_is_the_only_volume(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            exports = (await world.cache("a")).daemon.exports
            assert (await exports.describe("")).name == VOLUME
            with pytest.raises(ExportError) as refused:
                await exports.describe("nothing")
            assert refused.value.code == "unknown"
            client = await world.client()
            await client.call("volume.create", name="second", size_bytes=SIZE_BYTES)
            await client.close()
            with pytest.raises(ExportError, match="2 volumes"):
                await exports.describe("")
            assert exports.names() == ["disk", "second"]

    run(scenario())


@pytest.mark.expects_warnings
def test_a_crash_that_left_the_volume_open_at_the_store_is_tidied_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a")
            guest = await cache.guest()
            await guest.write(0, BLOCK)
            await until(lambda: not cache.has_undestaged(), "shipped")
            world.wire.cut()  # the store does not hear of the end
            await world.stop(cache)
            assert (await world.record())["open_holder"] == cache.id
            world.wire.heal()
            again = await world.cache("a")
            record = await world.record()
            while record["open_holder"] is not None:
                await asyncio.sleep(0.02)
                record = await world.record()
            assert record["dirty_holder"] is None
            assert again.volume.state is State.CLOSED

    run(scenario())


def test_a_guest_that_only_read_finds_its_cache_warm(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            first = await world.cache("a")
            guest = await first.guest()
            await guest.write(0, NOISE)
            guest.close()
            await until(lambda: first.volume.state is State.CLOSED, "given back")
            reader = await world.cache("b")
            for expected_fetches in (None, 0, 0):
                guest = await reader.guest()
                before = reader.daemon.engine.counters()["fetches"]
                assert await guest.read(0, MIB) == NOISE
                guest.close()
                await asyncio.sleep(0.05)
                fetches = reader.daemon.engine.counters()["fetches"] - before
                await world.stop(reader)
                reader = await world.cache("b")
                assert expected_fetches is None or fetches == expected_fetches

    run(scenario())


@pytest.mark.expects_warnings
def test_reads_wait_while_the_store_is_away_and_go_on_when_it_is_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a")
            guest = await cache.guest()
            world.wire.cut()
            await asyncio.sleep(0.05)
            read = asyncio.create_task(guest.read(0, 4096))
            await asyncio.sleep(0.3)
            assert not read.done()
            world.wire.heal()
            assert await read == bytes(4096)

    run(scenario())


@pytest.mark.expects_warnings
def test_a_damaged_reply_is_fetched_again_on_a_new_connection(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            first = await world.cache("a")
            guest = await first.guest()
            await guest.write(0, NOISE)
            guest.close()
            await until(lambda: first.volume.state is State.CLOSED, "given back")
            damaged: list[bytes] = []

            def damage(frame: bytes) -> bytes:
                if frame_type(frame) == lib.MP_FRAME_READ_REPLY and not damaged:
                    damaged.append(frame)
                    return frame[:-1] + bytes([frame[-1] ^ 1])
                return frame

            world.wire.to_cache = damage
            second = await world.cache("b")
            guest = await second.guest()
            assert await guest.read(0, MIB) == NOISE
            status = await status_of(second.daemon)
            assert damaged and status["checksum_errors"]["fetch"] == 1
            assert status["stores"][0]["fetch"]["connects"] == 2

    run(scenario())


@pytest.mark.expects_warnings
def test_an_open_whose_answer_got_lost_is_undone_when_nobody_tries_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a")
            lost: list[bytes] = []

            def lose(frame: bytes) -> bytes:
                if frame_type(frame) == lib.MP_FRAME_CONTROL_REPLY and b'"epoch":1' in frame:
                    lost.append(frame)
                    asyncio.get_running_loop().call_soon(world.wire.cut)
                    return b""
                return frame

            world.wire.to_cache = lose
            with pytest.raises(ExportError) as refused:
                await cache.guest()
            assert refused.value.code == "away"
            assert (await world.record())["open_holder"] == cache.id
            world.wire.to_cache = lambda frame: frame
            world.wire.heal()
            record = await world.record()
            while record["open_holder"] is not None:
                await asyncio.sleep(0.02)
                record = await world.record()
            assert cache.volume.state is State.CLOSED
            guest = await cache.guest()
            await guest.write(0, BLOCK)

    run(scenario())


def test_a_client_that_gives_up_leaves_no_volume_half_open(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a")
            for turns in range(1, 40, 3):  # cancelled at another step each time
                opening = asyncio.create_task(cache.daemon.exports.open(VOLUME))
                for _ in range(turns):
                    await asyncio.sleep(0)
                opening.cancel()
                (result,) = await asyncio.gather(opening, return_exceptions=True)
                if not isinstance(result, BaseException):
                    await result.release()  # it was faster
            await asyncio.sleep(0.1)
            await until(lambda: cache.volume.state is State.CLOSED, "given back")
            await until(lambda: not cache.volume._lock.locked(), "told to the store")
            record = await world.record()
            assert (record["open_holder"], record["dirty_holder"]) == (None, None)

    run(scenario())


def test_stop_cuts_guests_off_cleanly_and_says_shutdown(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a")
            guest = await cache.guest()
            await guest.write(0, BLOCK)
            stopping = asyncio.create_task(cache.daemon.stop())
            await asyncio.sleep(0)
            with pytest.raises(ExportError) as refused:
                await cache.daemon.exports.open(VOLUME)
            assert refused.value.code == "shutdown"
            assert await stopping
            world.caches.remove(cache)
            with pytest.raises(ConnectionLost):
                await guest.read(0, 4096)
            guest.close()
            record = await world.record()
            assert (record["open_holder"], record["dirty_holder"]) == (None, None)

    run(scenario())
