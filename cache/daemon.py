"""The cache process: one engine, the stores behind it, and every volume in use.

Happy path: `CacheDaemon.start(config)` opens device and engine; inherit() what the process before
left; go() connects to the stores and takes up what a crash left behind; nbd/ serves
`daemon.exports`; `await daemon.failed` or a signal; give_back(), stop(), take_kept().

Failure modes: a task or the engine dies: one log line, `failed` is set, the caller stops and exits
with a code.  The store is away: guests that only need the cache go on, others wait.  An engine that
does not stop in time: the process ends without the clean checkpoint, as after a crash.
"""

import asyncio
import logging
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from millpond.cache import limits
from millpond.cache.chance import Chance
from millpond.cache.device import open_engine
from millpond.cache.errors import CacheError, StoreAway, escaped
from millpond.cache.events import EngineEvents
from millpond.cache.handover import Kept
from millpond.cache.links import Identity
from millpond.cache.replicas import StoreNode
from millpond.cache.scrub import Scrub, check_rate
from millpond.cache.serving import CacheExports
from millpond.cache.settings import VolumeSettings
from millpond.cache.shaping import Admission, RateLimits
from millpond.cache.stores import Found, Stores
from millpond.cache.tasks import Backoff, Tasks
from millpond.cache.volumes import Volume
from millpond.cache.world import Client, World
from millpond.native.engine import (
    ConnectionClosed,
    ConnectionLeft,
    DirtyReady,
    Engine,
    EngineFailed,
    EngineOptions,
    LinkBroken,
    NativeError,
    NeedDirty,
    Position,
    VolumeFailed,
)

log = logging.getLogger("millpond.cache")


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """What an operator decides."""

    stores: tuple[str, ...]
    host_rates: RateLimits = field(default_factory=RateLimits)
    volume_rates: RateLimits = field(default_factory=RateLimits)
    # Shares, rates and bound: of the volumes named here, and of all others.
    defaults: VolumeSettings = field(default_factory=VolumeSettings)
    volumes: Mapping[str, VolumeSettings] = field(default_factory=dict)
    name: str = "cache"
    read_only: bool = False  # every export; the volume is opened for writing all the same
    engine: EngineOptions = field(
        default_factory=lambda: EngineOptions(scrub_bytes_per_s=check_rate(None))
    )

    def settings_of(self, name: str) -> VolumeSettings:
        """What is in force for the volume of this name."""
        return self.volumes.get(name, self.defaults)


