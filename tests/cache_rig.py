"""A real store, real caches on real files, guests on socket pairs, and a wire that can misbehave.

    async with rig(tmp_path) as world:
        cache = await world.cache("a")
        guest = await cache.guest()
        await guest.write(0, b"x" * 4096)

The wire stands between a cache and the store, knows where frames begin, and may hold, drop or
change them.  Everything runs on uvloop; a guest's blocking calls run in a thread of their own.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import uvloop

import store_daemon
from millpond.cache.chance import Chance
from millpond.cache.daemon import CacheConfig, CacheDaemon
from millpond.cache.device import format_cache
from millpond.cache.exports import Agreed
from millpond.cache.handover import Kept
from millpond.cache.shaping import RateLimits
from millpond.cache.volumes import Volume
from millpond.native import ffi, lib
from millpond.native.engine import EngineOptions
from millpond.store.client import StoreClient
from nbdclient import NbdClient, Negotiation

MIB = 1024 * 1024
VOLUME = "disk"
SIZE_BYTES = 64 * MIB
CACHE_BYTES = 256 * MIB

# A frame on its way to a cache: what to send instead (b"" drops it).
Filter = Callable[[bytes], bytes]


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Run a scenario, bounded against hanging for ever."""

    async def bounded() -> None:
        async with asyncio.timeout(90):
            await scenario

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(bounded())


