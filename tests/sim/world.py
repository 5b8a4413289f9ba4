"""The simulated world: a guest, a cache, a store, and a small control plane between them.

Everything follows from Settings: who steps next, how streams are cut into pieces, when destage
runs.  The rules of opening are the real ones (cache/positions.py, store/catalogue.py); what is
simulated is the asyncio around them.

Happy path: run() opens the volume, lets the guest do its history, destages all of it, and compares
the store's image with the model.  When a disk crashes (Settings.cut) what is left of both machines
comes up again: the store's image must be an exact earlier state of the disk, the cache must show
what was promised, and the guest goes on for a while.
Failure modes: Illegal.  Nothing that a core refuses or fails is expected here.
"""

import errno
import random
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from millpond.cache import positions
from millpond.cache.errors import VolumeRefused
from millpond.cache.replicas import VolumeRecord
from millpond.native import ffi, lib, record
from millpond.native.drivers import SimOptions
from millpond.native.engine import (
    Batch,
    DirtyClear,
    DirtyReady,
    EngineFailed,
    EngineOptions,
    Event,
    LinkBroken,
    NeedDirty,
    Opened,
    Stopped,
    VolumeFailed,
    VolumeStatus,
)
from millpond.native.store import StoreOptions, VolumeState
from millpond.store.catalogue import Catalogue
from millpond.store.wire import Frame
from sim.guest import Guest, read_image
from sim.history import BLOCK, KIB, Kind, Op, make_history
from sim.nodes import CACHE_ID, MIB, CacheNode, FetchSocket, Pipe, StoreNode, WorldEnded
from sim.oracle import Disk, Illegal, Mutation, always, is_acknowledged, is_durable, never
from sim.settings import Settings

T = TypeVar("T")
Promise = Callable[[Mutation], bool]
VOLUME = b"volume of a test"
TURNS_MAX = 60_000
OUTAGE_TURNS = 40  # how long the guest goes on alone, at most
PAUSE_NS = 60_000_000  # long enough for a record that tells of a sync


class Door:
    """What store/catalogue.py needs of a core: frames on connection 0."""

    def __init__(self, world: "World") -> None:
        self._world = world

    async def request(self, frame_type: int, payload: bytes) -> Frame:
        """One frame and its reply; meanwhile the world goes on."""
        store = self._world.store
        request = store.send(frame_type, payload)
        for _ in range(TURNS_MAX):
            if request in store.replies:
                return store.replies.pop(request)
            self._world.step()
        raise Illegal("the store does not answer its daemon")

    def volume(self, volume_id: bytes) -> VolumeState | None:
        """Committed state, None when unknown."""
        return self._world.store.core.volume(volume_id)

    def volumes(self) -> list[VolumeState]:
        """Committed states of all volumes."""
        return self._world.store.core.volumes()


