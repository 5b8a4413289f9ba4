"""One cache, several stores: each volume is found where it lives, and waits for nobody else's."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import store_daemon
from cache_rig import CACHE_BYTES, MIB, SIZE_BYTES, Cache, Wire, run, until
from millpond.cache import limits
from millpond.cache.chance import Chance
from millpond.cache.daemon import CacheConfig, CacheDaemon
from millpond.cache.device import format_cache
from millpond.cache.errors import CacheError
from millpond.cache.exports import ExportError
from millpond.cache.links import Identity
from millpond.cache.replicas import StoreNode
from millpond.cache.status import volumes_of
from millpond.cache.stores import Stores as Known
from millpond.cache.volumes import State


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle times of a test."""
    monkeypatch.setattr(limits, "RELEASE_IDLE_S", 0.1)
    monkeypatch.setattr(limits, "DIRTY_IDLE_S", 0.3)
    monkeypatch.setattr(limits, "GATHER_S", 0.02)
    monkeypatch.setattr(limits, "STORES_GRACE_S", 0.05)
    monkeypatch.setattr(limits, "STOP_RELEASE_S", 0.5)


class Stores:
    """Two stores, "left" and "right", each behind a wire, and caches on one device."""

    def __init__(self, directory: Path, wires: dict[str, Wire], clients: dict[str, Any]) -> None:
        self.directory = directory
        self.wires = wires
        self.clients = clients
        self.caches: list[Cache] = []

    async def create(self, side: str, name: str) -> dict[str, Any]:
        reply = await self.clients[side].call("volume.create", name=name, size_bytes=SIZE_BYTES)
        volume: dict[str, Any] = reply["volume"]
        return volume

    async def cache(self) -> Cache:
        device = self.directory / "device"
        if not device.exists():
            format_cache(str(device), size_bytes=CACHE_BYTES, chance=Chance())
        config = CacheConfig(stores=tuple(wire.address for wire in self.wires.values()))
        cache = Cache(await CacheDaemon.start(str(device), config), device)
        cache.daemon.go()
        self.caches.append(cache)
        return cache

    async def stop(self, cache: Cache) -> None:
        self.caches.remove(cache)
        await cache.stop()


@contextlib.asynccontextmanager
async def two_stores(directory: Path) -> AsyncIterator[Stores]:
    async with contextlib.AsyncExitStack() as stack:
        wires, clients = {}, {}
        for side in ("left", "right"):
            (directory / side).mkdir()
            store = await stack.enter_async_context(store_daemon.running(directory / side))
            clients[side] = await store.client()
            stack.push_async_callback(clients[side].close)
            wires[side] = Wire(directory / f"{side}.wire", store.daemon.addresses[0].path)
            await wires[side].start()
            stack.push_async_callback(wires[side].stop)
        stores = Stores(directory, wires, clients)
        try:
            yield stores
        finally:
            for wire in wires.values():
                wire.heal()
            for cache in list(stores.caches):
                await stores.stop(cache)


def test_each_volume_is_shipped_to_and_read_from_the_store_that_has_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two_stores(tmp_path) as stores:
            for side in ("left", "right"):
                await stores.create(side, f"on-{side}")
            cache = await stores.cache()
            for side in ("left", "right"):
                guest = await cache.guest(f"on-{side}")
                await guest.write(0, side.encode() * MIB)
                await guest.flush()
                guest.close()
            await until(lambda: not cache.has_undestaged(), "shipped")
            places = {each["name"]: each["stores"] for each in volumes_of(cache.daemon)}
            assert places == {
                f"on-{side}": [stores.wires[side].address] for side in ("left", "right")
            }
            await stores.stop(cache)
            cache.device.unlink()  # an empty cache: every block comes from its store
            cache = await stores.cache()
            for side in ("left", "right"):
                guest = await cache.guest(f"on-{side}")
                length = len(side) * 1024
                assert await guest.read(0, length) == side.encode() * 1024

    run(scenario())