async def until(true: Callable[[], bool], what: str, limit_s: float = 20.0) -> None:
    """Wait until something is true; tests may poll."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            while not true():  # noqa: ASYNC110  # what it looks at is C and has no event
                await asyncio.sleep(0.01)
    assert true(), f"never happened: {what}"


class Guest:
    """A client in its transmission phase; blocking calls, in a thread."""

    def __init__(self, sock: socket.socket, size_bytes: int) -> None:
        negotiation = Negotiation(sock)
        negotiation.size_bytes = size_bytes
        self.client = NbdClient(sock, negotiation, timeout_s=30)

    async def write(self, offset: int, payload: bytes, *, fua: bool = False) -> None:
        await asyncio.to_thread(self.client.write, offset, payload, fua=fua)

    async def read(self, offset: int, length_bytes: int) -> bytes:
        return await asyncio.to_thread(self.client.read, offset, length_bytes)

    async def flush(self) -> None:
        await asyncio.to_thread(self.client.flush)

    def close(self) -> None:
        self.client.close()


class Cache:
    """A running cache daemon on its own device."""

    def __init__(self, daemon: CacheDaemon, device: Path) -> None:
        self.daemon = daemon
        self.device = device
        self._guests: list[Guest] = []

    @property
    def volume(self) -> Volume:
        (volume,) = self.daemon.volumes.values()
        return volume

    @property
    def id(self) -> str:
        return self.daemon.engine.cache_id.hex()

    def dirty_bytes(self) -> int:
        return sum(status.dirty_bytes for status in self.daemon.engine.list_volumes())

    def has_undestaged(self) -> bool:
        return any(status.has_undestaged for status in self.daemon.engine.list_volumes())

    async def guest(self, name: str = VOLUME) -> Guest:
        """A client that the engine serves; ExportError when the cache refuses."""
        opened = await self.daemon.exports.open(name)
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        opened.handover(theirs, b"", Agreed())
        guest = Guest(ours, opened.export.size_bytes)
        self._guests.append(guest)
        return guest

    async def give_back(self) -> None:
        """As before a planned restart: its guests stay with their sockets."""
        self._guests.clear()
        await self.daemon.give_back()

    async def stop(self) -> None:
        for guest in self._guests:
            guest.close()
        assert await self.daemon.stop()


class Wire:
    """A unix socket in front of the store's."""

    def __init__(self, path: Path, store_path: str) -> None:
        self.address = f"unix:{path}"
        self.to_cache: Filter = lambda frame: frame
        self.sent: list[tuple[float, int]] = []  # (time, bytes) of what caches sent
        self.refusing = False
        self._path = str(path)
        self._store_path = store_path
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._accepted, self._path)

    def cut(self) -> None:
        """Every connection ends, new ones do too."""
        self.refusing = True
        for writer in self._writers:
            writer.transport.abort()

    def heal(self) -> None:
        self.refusing = False

    async def stop(self) -> None:
        self.cut()
        if self._server is not None:
            self._server.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            writer.transport.abort()
            return
        up, down = await asyncio.open_unix_connection(self._store_path)
        self._writers |= {writer, down}
        for work in (self._forward(reader, down), self._filter(up, writer)):
            task = asyncio.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while data := await reader.read(MIB):
                self.sent.append((loop.time(), len(data)))
                writer.write(data)
                await writer.drain()
        self._end(writer)

    async def _filter(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                header = await reader.readexactly(64)
                payload = await reader.readexactly(int.from_bytes(header[16:20], "little"))
                writer.write(self.to_cache(header + payload))
                await writer.drain()
        self._end(writer)

    def _end(self, writer: asyncio.StreamWriter) -> None:
        self._writers.discard(writer)
        writer.transport.abort()


def frame_type(frame: bytes) -> int:
    """enum mp_frame_type."""
    return int.from_bytes(frame[6:8], "little")


def with_status(frame: bytes, status: int) -> bytes:
    """The same reply with another status."""
    changed = bytearray(frame)
    header = ffi.cast("struct mp_frame *", ffi.from_buffer(changed))
    header.status = status
    lib.mp_frame_seal(header)
    return bytes(changed)


class World:
    """One store, its wire, and any number of caches."""

    def __init__(self, directory: Path, store: store_daemon.Running, wire: Wire) -> None:
        self.directory = directory
        self.store = store
        self.wire = wire
        self.caches: list[Cache] = []

    async def cache(
        self,
        name: str,
        *,
        rates: RateLimits | None = None,
        through_wire: bool = True,
        engine: EngineOptions | None = None,
        inherits: Sequence[Kept] = (),
    ) -> Cache:
        """Start the cache of this name; its device is formatted the first time."""
        device = self.directory / f"{name}.cache"
        if not device.exists():
            format_cache(str(device), size_bytes=CACHE_BYTES, chance=Chance())
        config = CacheConfig(
            stores=(self.wire.address if through_wire else self.store.address,),
            host_rates=rates or RateLimits(),
            name=name,
            engine=engine or EngineOptions(),
        )
        cache = Cache(await CacheDaemon.start(str(device), config), device)
        for kept in inherits:
            cache.daemon.inherit(kept)
        cache.daemon.go()
        self.caches.append(cache)
        return cache

    async def stop(self, cache: Cache) -> list[Kept]:
        """What a manager would keep for the next process."""
        self.caches.remove(cache)
        await cache.stop()
        return cache.daemon.take_kept()

    async def client(self) -> StoreClient:
        return await self.store.client(Chance().new_id())

    async def record(self) -> dict[str, Any]:
        """The volume on the store's record."""
        client = await self.client()
        try:
            volume: dict[str, Any] = (await client.call("volume.show", name=VOLUME))["volume"]
            return volume
        finally:
            await client.close()

    async def take_over(self, *, and_close: bool = False) -> None:
        """Another cache opens the volume, accepting the loss."""
        record = await self.record()
        client = await self.client()
        other = Chance().new_id().hex()
        await client.call(
            "volume.open",
            id=record["id"],
            cache_id=other,
            lineage=Chance().new_lineage(),
            first_sequence=None,
            expected_epoch=record["epoch"],
            accept_loss=True,
        )
        if and_close:
            await client.call(
                "volume.close", id=record["id"], epoch=record["epoch"] + 1, cache_id=other
            )
        await client.close()


@contextlib.asynccontextmanager
async def rig(directory: Path) -> AsyncIterator[World]:
    """A store with one volume, and a wire to it."""
    (directory / "store").mkdir()
    async with store_daemon.running(directory / "store") as store:
        client = await store.client()
        await client.call("volume.create", name=VOLUME, size_bytes=SIZE_BYTES)
        await client.close()
        wire = Wire(directory / "wire.sock", store.daemon.addresses[0].path)
        await wire.start()
        world = World(directory, store, wire)
        try:
            yield world
        finally:
            wire.heal()
            wire.to_cache = lambda frame: frame
            for cache in list(world.caches):
                await world.stop(cache)
            await wire.stop()
