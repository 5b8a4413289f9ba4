"""A cache device that was spoiled: opened, read and destaged in a simulated world.

`make_world` lives an ordinary life and stops, cleanly or not; `outlive` brings the cache up again
over a spoiled device.  It may refuse, in one line; it may fail the volume or a read; what it shows
is right, and what it ships makes the store an exact earlier state of the disk.
"""

import errno
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hostile.spoiling import Region
from millpond.cache import positions
from millpond.cache.errors import CacheError
from millpond.native import ffi
from millpond.native import record as codec
from millpond.native.engine import (
    Batch,
    Engine,
    EngineFailed,
    Event,
    NativeError,
    Opened,
    VolumeFailed,
)
from millpond.native.store import VolumeState
from millpond.store.errors import StoreError
from sim.guest import REPLY, REQUEST, REQUEST_MAGIC
from sim.history import BLOCK, Kind, Op, Shape
from sim.nodes import CACHE_ID, SEGMENT_BYTES, FetchSocket
from sim.oracle import Illegal
from sim.settings import Settings
from sim.world import TURNS_MAX, VOLUME, World

E = TypeVar("E", bound=Event)
RUN_BLOCKS = 32
SETTLE_NS = 200_000_000  # the record that tells of the flush's sync comes 50 ms later
SUPER_COPIES = (0, 65536)


def make_world(seed: int, *, clean: bool) -> World:
    """160 requests, the last one a flush that the log tells of; the cache is down."""
    world = World(Settings(seed=seed, shape=Shape(requests=160)))
    world.guest.ops.extend((Op(Kind.PAUSE), Op(Kind.FLUSH), Op(Kind.PAUSE)))
    world.eagerness = 0.05
    world.bring_up()
    for _ in range(TURNS_MAX):
        world.turn()
        if world.guest.is_done:
            break
    assert world.guest.is_done
    settled_ns = world.cache.sim.now_ns + SETTLE_NS
    while world.cache.sim.now_ns < settled_ns:
        world.turn()
    if clean:
        world.stop()
    world.cache.die()
    world._lose_link()
    return world