@pytest.mark.expects_warnings
def test_a_volume_opens_writes_and_misses_while_the_other_store_is_away(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two_stores(tmp_path) as stores:
            for side in ("left", "right"):
                await stores.create(side, f"on-{side}")
            cache = await stores.cache()
            left = await cache.guest("on-left")
            stores.wires["left"].cut()
            missing = left.client  # a miss that nobody answers, and stays behind
            missing.submit_read(8 * MIB, 4096)
            right = await cache.guest("on-right")
            await right.write(0, b"r" * MIB)
            await right.flush()
            assert await right.read(16 * MIB, MIB) == bytes(MIB)
            volume = next(
                each
                for each in cache.daemon.volumes.values()
                if each.record is not None and each.record.name == "on-right"
            )
            await until(lambda: volume._drained, "shipped past the store that is away")
            with pytest.raises(ExportError) as refused:
                await cache.guest("nowhere")
            assert refused.value.code == "away", "it may be on the store that is away"
            stores.wires["left"].heal()

    run(scenario())


def test_a_name_on_two_stores_is_refused_and_both_are_named(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two_stores(tmp_path) as stores:
            for side in ("left", "right"):
                await stores.create(side, "twin")
            cache = await stores.cache()
            with pytest.raises(ExportError) as refused:
                await cache.guest("twin")
            for wire in stores.wires.values():
                assert wire.address in refused.value.message

    run(scenario())


@pytest.mark.expects_warnings
def test_a_name_is_not_taken_from_another_store_while_its_own_is_away(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two_stores(tmp_path) as stores:
            await stores.create("left", "disk")
            cache = await stores.cache()
            guest = await cache.guest("disk")
            guest.close()
            await until(lambda: cache.volume.state is State.CLOSED, "given back")
            await stores.create("right", "disk")
            stores.wires["left"].cut()
            with pytest.raises(CacheError):  # only the other one answers: no reason to move
                await cache.daemon.stores.list()
            with pytest.raises(ExportError) as refused:
                await cache.guest("disk")
            assert stores.wires["left"].address in refused.value.message

    run(scenario())


@pytest.mark.expects_warnings
def test_a_volume_that_is_open_takes_more_guests_while_any_store_is_away(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two_stores(tmp_path) as stores:
            await stores.create("left", "disk")
            cache = await stores.cache()
            guest = await cache.guest("disk")
            await guest.write(0, b"x" * 4096)
            for side in ("right", "left"):
                stores.wires[side].cut()
                again = await cache.guest("disk")
                assert await again.read(0, 4096) == b"x" * 4096
            stores.wires["left"].heal()

    run(scenario())


@pytest.mark.expects_warnings
def test_a_renamed_volume_is_no_longer_served_by_its_old_name(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two_stores(tmp_path) as stores:
            await stores.create("left", "old")
            cache = await stores.cache()
            await cache.guest("old")
            await stores.clients["left"].call("volume.rename", name="old", new_name="new")
            await stores.create("right", "old")
            other = await cache.guest("old")
            await other.write(0, b"o" * 4096)
            again = await cache.guest("new")
            assert await again.read(0, 4096) == bytes(4096)

    run(scenario())


@pytest.mark.expects_warnings
def test_dirty_writes_find_their_store_after_a_restart(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two_stores(tmp_path) as stores:
            await stores.create("right", "disk")
            cache = await stores.cache()
            guest = await cache.guest("disk")
            await guest.write(0, b"x" * 4096)
            await until(lambda: not cache.has_undestaged(), "dirty is on record")
            stores.wires["right"].cut()
            await guest.write(4096, b"y" * 4096)
            await guest.flush()
            await stores.stop(cache)
            cache = await stores.cache()
            assert cache.has_undestaged()
            stores.wires["right"].heal()
            await until(lambda: not cache.has_undestaged(), "shipped by whoever has it")

    run(scenario())


def test_the_same_store_twice_is_refused() -> None:
    async def scenario() -> None:
        with pytest.raises(CacheError, match="given twice"):
            identity = Identity(bytes(16), "x")
            engine: Any = None
            Known([StoreNode("a:1", index=i, engine=engine, identity=identity) for i in (0, 1)])

    run(scenario())