class World:
    """See the module."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.rng = random.Random(f"world {settings.seed}")
        self.disk = Disk(settings.shape.blocks)
        self.guest = Guest(
            self.disk, make_history(settings.seed, settings.shape), depth=settings.depth
        )
        self.guest.acknowledged = self._check_dirty_on_record
        self.cache_id = CACHE_ID
        self.cache = self._make_cache()
        self.store = StoreNode(
            StoreOptions(
                segment_bytes=MIB,
                checkpoint_every_bytes=MIB,
                test_faults=settings.store_faults,
            )
        )
        self.falls = 0
        self.confirmed = 0  # sequence the store has acknowledged
        self.epoch = 0  # of our last open
        self.opened = False  # else a fall of either machine begins it all again
        self.created = self.dirty_recorded = self.need_dirty = False
        self.eagerness = 0.2  # of destage, per turn
        self._want_cut = self._cutting = self._clearing = self._pausing = False
        self._batch: bytes | None = None
        self._stale: bytes | None = None  # a batch that is late: its writer is gone
        self._link = 2  # connections at the store: fetch, destage (the next one)
        self._to_store, self._to_cache, self._batch_replies = Pipe(), Pipe(), Pipe()
        self._fetch: FetchSocket | None = None  # the engine's end of the link
        self._events: list[Event] = []
        self._promised: Promise = is_acknowledged  # what the last fall of the cache may not take
        self._loses_power: dict[str, bool] = {}
        for name in ("cache", "store"):
            self._set_options(name, settings.cut_after if name == settings.cut else 0)

    def close(self) -> None:
        """Give everything back."""
        for node in (self.cache, self.store):
            node.die()
            node.sim.close()

    def _make_cache(self) -> CacheNode:
        settings = self.settings
        options = EngineOptions(
            checkpoint_every_bytes=settings.checkpoint_bytes,
            scrub_bytes_per_s=settings.scrub_bytes_per_s,
            scrub_patience_ns=1,  # not in these worlds: everything beside it
            test_faults=settings.engine_faults,
        )
        return CacheNode(options, self.cache_id)

    def _set_options(self, name: str, crash_after_io: int) -> None:
        settings = self.settings
        node = self.cache if name == "cache" else self.store
        lose = settings.lose and not (settings.soft_first and self.falls == 0)
        self._loses_power[name] = lose
        node.sim.set(
            SimOptions(
                seed=settings.seed * 1000 + self.falls * 10 + len(name) % 2 + 1,
                lose_unsynced=lose,
                tear=settings.tear and lose,
                reorder=settings.reorder,
                latency_ns=20_000,
                crash_after_io=crash_after_io,
                fail_op=settings.fail_op,
                fail_io=settings.fail_io if name == "cache" and self.falls == 0 else 0,
            )
        )

    # -- the whole

    def run(self) -> None:
        """Live, fall, live again.  Illegal."""
        for _ in range(4):
            try:
                self.bring_up()
                self.go_on()
                return
            except WorldEnded:
                self.fall()
        raise Illegal("fell more often than it was cut")

    def bring_up(self) -> None:
        """Whatever is down; the store first."""
        if not self.store.is_up:
            if self.cache.is_up:
                for _ in range(self.rng.randrange(OUTAGE_TURNS)):
                    self.turn()
            self.store.start()
            self._check_store()
            self._connect_store()
        if not self.cache.is_up:
            self.opened = False
            self.cache.start()
            self._open_volume()
            self.opened = True

    def go_on(self) -> None:
        """The guest's history to its end, then everything to the store."""
        for _ in range(TURNS_MAX):
            self.turn()
            if self.guest.is_done:
                break
        else:
            raise Illegal("requests hang")
        self.drain()
        self.check_image()
        socket = self._socket()
        image = read_image(self.cache.sim, socket, len(self.disk.blocks) * BLOCK, self.turn)
        self.disk.explain(image, required=always)

    def drain(self) -> None:
        """Destage everything."""
        self.eagerness = 1.0
        for _ in range(TURNS_MAX):
            if self._is_drained():
                return
            self.turn()
        raise Illegal("destage hangs")

    def flush(self) -> None:
        """One more FLUSH of the guest, and its reply."""
        self.guest.ops.append(Op(Kind.FLUSH))
        while not self.guest.is_done:
            self.turn()

    def crash_cache(self) -> None:
        """The cache's process ends, now."""
        self._fall_of_cache()
        self._lose_link()

    def stop(self) -> None:
        """The engine stops cleanly."""
        self.cache.engine.request_stop()
        for _ in range(TURNS_MAX):
            self.cache.step()
            if self.cache.engine.stopped():
                return
        raise Illegal("the engine does not stop")

    def check_image(self) -> None:
        """The store's image is the state of the disk at the store's position."""
        state = self.store.core.volume(VOLUME)
        assert state is not None
        if state.applied_sequence < self.confirmed:
            raise Illegal(
                f"the store is at {state.applied_sequence}, but acknowledged {self.confirmed}"
            )
        image = self.store.image(VOLUME, self.settings.shape.blocks)
        self.disk.check_position(image, state.applied_sequence)

    # -- falling

    def fall(self) -> None:
        """A disk crashed; what happens to the rest of its machine, and to the other."""
        cache_fell = self.cache.sim.crashed or self.settings.cut_both or not self.opened
        store_fell = self.store.sim.crashed or self.settings.cut_both
        self.falls += 1
        again = self.settings.cut_again_after if self.falls == 1 else 0
        if self.falls == 1:
            for _ in range(len(self.guest.ops) - self.settings.requests_after_cut):
                self.guest.ops.pop()
        self._lose_link()
        if store_fell:
            self.store.die()
            self._set_options("store", again if self.settings.cut == "store" else 0)
        if cache_fell:
            self._fall_of_cache()
            self._set_options("cache", again if self.settings.cut == "cache" else 0)

    def lose_cache(self, cache_id: bytes) -> CacheNode:
        """The cache's machine is gone; another one takes over what the store has.

        Returns what was lost, down.
        """
        lost = self.cache
        self._fall_of_cache()
        self._lose_link()
        self.check_image()
        self.cache_id, self._promised = cache_id, never
        self.cache = self._make_cache()
        self._set_options("cache", 0)
        self.cache.start()
        self._open_volume(accept_loss=True)
        return lost

    def _fall_of_cache(self) -> None:
        self._stale = self._stale or self._batch
        self._batch = None
        self._want_cut = self._cutting = self._clearing = self.need_dirty = False
        self.cache.die()
        self._events.clear()
        self.guest.detach()
        self._promised = is_durable if self._loses_power["cache"] else is_acknowledged

    def _lose_link(self) -> None:
        for pipe in (self._to_store, self._to_cache, self._batch_replies):
            pipe.data.clear()
        if self.store.is_up and not self.store.sim.crashed:
            self.store.core.hangup(self._link)
            self.store.core.hangup(self._link + 1)
        if self.cache.is_up and not self.cache.sim.crashed:
            self.cache.engine.fetch_close(0)
        self._fetch = None
        self._link += 2

    # -- opening

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run what never really waits: its waiting is Door.request."""
        try:
            coroutine.send(None)
        except StopIteration as end:
            result: T = end.value
            return result
        raise AssertionError("the catalogue waits for something else")

    def _check_store(self) -> None:
        """The store came back: nothing that it acknowledged is gone."""
        self.catalogue = Catalogue(Door(self), make_id=lambda: VOLUME)
        state = self.store.core.volume(VOLUME)
        if state is None:
            if self.created:
                raise Illegal("the store does not know the volume any more")
            size_bytes = self.settings.shape.blocks * BLOCK
            self.call(self.catalogue.create("disk", size_bytes))
            self.created = True
            return
        self.created = True
        if state.epoch < self.epoch:
            raise Illegal(f"epoch {state.epoch} after it was {self.epoch}")
        if self.dirty_recorded and state.dirty_holder != self.cache_id:
            raise Illegal("'dirty' was recorded and is not on record")
        self.check_image()

    def _connect_store(self) -> None:
        if not self.cache.is_up:
            return
        self._fetch = FetchSocket(self.cache.sim, self.cache.engine)
        if self._batch is not None and self.rng.randrange(2):
            self._batch = None  # cut again; else the same bytes once more
            self._want_cut = True
        elif self._batch is not None:
            self.store.core.feed(self._link + 1, self._batch)

    def record(self) -> VolumeRecord:
        """The volume as the store tells it."""
        state = self.catalogue.get(VOLUME)
        return VolumeRecord(
            name=state.name,
            id=state.id.hex(),
            size_bytes=state.size_bytes,
            epoch=state.epoch,
            lineage=state.lineage,
            applied_sequence=state.applied_sequence,
            dirty_holder=state.dirty_holder.hex() if any(state.dirty_holder) else None,
            open_holder=state.open_holder.hex() if any(state.open_holder) else None,
        )

    def _open_volume(self, *, accept_loss: bool = False) -> None:
        """Compare-and-swap at the store, then the engine, then the guest; as cache/volumes.py."""
        before = self.record()
        known = self.known()
        if known is not None and known.is_failed:
            raise Illegal(f"VolumeFailed in recovery: {known.error}")
        try:
            positions.check_still_ours(before, known, self.cache_id)
        except VolumeRefused as error:
            raise Illegal(f"the cache refuses its volume: {error}") from error
        lineage = self.rng.getrandbits(63) + 1
        after = self.call(
            self.catalogue.open(
                VOLUME,
                cache_id=self.cache_id,
                lineage=lineage,
                first_sequence=positions.first_sequence_of(before, known, self.cache_id),
                expected_epoch=before.epoch,
                accept_loss=accept_loss,
            )
        )
        self.epoch = after.epoch
        engine = self.cache.engine
        keep_slots = positions.slots_are_valid(before, known, self.cache_id)
        opened = self._open_engine(after, lineage, keep_slots=keep_slots)
        self.dirty_recorded = after.dirty_holder == self.cache_id
        if self.dirty_recorded:
            engine.dirty_recorded(VOLUME, True)
        self._fetch = FetchSocket(self.cache.sim, engine)
        self._connect_guest(opened.last_sequence)

    def _open_engine(self, state: VolumeState, lineage: int, *, keep_slots: bool) -> Opened:
        """Again while it is busy with segments of the volume."""
        for _ in range(TURNS_MAX):
            self.cache.engine.open_volume(
                VOLUME,
                size_bytes=state.size_bytes,
                epoch=state.epoch,
                lineage=lineage,
                applied_sequence=state.applied_sequence,
                keep_slots=keep_slots,
                cookie=state.epoch,
            )
            opened = self._wait_opened()
            if opened.status == 0:
                return opened
            if opened.status != -errno.EBUSY:
                break
        raise Illegal(f"the engine does not open: {opened.status} {opened.message}")

    def _wait_opened(self) -> Opened:
        for _ in range(TURNS_MAX):
            self.step()
            for event in self.cache.engine.events():
                if isinstance(event, Opened):
                    return event
                self._events.append(event)
        raise Illegal("the engine does not open the volume")

    def _connect_guest(self, sequence: int) -> None:
        socket = self._socket()
        blocks = self.settings.shape.blocks
        if self.disk.mutations:
            image = read_image(self.cache.sim, socket, blocks * BLOCK, self.turn)
            self.disk.recovered(image, sequence, self._promised)
        self.guest.attach(self.cache.sim, socket)

    def _socket(self) -> int:
        """A new connection to the volume."""
        socket = self.cache.sim.socket()
        self.cache.engine.connect(VOLUME, socket, read_only=False, received=b"", cookie=self.falls)
        return socket

    def known(self) -> VolumeStatus | None:
        """What the device remembers of the volume."""
        volumes = self.cache.engine.list_volumes()
        return next((status for status in volumes if status.id == VOLUME), None)

    # -- one turn

    def step(self) -> None:
        """A turn of one machine, or of both.  WorldEnded."""
        dice = self.rng.randrange(4)
        if dice < 3 and self.cache.is_up:
            self.cache.step()
        if (dice > 0 or not self.cache.is_up) and self.store.is_up:
            self.store.step()
            self.store.collect(0)

    def turn(self) -> None:
        """Step, then the control plane's turn."""
        self.step()
        if self.guest.in_flight:
            self.guest.collect()
        self._events += self.cache.engine.events()
        while self._events:  # the store may fall under one: the others are heard all the same
            self._handle(self._events.pop(0))
        if self.store.is_up:
            self._carry()
            if self.need_dirty:
                self._record_dirty()
            self._destage()
        if self.guest.pausing and not self.guest.in_flight:
            self._pause()
        self.guest.send()

    def _handle(self, event: Event) -> None:
        if isinstance(event, VolumeFailed | EngineFailed | LinkBroken):
            raise Illegal(f"{type(event).__name__}: {event.message}")
        if isinstance(event, NeedDirty):
            self.need_dirty = True
        elif isinstance(event, DirtyReady):
            self._want_cut = True
        elif isinstance(event, DirtyClear):
            self._clearing = False
            if event.status == 0 and self.store.is_up:
                self.dirty_recorded = False
                self._set_dirty(False)
        elif isinstance(event, Batch):
            self._cut_done(event)
        else:
            assert not isinstance(event, Opened | Stopped)

    def _check_dirty_on_record(self) -> None:
        if self.dirty_recorded:
            return
        acknowledged = sum(map(is_acknowledged, self.disk.mutations))
        if acknowledged > self.confirmed:
            raise Illegal("a write was acknowledged before 'dirty' was on record")

    def _set_dirty(self, dirty: bool) -> None:
        self.call(
            self.catalogue.set_dirty(VOLUME, epoch=self.epoch, cache_id=self.cache_id, dirty=dirty)
        )

    def _record_dirty(self) -> None:
        self.call(
            self.catalogue.set_dirty(VOLUME, epoch=self.epoch, cache_id=self.cache_id, dirty=True)
        )
        self.need_dirty = False
        self.dirty_recorded = True
        self.cache.engine.dirty_recorded(VOLUME, True)

    # -- what runs between cache and store

    def _carry(self) -> None:
        """Misses and their answers, batch replies."""
        core = self.store.core
        if self._fetch is not None:
            self._to_store.data += self._fetch.take()
        if self._to_store.data and (data := self._to_store.take(self.rng)):
            core.feed(self._link, data)
        while data := core.take(self._link):
            self._to_cache.data += data
        if self._fetch is not None and self._to_cache.data:
            self._fetch.feed(self._to_cache.take(self.rng))
        while data := core.take(self._link + 1):
            self._batch_replies.data += data
        if self._batch_replies.data:
            self._take_batch_replies()

    def _take_batch_replies(self) -> None:
        stream = self._batch_replies.data
        while (found := record.decode_frame(bytes(stream))) is not None:
            frame, length = found
            reply = ffi.new("struct mp_batch_reply *")
            ffi.memmove(reply, frame.payload, ffi.sizeof(reply[0]))
            del stream[:length]
            if frame.status:
                raise Illegal(f"a batch is refused with status {frame.status}")
            self.confirmed = max(self.confirmed, reply.applied_sequence)
            self.cache.engine.destaged(VOLUME, reply.applied_sequence)
            self._batch = None
            self._want_cut = True

    def _destage(self) -> None:
        if self._stale is not None and self.rng.randrange(4) == 0:
            self._deliver_stale()
        if self._batch is None and self._want_cut and not self._cutting:
            if self.rng.random() >= self.eagerness:
                return
            size = self.rng.choice((64 * KIB, 256 * KIB, MIB, 4 * MIB))
            self._cutting, self._want_cut = True, False
            self.cache.engine.cut(VOLUME, max_bytes=size, cookie=1)

    def _cut_done(self, event: Batch) -> None:
        self._cutting = False
        if event.status == 0:
            frame = self.cache.engine.take_batch(VOLUME, event.bytes_count)
            self._batch = bytes(frame)
            if self.store.is_up:
                self.store.core.feed(self._link + 1, self._batch)
        elif event.status != -errno.ENODATA:
            raise Illegal(f"destage cannot cut: {event.status}")

    def _deliver_stale(self) -> None:
        """A batch of an epoch that is over arrives at last: it must be refused."""
        late, self._stale = self._stale, None
        assert late is not None
        self.store.core.feed(1, late)
        for _ in range(TURNS_MAX):
            if data := self.store.core.take(1):
                break
            self.step()
        found = record.decode_frame(data)
        assert found is not None
        if found[0].status != lib.MP_STATUS_STALE_EPOCH:
            raise Illegal(f"a batch of an older epoch got status {found[0].status}")

    def _is_drained(self) -> bool:
        status = self.known()
        assert status is not None
        return self._batch is None and status.destaged_sequence == status.last_sequence

    def _pause(self) -> None:
        """Time passes; perhaps all is drained and 'dirty' comes off the record."""
        self.cache.step(PAUSE_NS)
        if self.store.is_up:
            self.store.step(PAUSE_NS)
        if not self._clearing and self.rng.randrange(3) == 0 and self._is_drained():
            self._clearing = True
            self.cache.engine.dirty_recorded(VOLUME, False)
        if self.rng.randrange(8) == 0:
            self.guest.end_pause()
