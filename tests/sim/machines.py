"""The machines of a simulated site: hypervisors with the shipped cache daemon, a box with a store.

The C core runs on the simulated driver, the control plane on the simulated loop; the daemons are
the shipped ones, with their NBD server, their links and their catalogue.  A machine's disk outlives
its processes.
Happy path: start(); step() in each turn; stop(), or fall() and start() again.
Failure modes: has_fallen after a simulated crash, or when the daemon gave up; start() raises
CannotStart, with the daemon's own line.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from millpond.cache.chance import Chance
from millpond.cache.daemon import CacheConfig, CacheDaemon
from millpond.cache.handover import HandoverError, decode, encode
from millpond.native import ffi, lib
from millpond.native.drivers import Sim, SimOptions, destroy
from millpond.native.engine import Engine, EngineOptions, NativeError, VolumeStatus
from millpond.native.record import encode_frame
from millpond.native.store import StoreCore, StoreOpenError, StoreOptions, VolumeState, format_store
from millpond.nbd.server import NbdServer
from millpond.store.address import parse_address
from millpond.store.daemon import StoreDaemon
from millpond.store.link import OWN_CONNECTION
from sim.loop import SimLoop
from sim.network import Network
from sim.nodes import DEVICE_BYTES, SEGMENT_BYTES, SEGMENTS, SLOT_BYTES, STORE_ID
from sim.process import Process
from sim.reader import ImageReader

STEPS_MAX = 64  # of a core in one turn of the world
RANDOM_BYTES = Callable[[int], bytes]


class CannotStart(Exception):
    """What the daemon would say, and exit."""


class _Engine(Engine):
    """Sockets that are handed over come from the simulated network."""

    network: Network
    sim: Sim
    confirmed: Callable[[bytes, int], None]

    def take_left(self, cookie: int, bytes_count: int) -> tuple[int, bytes]:
        number, received = super().take_left(cookie, bytes_count)
        return self.network.keep(self.sim, number), received

    def destaged(self, volume: bytes, sequence: int) -> None:
        super().destaged(volume, sequence)
        self.confirmed(volume, sequence)

    def connect(self, volume: bytes, fd: int, **options: Any) -> None:
        super().connect(volume, self.network.adopt(fd, self.sim), **options)

    def fetch_open(self, store: int, fd: int, **options: Any) -> None:
        super().fetch_open(store, self.network.adopt(fd, self.sim), **options)


class _Core(StoreCore):
    """The same for a store; the world is its thread."""

    network: Network
    sim: Sim

    def start(self) -> None:
        """The world steps."""

    def connect(self, connection: int, fd: int, **options: Any) -> None:
        super().connect(connection, self.network.adopt(fd, self.sim), **options)


class Machine:
    """What both have: a disk, and a process while it is up."""

    def __init__(self, name: str, loop: SimLoop, network: Network, sim: Sim) -> None:
        self.name = name
        self.loop = loop
        self.network = network
        self.sim = sim
        self.lives = 0
        self.process = Process(name)
        self.process.is_dead = True
        self.faults = SimOptions()  # what the disk does wrong, in this life
        self.latency_ns = 0

    @property
    def is_up(self) -> bool:
        """It runs."""
        return not self.process.is_dead

    @property
    def has_fallen(self) -> bool:
        """Its disk's crash came, or its daemon gave up."""
        return self.is_up and (self.sim.crashed or self.gave_up)

    @property
    def gave_up(self) -> bool:
        """The daemon would exit."""
        raise NotImplementedError

    def set_faults(self, **changes: Any) -> None:
        """What goes wrong from here on."""
        self.faults = replace(self.faults, seed=self.faults.seed + 1000, **changes)
        self.sim.set(self.faults)

    def no_faults(self) -> None:
        """The disk is well."""
        seed = self.faults.seed + 1
        self.faults = SimOptions(seed=seed, latency_ns=self.latency_ns, reorder=True)
        self.sim.set(self.faults)

    def catch_up(self, now_ns: int, core_step: Callable[[int], int]) -> None:
        """Steps until its clock is the world's."""
        if self.process.held_until_ns > now_ns:
            return
        for _ in range(STEPS_MAX):
            if self.sim.now_ns >= now_ns:
                return
            if core_step(now_ns - self.sim.now_ns) < 0 or self.sim.crashed:
                return
        self.sim.advance_ns(max(0, now_ns - self.sim.now_ns))

    async def fall(self, *, power: bool) -> None:
        """The process ends; with power: the machine."""
        if power and not self.sim.crashed:
            self.sim.set(replace(self.faults, lose_unsynced=True, crash_after_io=0))
        self.sim.crash()
        self.network.kill(self.process)
        await self.process.kill()
        self.free()
        self.no_faults()

    def free(self) -> None:
        """Give the core back."""
        raise NotImplementedError

    async def start(self) -> None:
        """A new process on the disk as it is.  CannotStart."""
        raise NotImplementedError

    def step(self, now_ns: int) -> None:
        """The core's turn, and its news to the control plane."""
        raise NotImplementedError

    def begin_life(self) -> None:
        """A new process."""
        self.lives += 1
        self.process = Process(f"{self.name} {self.lives}")


