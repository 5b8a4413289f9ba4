"""A guest's connection goes on in the next process: real engines, a real store, the same socket."""

import asyncio
import random
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from cache_rig import MIB, VOLUME, Cache, Guest, World, rig, run, until
from millpond.cache import limits
from millpond.cache.exports import Agreed, ExportError
from millpond.cache.handover import HandoverError, Kept, decode, encode
from millpond.cache.limits import KIB
from millpond.cache.shaping import RateLimits
from millpond.cache.volumes import State
from millpond.nbd.wire import Command
from nbdclient import ConnectionLost, NbdClient, Negotiation, Request, request_bytes

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


def test_bytes_of_version_1() -> None:
    """Another process, of another release perhaps, has written them."""
    data = (
        b'{"version":1,"cache":"63636363636363636363636363636363","connections":[{"name":"one",'
        b'"volume":"76767676767676767676767676767676","structured":true,"allocation":false,'
        b'"read_only":true,"received":"AP8gaGFsZg==","tag":"nbd3"}]}'
    )
    assert encode(OURS, {"one": KEPT}) == data
    assert list(decode(data, OURS, {"one": 7})) == [KEPT]
    for newer in (b'{"version":2,"guests":{}}', data.replace(b"1,", b"2,", 1)):
        with pytest.raises(HandoverError, match="in version 2, not 1"):
            decode(newer, OURS, {"one": 7})
    with pytest.raises(HandoverError, match="unknown field"):
        decode(data.replace(b'"tag"', b'"extended":true,"tag"'), OURS, {"one": 7})


async def restart(world: World, cache: Cache) -> Cache:
    """As a planned restart does."""
    await cache.give_back()
    return await world.cache("a", inherits=await world.stop(cache))


async def with_all_shipped(world: World) -> tuple[Cache, Guest]:
    """A cache whose guest has written NOISE; the store has it, too."""
    cache = await world.cache("a")
    guest = await cache.guest()
    await guest.write(0, NOISE)
    goal = (await cache.volume.flush(ignore_rates=True)).last_sequence

    def arrived() -> bool:
        (status,) = cache.daemon.engine.list_volumes()
        return status.destaged_sequence >= goal and not status.has_undestaged

    await until(arrived, "all is shipped")
    return cache, guest


async def never() -> None:
    raise AssertionError("nobody else has written")


async def is_served(cache: Cache, count: int = 1) -> None:
    await until(lambda: cache.daemon.connection_count == count, f"{count} connections are served")


def test_guest_works_on_over_a_restart_and_loses_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a")
            guest = await cache.guest()
            await guest.write(0, NOISE)
            for turn in range(5):
                write = asyncio.ensure_future(guest.write(MIB, NOISE))
                await asyncio.sleep(0.001 * turn)  # somewhere in it
                cache = await restart(world, cache)
                await write
                assert await guest.read(0, 2 * MIB) == NOISE + NOISE
            guest.close()

    run(scenario())


def test_what_was_agreed_goes_on_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a")
            opened = await cache.daemon.exports.open(VOLUME)
            ours, theirs = socket.socketpair()
            theirs.setblocking(False)
            agreed = Agreed(structured=True, allocation=True)
            opened.handover(theirs, b"", agreed)
            negotiation = Negotiation(ours)
            negotiation.size_bytes = opened.export.size_bytes
            negotiation.structured = True
            client = NbdClient(ours, negotiation, timeout_s=30)
            await asyncio.to_thread(client.write, 0, NOISE)
            await restart(world, cache)
            assert await asyncio.to_thread(client.read, 0, MIB) == NOISE
            extents = await asyncio.to_thread(client.block_status, 0, 2 * MIB)
            assert extents[0][0] >= MIB and len(extents) > 1, extents
            client.close()

    run(scenario())


@pytest.mark.parametrize("closes", [False, True], ids=["holds it", "gave it back"])
@pytest.mark.expects_warnings
def test_guest_of_a_disk_that_another_host_has_written_is_ended(
    tmp_path: Path, closes: bool
) -> None:
    """It would write what it remembers over what they have written."""

    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache, guest = await with_all_shipped(world)
            await cache.give_back()
            kept = await world.stop(cache)
            assert [each.volume for each in kept] == [cache.volume.id]
            await world.take_over(and_close=closes)
            again = await world.cache("a", inherits=kept)
            with pytest.raises(ConnectionLost):
                await guest.read(0, MIB)
            guest.close()
            if closes:
                assert await (await again.guest()).read(0, MIB) == NOISE

    run(scenario())