@dataclass
class Spoiled:
    """What came of it."""

    world: World
    newest_only: bool  # what was acknowledged may not be older
    trusted: bool = True  # checksums were not forged: what is shown must be true
    failed: bool = False
    errors: int = 0
    _received: bytearray = field(default_factory=bytearray)
    _events: list[Event] = field(default_factory=list)
    _fetch: FetchSocket | None = None

    def outlive(self) -> str:
        """Refused, failed, errors or whole."""
        world = self.world
        driver = world.cache.sim.driver()
        try:
            world.cache._open = Engine.open_driver(driver, world.cache.options)
        except NativeError as error:
            line = str(error.args[1])
            assert line and "\n" not in line and error.errno != errno.ENOMEM, line
            return "refused"
        try:
            self._open()
        except (CacheError, StoreError):
            return "refused"
        if self.failed:
            return "failed"
        self._read_all()
        self._destage()
        self._stop()
        return "failed" if self.failed else "errors" if self.errors else "whole"

    def _open(self) -> None:
        world = self.world
        before, known = world.record(), world.known()
        positions.check_still_ours(before, known, CACHE_ID)
        after = world.call(
            world.catalogue.open(
                VOLUME,
                cache_id=CACHE_ID,
                lineage=77,
                first_sequence=positions.first_sequence_of(before, known, CACHE_ID),
                expected_epoch=before.epoch,
                accept_loss=False,
            )
        )
        keep_slots = positions.slots_are_valid(before, known, CACHE_ID)
        if not self._open_at_engine(after, keep_slots=keep_slots):
            self.failed = True
            return
        engine = world.cache.engine
        engine.dirty_recorded(VOLUME, True)
        self._fetch = FetchSocket(world.cache.sim, engine)
        self._socket = world.cache.sim.socket()
        engine.connect(VOLUME, self._socket, read_only=False, received=b"", cookie=9)

    def _open_at_engine(self, state: VolumeState, *, keep_slots: bool) -> bool:
        """As cache/volumes.py: EBUSY is asked again."""
        for _ in range(1000):
            self.world.cache.engine.open_volume(
                VOLUME,
                size_bytes=state.size_bytes,
                epoch=state.epoch,
                lineage=77,
                applied_sequence=state.applied_sequence,
                keep_slots=keep_slots,
                cookie=1,
            )
            opened = self._wait_for(Opened)
            if opened is None or opened.status != -errno.EBUSY:
                return opened is not None and opened.status == 0
            self._turn()
        raise AssertionError("the engine stays busy")

    def _turn(self) -> None:
        """Engine and store, and what runs between them."""
        world = self.world
        world.cache.engine.step(1_000_000)
        world.store.step()
        engine, core = world.cache.engine, world.store.core
        if self._fetch is not None:
            if data := self._fetch.take():
                core.feed(world._link, data)
            while data := core.take(world._link):
                self._fetch.feed(data)
        for event in engine.events():
            self.failed |= isinstance(event, VolumeFailed | EngineFailed)
            self._events.append(event)

    def _wait_for(self, kind: type[E]) -> E | None:
        """The event; None when the volume failed before."""
        for _ in range(2000):
            for event in self._events:
                if isinstance(event, kind):
                    self._events.remove(event)
                    return event
            if self.failed:
                return None
            self._turn()
        raise AssertionError(f"no {kind.__name__}: it hangs")

    def _read_all(self) -> None:
        """In runs; where a run gets an error, block by block."""
        blocks = self.world.settings.shape.blocks
        runs = [(first, min(RUN_BLOCKS, blocks - first)) for first in range(0, blocks, RUN_BLOCKS)]
        singles = [
            (first + index, 1) for first, count in self._read(runs) for index in range(count)
        ]
        self.errors += len(list(self._read(singles)))

    def _read(self, runs: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Ask for these; yields those that got an error, checks the others."""
        sim = self.world.cache.sim
        for first, count in runs:
            header = REQUEST.pack(REQUEST_MAGIC, 0, Kind.READ, first, first * BLOCK, count * BLOCK)
            sim.push(self._socket, header)
        waiting = dict(runs)
        for _ in range(TURNS_MAX):
            if not waiting:
                return
            self._received += sim.pop(self._socket)
            while len(self._received) >= REPLY.size:
                magic, error, first = REPLY.unpack_from(self._received)
                assert magic == 0x67446698
                end = REPLY.size + (0 if error else waiting[first] * BLOCK)
                if len(self._received) < end:
                    break
                data = bytes(self._received[REPLY.size : end])
                del self._received[:end]
                count = waiting.pop(first)
                if error:
                    yield first, count
                else:
                    self._check(first, data)
            self._turn()
        raise AssertionError("reads hang")

    def _check(self, first: int, data: bytes) -> None:
        """Right data, or an error: nothing else."""
        for index in range(len(data) // BLOCK):
            shown = data[index * BLOCK : (index + 1) * BLOCK]
            contents = self.world.disk.blocks[first + index].contents
            legal = contents[-1:] if self.newest_only else contents
            if self.trusted and shown not in legal:
                what = "an older state" if shown in contents else "what it never held"
                raise Illegal(f"block {first + index} shows {what}, without a word")

    def _destage(self) -> None:
        """Ship until there is nothing, or no way; the store stays an exact earlier state."""
        world = self.world
        for _ in range(200):
            world.cache.engine.cut(VOLUME, max_bytes=1 << 20, cookie=3)
            batch = self._wait_for(Batch)
            if batch is None or batch.status not in (0, -errno.ENODATA):
                break
            if batch.status == 0 and not self._ship(batch):
                break
            known = world.known()
            if batch.status and (known is None or not known.has_undestaged):
                break
        if self.trusted:
            state = world.store.core.volume(VOLUME)
            assert state is not None
            image = world.store.image(VOLUME, world.settings.shape.blocks)
            world.disk.check_position(image, state.applied_sequence)

    def _ship(self, batch: Batch) -> bool:
        """One batch to the store."""
        world = self.world
        frame = world.cache.engine.take_batch(VOLUME, batch.bytes_count)
        link = world._link + 1
        world.store.core.feed(link, frame)
        answer = b""
        for _ in range(TURNS_MAX):
            self._turn()
            answer += world.store.core.take(link)
            if (found := codec.decode_frame(answer)) is not None:
                break
        else:
            raise AssertionError("the store does not answer a batch")
        if found[0].status:
            assert not self.trusted, f"a batch is refused with status {found[0].status}"
            return False
        world.cache.engine.destaged(VOLUME, batch.last_sequence)
        return True

    def _stop(self) -> None:
        """A clean end."""
        engine = self.world.cache.engine
        engine.request_stop()
        for _ in range(TURNS_MAX):
            if engine.stopped():
                return
            self._turn()
        raise AssertionError("the engine does not stop")


# ---- where things are ----


def superblock(world: World) -> bytearray:
    """The newer one; both are valid in a world that lived in order."""
    copies = [
        world.cache.sim.peek(offset_bytes=offset, length_bytes=BLOCK) for offset in SUPER_COPIES
    ]
    newest = max(copies, key=lambda data: struct.unpack_from("<Q", data, 48)[0])
    return bytearray(newest)


def as_super(data: bytes | bytearray) -> Any:
    """The C struct."""
    found = ffi.new("struct mp_cache_super *")
    ffi.memmove(found, bytes(data), BLOCK)
    return found


def regions(world: World) -> list[Region]:
    """What the device holds, but for padding."""
    found = as_super(superblock(world))
    area = found.checkpoint_offset_bytes[found.checkpoint_area]
    result = [Region("superblock", offset, BLOCK) for offset in SUPER_COPIES]
    result.append(Region("checkpoint", area, max(found.checkpoint_length_bytes, BLOCK)))
    slots_bytes = found.slot_count * found.slot_bytes
    result.append(Region("slots", found.slots_offset_bytes, slots_bytes))
    for index in range(found.log_segment_count):
        at = found.log_offset_bytes + index * SEGMENT_BYTES
        if length := sum(each.length_bytes for _, each in records(world, at)):
            result.append(Region(f"log segment {index}", at, length))
    return result


def records(world: World, at: int) -> Iterator[tuple[int, codec.Record]]:
    """The records of the log segment at this offset, from its start on."""
    data = memoryview(world.cache.sim.peek(offset_bytes=at, length_bytes=SEGMENT_BYTES))
    offset = 0
    while offset < SEGMENT_BYTES:
        try:
            found = codec.decode_record(data[offset:])
        except OSError:
            return
        if found is None:
            return
        yield at + offset, found
        offset += found.length_bytes


__all__ = ["Spoiled", "as_super", "make_world", "records", "regions", "superblock"]