class Host(Machine):
    """A hypervisor: cache device and daemon."""

    def __init__(
        self,
        name: str,
        loop: SimLoop,
        network: Network,
        *,
        token_bytes: RANDOM_BYTES,
        store_address: str,
        nbd_address: str,
        confirmed: Callable[[bytes, int], None],
        options: EngineOptions,
    ) -> None:
        super().__init__(name, loop, network, Sim(SimOptions(device_bytes=DEVICE_BYTES)))
        self.nbd_address = nbd_address
        self._chance = Chance(token_bytes)
        self._config = CacheConfig(stores=(store_address,), name=name)
        self._options = options
        self._confirmed = confirmed  # volume, sequence: the store has it
        self.daemon: CacheDaemon | None = None
        self._server: NbdServer | None = None
        self._kept: tuple[bytes, dict[str, int]] | None = None  # as systemd has them
        self.format()

    def format(self) -> None:
        """A new device."""
        self.sim.set(SimOptions())
        driver = self.sim.driver()
        chosen = ffi.new("struct mp_cache_format_options *")
        chosen.device_bytes, chosen.slot_bytes = DEVICE_BYTES, SLOT_BYTES
        chosen.log_bytes, chosen.segment_bytes = SEGMENTS * SEGMENT_BYTES, SEGMENT_BYTES
        chosen.cache_id = self._chance.new_id()
        message = ffi.new("char[]", 256)
        result = lib.mp_cache_format(driver, chosen, ffi.NULL, message, 256)
        assert result == 0, ffi.string(message)
        destroy(driver)

    @property
    def gave_up(self) -> bool:
        return self.daemon is not None and self.daemon.failed.done()

    @property
    def engine(self) -> Engine:
        """Of the running daemon."""
        assert self.daemon is not None
        return self.daemon.engine

    def known(self, volume: bytes) -> VolumeStatus | None:
        """What the engine publishes of a volume."""
        volumes = [] if self.is_freed else self.engine.list_volumes()
        return next((status for status in volumes if status.id == volume), None)

    async def start(self) -> None:
        """As `millpond cache run`.  CannotStart."""
        self.begin_life()
        driver = self.sim.driver()
        try:
            engine = cast(_Engine, _Engine.open_driver(driver, self._options))
        except NativeError as error:
            destroy(driver)
            self.process.is_dead = True
            raise CannotStart(error.args[1], error.errno) from error
        engine.network, engine.sim, engine.confirmed = self.network, self.sim, self._confirmed
        self.process.run(self._serve, engine)

    def _serve(self, engine: Engine) -> None:
        self.daemon = CacheDaemon(engine, self._config, self._chance)
        self._inherit(self.daemon)
        self.daemon.go()
        self._server = NbdServer(self.daemon.exports)
        listener = self.network.listen(self.nbd_address, self.process)
        self._server.serve_socket(cast(Any, listener))

    def step(self, now_ns: int) -> None:
        """The engine's turn, and its news to the control plane."""
        if not self.is_up or self.daemon is None or self.is_freed or self.sim.crashed:
            return
        self.catch_up(now_ns, self.daemon.engine.step)
        if self.sim.notified() and self.process.held_until_ns <= now_ns:
            self.process.run(self.daemon.pump)

    async def stop(self) -> bool:
        """As on SIGTERM."""
        daemon, server = self.daemon, self._server
        assert daemon is not None and server is not None
        work = self.process.run(lambda: self.loop.create_task(self._stop(daemon, server)))
        return await work

    async def _stop(self, daemon: CacheDaemon, server: NbdServer) -> bool:
        await server.close()
        return await daemon.stop()

    async def restart(self) -> int:
        """As systemctl restart, to its end: guests stay with their connections; how many."""
        daemon, server = self.daemon, self._server
        assert daemon is not None and server is not None
        work = self.process.run(lambda: self.loop.create_task(self._give_back(daemon, server)))
        await work
        return len(self._kept[1]) if self._kept is not None else 0

    async def _give_back(self, daemon: CacheDaemon, server: NbdServer) -> None:
        cache_id = daemon.engine.cache_id
        await server.close()
        await daemon.give_back()
        await daemon.stop()
        named = {str(number): kept for number, kept in enumerate(daemon.take_kept())}
        if named:
            self._kept = encode(cache_id, named), {name: each.fd for name, each in named.items()}

    def _inherit(self, daemon: CacheDaemon) -> None:
        kept, self._kept = self._kept, None
        if kept is None:
            return
        data, descriptors = kept
        for fd in descriptors.values():
            self.network.give(fd, self.process)
        try:
            for each in decode(data, daemon.engine.cache_id, descriptors):
                daemon.inherit(each)
        except HandoverError:  # another device took the place of theirs
            for fd in descriptors.values():
                self.network.drop(fd)

    def free_kept(self) -> None:
        """Those that nobody goes on with."""
        kept, self._kept = self._kept, None
        for fd in kept[1].values() if kept is not None else ():
            self.network.drop(fd)

    def free(self) -> None:
        if self.daemon is not None:
            for each in self.daemon.take_kept():  # it died before it served them
                os.close(each.fd)
        daemon, self.daemon = self.daemon, None
        if daemon is not None and daemon.engine._engine != ffi.NULL:
            daemon.engine.free()

    @property
    def is_freed(self) -> bool:
        """The daemon has stopped, cleanly."""
        return self.daemon is None or self.daemon.engine._engine == ffi.NULL