@pytest.mark.expects_warnings
def test_volume_is_not_given_to_others_while_its_guest_waits(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache, guest = await with_all_shipped(world)
            await cache.give_back()
            kept = await world.stop(cache)
            other = await world.cache("b")
            with pytest.raises(ExportError, match="open"):
                await other.guest()
            again = await world.cache("a", inherits=kept)
            assert await guest.read(0, MIB) == NOISE
            guest.close()
            await until(lambda: again.volume.state is State.CLOSED, "its last guest has gone")
            assert await (await other.guest()).read(0, MIB) == NOISE

    run(scenario())


@pytest.mark.expects_warnings
def test_whoever_goes_on_with_a_disk_holds_it_and_is_ended_if_others_write(tmp_path: Path) -> None:
    """As a kernel device does, connected or not."""

    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache, guest = await with_all_shipped(world)
            ended = []

            async def forsaken() -> None:
                ended.append((await world.record())["epoch"])

            volume = cache.volume.id
            cache.daemon.exports.remember(volume, "me", forsaken)
            guest.close()
            await world.stop(cache)
            assert (await world.record())["open_holder"] == cache.id, "not given back"

            again = await world.cache("a")
            again.daemon.exports.remember(volume, "me", forsaken)
            (await again.guest()).close()
            assert not ended, "nobody else has written"
            await world.stop(again)

            await world.take_over(and_close=True)
            taken = (await world.record())["epoch"]
            again = await world.cache("a")
            again.daemon.exports.remember(volume, "me", forsaken)
            guest = await again.guest()
            assert ended == [taken], "before it is opened again"
            again.daemon.exports.forget(volume, "me")
            guest.close()
            await until(lambda: again.volume.state is State.CLOSED, "nobody goes on with it")

    run(scenario())


def test_volume_that_nobody_goes_on_with_any_more_is_given_back(tmp_path: Path) -> None:
    """After a crash, and without ever being opened."""

    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a")
            guest = await cache.guest()
            cache.daemon.exports.remember(cache.volume.id, "me", never)
            guest.close()
            await world.stop(cache)
            again = await world.cache("a")
            again.daemon.exports.remember(cache.volume.id, "me", never)
            await until(lambda: bool(again.volume.store_addresses), "the stores were asked")
            await asyncio.sleep(0.1)
            assert (await world.record())["open_holder"] == cache.id
            again.daemon.exports.forget(cache.volume.id, "me")
            async with asyncio.timeout(20):
                while (await world.record())["open_holder"] is not None:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)

    run(scenario())


def test_guest_that_came_again_is_served_after_what_it_left(tmp_path: Path) -> None:
    """Its old connection holds a write that nobody answered; the new one must not be overtaken."""

    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a")
            old = await cache.guest()
            await cache.give_back()
            (kept,) = await world.stop(cache)
            old.close()
            write = request_bytes(Request(1, Command.WRITE, 0, 4096, 0)) + b"1" * 4096
            again = await world.cache("a", inherits=[replace(kept, received=write)])
            new = await again.guest()  # at once: it may ask for the volume before anybody
            await new.write(0, b"2" * 4096)
            await until(lambda: not again.volume.continuing, "the old one was served")
            await is_served(again, 1)
            assert await new.read(0, 4096) == b"2" * 4096

    run(scenario())


@pytest.mark.expects_warnings
def test_restarts_while_the_store_is_away_lose_no_connection(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache, guest = await with_all_shipped(world)
            world.wire.cut()
            for _ in range(3):
                cache = await restart(world, cache)
                assert cache.daemon.connection_count == 0
            read = asyncio.ensure_future(guest.read(0, MIB))
            world.wire.heal()
            assert await read == NOISE
            guest.close()

    run(scenario())


@pytest.mark.expects_warnings
def test_guest_that_waits_for_the_store_does_not_keep_the_others_from_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection ends with the process; nothing of it is left."""
    monkeypatch.setattr(limits, "GIVE_BACK_S", 0.2)
    monkeypatch.setattr(limits, "STOP_CONNECTIONS_S", 1000.0)
    monkeypatch.setattr(limits, "STOP_RELEASE_S", 1000.0)

    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a", rates=RateLimits(64 * KIB, 64 * KIB))
            stuck, other = await cache.guest(), await cache.guest()
            await other.write(0, NOISE)
            world.wire.cut()
            read = asyncio.ensure_future(stuck.read(32 * MIB, 4096))
            await asyncio.sleep(0.05)
            await cache.give_back()
            kept = await world.stop(cache)
            assert len(kept) == 1 and cache.daemon.connection_count == 0
            with pytest.raises(ConnectionLost):
                await read
            world.wire.heal()
            await world.cache("a", inherits=kept)
            assert await other.read(0, MIB) == NOISE
            for each in (stuck, other):
                each.close()

    run(scenario())


def test_cache_that_stops_offers_nothing_new(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("a")
            await cache.give_back()
            with pytest.raises(ExportError, match="shutting down"):
                await cache.guest(VOLUME)

    run(scenario())