class CacheDaemon:
    """Everything of one cache but its listening sockets.  Event loop only."""

    def __init__(self, engine: Engine, config: CacheConfig, chance: Chance) -> None:
        """engine: recovered, not started.  It is the daemon's from here."""
        loop = asyncio.get_running_loop()
        self.config = config
        self.engine = engine
        self.failed: asyncio.Future[str] = loop.create_future()
        self.events = EngineEvents(engine)
        self.tasks = Tasks(lambda error: self._fail(f"{type(error).__name__}: {error}"))
        self.host = Admission(config.host_rates)
        identity = Identity(engine.cache_id, config.name)
        self.stores = Stores(
            [
                StoreNode(address, index=index, engine=engine, identity=identity)
                for index, address in enumerate(config.stores)
            ]
        )
        self.volumes: dict[bytes, Volume] = {}
        self.scrub = Scrub(self.events, self._label_of)
        self.exports = CacheExports(
            self.stores,
            self._volume_for,
            self._opened,
            lambda volume_id: self._volume(volume_id).continuing,
            self.tasks,
            read_only=config.read_only,
        )
        self._connections: dict[int, Client] = {}
        self._notify_fd: int | None = None
        self._world = World(
            engine=engine,
            events=self.events,
            chance=chance,
            tasks=self.tasks,
            host=self.host,
            volume_rates=config.volume_rates,
            settings_of=config.settings_of,
            read_only=config.read_only,
            connected=self._connected,
            stores=self.stores,
        )
        self._listen()

    @classmethod
    async def start(cls, device: str, config: CacheConfig) -> "CacheDaemon":
        """Recover the device.  Blocks while it does; raises CacheError.  go() is next."""
        engine = open_engine(device, config.engine)
        try:
            daemon = cls(engine, config, Chance())
            engine.start()
        except BaseException:
            engine.free()
            raise
        daemon.watch(engine.notify_fd())
        return daemon

    def watch(self, notify_fd: int) -> None:
        """Pump whenever the engine notifies."""
        self._notify_fd = notify_fd
        asyncio.get_running_loop().add_reader(notify_fd, self.pump)

    def inherit(self, kept: Kept) -> None:
        """Before go(): a connection of the process before goes on, before anybody else is served.

        While the store is away the guest waits, as it does for a cache that runs.
        """
        self._volume(kept.volume).continuing.add(kept)

    def go(self) -> None:
        """Connect to the stores and take up what the device remembers.

        Whoever goes on with a volume is known by now: nothing is opened or given back before.
        """
        for node in self.nodes:
            self.tasks.spawn(node.fetch.run(), f"fetch-{node.index}")
            self.tasks.spawn(node.destage.run(), f"destage-{node.index}")
        for status in self.engine.list_volumes():
            if status.has_undestaged:
                volume = self._volume(status.id)
                self.tasks.spawn(volume.resume(), f"resume-{status.id.hex()}")
        for volume in self.volumes.values():
            if volume.continuing.waiting:
                self.tasks.spawn(self._serve_inherited(volume), f"inherit-{volume.id.hex()}")
        for node in self.nodes:
            self.tasks.spawn(self._give_back_leftovers(node), f"give-back-leftovers-{node.index}")

    def pump(self) -> None:
        """The engine has events for us; an exception in here is ours and ends us."""
        try:
            if self._notify_fd is not None:
                self.engine.clear_notification()
            self.events.pump()
        except Exception as error:
            log.exception("event pump died")
            self._fail(f"{type(error).__name__}: {error}")

    @property
    def nodes(self) -> tuple[StoreNode, ...]:
        """The stores, by index."""
        return self.stores.nodes

    @property
    def connection_count(self) -> int:
        """Connections that the engine holds."""
        return len(self._connections)

    async def alive(self) -> None:
        """Returns when the engine thread has answered a question: neither it nor we are stuck.

        While stopping, which has limits of its own, it is not asked.
        """
        if self.exports.closing:
            return
        # A volume that nobody has: the answer, "unknown", costs nothing and changes nothing.
        nobody, cookie = bytes(16), self.events.new_cookie()
        await self.events.ask(Position, cookie, lambda: self.engine.position(nobody, cookie=cookie))

    # -- stop

    async def give_back(self) -> None:
        """Before stop(): between two requests, connections leave the engine for take_kept().

        What waits for too long is not among them, and ends with the stop.
        """
        self.exports.closing = True
        for volume in self.volumes.values():
            volume.begin_stop()
        for cookie in list(self._connections):
            with suppress(NativeError):  # no memory: it ends with the others
                self.engine.leave(cookie)
        await self._wait_for(self._disconnected(), limits.GIVE_BACK_S)

    def take_kept(self) -> list[Kept]:
        """After stop(): connections for the next process; their descriptors are the caller's."""
        return [kept for volume in self.volumes.values() for kept in volume.continuing.take()]

    async def stop(self) -> bool:
        """Stop serving, give back what is drained, close the device.  False: not cleanly.

        Nobody who goes on with his disk in the next process waits for the volumes of others.
        """
        self.exports.closing = True
        volumes = list(self.volumes.values())
        for volume in volumes:
            volume.disconnect_all()
        if not self.failed.done():
            hurry = any(volume.continuing for volume in volumes)
            patience_s = limits.STOP_HURRY_S if hurry else limits.STOP_CONNECTIONS_S
            await self._wait_for(self._disconnected(), patience_s)
            given_back = asyncio.gather(*(volume.stop() for volume in volumes))
            await self._wait_for(given_back, patience_s if hurry else limits.STOP_RELEASE_S)
        clean = await self._stop_engine()
        await self.tasks.cancel_all()
        for node in self.nodes:
            await node.control.close()
        if self._notify_fd is not None:
            asyncio.get_running_loop().remove_reader(self._notify_fd)
        if clean:
            self.engine.stop()
            self.engine.free()
        log.info("cache stopped clean=%s", clean)
        return clean

    async def _stop_engine(self) -> bool:
        """Let the engine finish; its last fetches still need their connections."""
        self.engine.request_stop()
        await self._wait_for(asyncio.shield(self.events.stopped), limits.STOP_ENGINE_S)
        return self.events.stopped.done()

    async def _wait_for(self, work: Awaitable[object], limit_s: float) -> None:
        try:
            async with asyncio.timeout(limit_s):
                await work
        except TimeoutError:
            log.info("stopping without waiting longer after=%gs", limit_s)

    async def _disconnected(self) -> None:
        while self._connections:
            self._connection_gone.clear()
            await self._connection_gone.wait()

    # -- volumes

    async def _serve_inherited(self, volume: Volume) -> None:
        """Open it for the connections of the process before, as soon as the stores are there."""
        backoff = Backoff()
        while volume.continuing.waiting:
            try:
                await volume.attach()
                volume.detach()
            except StoreAway:
                await backoff.wait()
            except CacheError as error:
                volume.continuing.drop(str(error), volume.label)

    def _volume(self, volume_id: bytes) -> Volume:
        volume = self.volumes.get(volume_id)
        if volume is None:
            volume = Volume(volume_id, self._world)
            self.volumes[volume_id] = volume
        return volume

    def _label_of(self, volume_id: bytes) -> str:
        volume = self.volumes.get(volume_id)
        return volume.label if volume is not None else volume_id.hex()

    def _opened(self, name: str) -> Found | None:
        every = (volume.opened for volume in self.volumes.values())
        named = [found for found in every if found is not None and found.record.name == name]
        return named[0] if len(named) == 1 else None  # of two, one was renamed

    def _volume_for(self, found: Found) -> Volume:
        volume = self._volume(found.record.volume_id)
        volume.lives(found)
        return volume

    async def find(self, name: str) -> Volume:
        """A volume in use here, by name or id; another one that a store has is not dirty here."""
        for volume in self.volumes.values():
            if name in (volume.id.hex(), volume.record.name if volume.record else ""):
                return volume
        return self._volume_for(await self.exports.look_up(name))

    def _connected(self, cookie: int, client: Client) -> None:
        self._connections[cookie] = client

    async def _give_back_leftovers(self, node: StoreNode) -> None:
        """Volumes that a crash left open at a store, without anything of ours to ship."""
        backoff = Backoff()
        while True:
            try:
                records = await node.list()
                break
            except CacheError as error:
                if backoff.is_first:
                    log.warning(
                        "waiting for a store store=%s reason=%s",
                        escaped(node.address),
                        escaped(str(error)),
                    )
                await backoff.wait()
        ours = self.engine.cache_id.hex()
        for record in records:
            if record.open_holder == ours:
                try:
                    await self._volume_for(Found(record, node)).give_back_leftover(record)
                except CacheError as error:  # this volume's trouble, on two stores, say
                    log.error(
                        "cannot give back volume=%s store=%s reason=%s",
                        escaped(record.name),
                        escaped(node.address),
                        escaped(str(error)),
                    )

    # -- news from the engine

    def _listen(self) -> None:
        self._connection_gone = asyncio.Event()
        self.events.on(NeedDirty, lambda event: self._volume(event.volume).need_dirty())
        self.events.on(DirtyReady, lambda event: self._volume(event.volume).dirty_ready())
        self.events.on(
            VolumeFailed,
            lambda event: self._volume(event.volume).fail(
                event.message or f"engine error {event.status}"
            ),
        )
        self.events.on(ConnectionClosed, self._on_connection_closed)
        self.events.on(ConnectionLeft, self._on_connection_left)
        self.events.on(LinkBroken, self._on_link_broken)
        self.events.on(EngineFailed, lambda event: self._fail(f"engine: {event.message}"))

    def _on_link_broken(self, event: LinkBroken) -> None:
        self.nodes[event.cookie >> 32].fetch.broken(event)

    def _on_connection_closed(self, event: ConnectionClosed) -> None:
        client = self._connections.pop(event.cookie, None)
        if client is not None:
            client.volume.connection_closed(event.cookie)
            if event.status == 1:
                client.owner.disconnected()
            client.owner.closed()
        self._connection_gone.set()

    def _on_connection_left(self, event: ConnectionLeft) -> None:
        fd, received = self.engine.take_left(event.cookie, event.bytes_count)
        client = self._connections.pop(event.cookie)
        client.volume.continuing.add(
            Kept(fd, client.volume.id, client.agreed, received=received, tag=client.owner.tag)
        )
        client.volume.connection_closed(event.cookie)
        self._connection_gone.set()

    def _fail(self, reason: str) -> None:
        if not self.failed.done():
            log.error("cache failed reason=%s", escaped(reason))
            self.failed.set_result(reason)