class _OpenStore:
    """What StoreDaemon needs of store.directory.OpenStore."""

    def __init__(self, core: StoreCore, notify_fd: int) -> None:
        self.core = core
        self.notify_fd = notify_fd
        self.store_id = STORE_ID

    def close(self) -> None:
        """Stop cleanly; the machine frees it."""
        if self.core.failure() is None:
            self.core.stop()


class Box(Machine):
    """A box with a store."""

    def __init__(self, loop: SimLoop, network: Network, *, address: str, options: StoreOptions):
        super().__init__("store", loop, network, Sim(SimOptions()))
        self.address = address
        self._options = options
        self._driver: Any = None
        self.daemon: StoreDaemon | None = None
        self._notify_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        driver = self.sim.driver()
        format_store(driver, STORE_ID, segment_bytes=options.segment_bytes)
        destroy(driver)

    def create(self, *states: VolumeState) -> None:
        """New volumes, before the first start: with ids that are not chance's."""
        driver = self.sim.driver()
        core = StoreCore.open(driver, self._options)
        for number, state in enumerate(states, start=1):
            frame = encode_frame(lib.MP_FRAME_PUT_VOLUME, state.encode(), request_id=number)
            core.feed(OWN_CONNECTION, frame)
            while not core.take(OWN_CONNECTION):
                core.step(1_000_000)
        core.stop()
        core.close()
        destroy(driver)

    @property
    def gave_up(self) -> bool:
        return self.daemon is not None and self.daemon.failure is not None

    @property
    def core(self) -> StoreCore:
        """Of the running daemon."""
        assert self.daemon is not None
        return self.daemon.core

    async def start(self) -> None:
        """As `millpond store run`.  CannotStart."""
        self.begin_life()
        self._driver = self.sim.driver()
        try:
            core = cast(_Core, _Core.open(self._driver, self._options))
        except StoreOpenError as error:
            destroy(self._driver)
            self._driver = None
            self.process.is_dead = True
            raise CannotStart(str(error), error.errno) from error
        core.network, core.sim = self.network, self.sim
        opened = cast(Any, _OpenStore(core, self._notify_fd))
        self.daemon = self.process.run(StoreDaemon, "/simulated", opened)
        self.process.run(self.daemon.link.start)

    async def listen(self) -> None:
        """Let caches in."""
        daemon = self.daemon
        assert daemon is not None
        work = daemon.listen([parse_address(self.address)])
        await self.process.run(lambda: self.loop.create_task(work))

    def step(self, now_ns: int) -> None:
        """The core's turn, and its news to the control plane."""
        if not self.is_up or self.daemon is None or self.sim.crashed:
            return
        self.catch_up(now_ns, self.daemon.core.step)
        if self.sim.notified() and self.process.held_until_ns <= now_ns:
            self.loop.notify(self._notify_fd)

    def reader(self) -> ImageReader:
        """The store's image, read as a cache would."""
        assert self.daemon is not None
        return ImageReader(self.daemon.link, self.daemon.core)

    async def stop(self) -> None:
        """As on SIGTERM."""
        daemon = self.daemon
        assert daemon is not None
        await self.process.run(lambda: self.loop.create_task(daemon.close()))

    def free(self) -> None:
        daemon, self.daemon = self.daemon, None
        if daemon is not None:
            daemon.core.close()
        if self._driver is not None:
            destroy(self._driver)
            self._driver = None

    def give_back(self) -> None:
        """After the last life."""
        os.close(self._notify_fd)
