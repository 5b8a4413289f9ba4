"""Destage: the oldest synced writes of each volume, as atomic batches, to its stores.

One DestageStream per store carries BATCH frames and pairs replies.  One VolumeDestage per open
volume cuts, waits for its turn (shaping.py), sends, and tells the engine what is applied.

Rules: one batch per volume is under way; the same bytes are sent again until the store has
answered for them; the engine hears `destaged` only after an OK.  A batch is cut anew only after the
one before was applied (or refused as corrupt on its way).

Happy path: cut -> Batch -> take -> admit -> send -> BATCH_REPLY OK -> destaged -> cut ...
Failure modes, by the store's answer:
    connection lost, no answer   the same bytes again after a back-off
    FULL, IO, BEHIND             the same after a back-off, for ever; shown in status
    CORRUPT                      cut again (the wire changed it, or we did), a few times, then stop
    STALE_EPOCH                  fenced: another cache writes; the volume stops loudly
    GAP, LINEAGE, anything else  the store lacks what we shipped: the volume stops loudly
    -EIO from the cut            a dirty block fails its checksum: the volume stops loudly
What is dirty stays on the device in every case.
"""

import asyncio
import errno
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from millpond.cache import limits
from millpond.cache.errors import StoreAway, VolumeFenced, VolumeRefused, escaped
from millpond.cache.events import EngineEvents
from millpond.cache.links import Identity, Stream
from millpond.cache.shaping import Lateness, Permit, Shaper
from millpond.cache.tasks import Backoff
from millpond.native import ffi, lib
from millpond.native.engine import Batch, Engine, VolumeStatus
from millpond.store import wire
from millpond.store.errors import ProtocolError, Unreachable

log = logging.getLogger("millpond.cache")

# For people, in status: what the answer means and what it needs.
_DELAYS = {
    lib.MP_STATUS_FULL: "the store is full: writes wait until it has room",
    lib.MP_STATUS_IO: "the store's disk fails: see its log, then restart it",
    lib.MP_STATUS_BEHIND: "the store is behind",
}
_STATUS_NAMES = {
    int(getattr(lib, name)): name.removeprefix("MP_STATUS_")
    for name in dir(lib)
    if name.startswith("MP_STATUS_")
}


@dataclass(frozen=True, slots=True)
class BatchReply:
    """A store's answer to one batch."""

    status: int
    applied_sequence: int

    @property
    def status_name(self) -> str:
        """As format.h names it."""
        return _STATUS_NAMES.get(self.status, str(self.status))


class DestageStream(Stream):
    """The destage connection to one store, shared by its volumes."""

    role = "destage"

    def __init__(self, address: str, identity: Identity) -> None:
        super().__init__(address, identity)
        self.sent_bytes = 0
        self._reader = self._new_reader()
        self._replies: dict[int, asyncio.Future[BatchReply]] = {}
        self._next_request_id = 1
        self._in_flight = asyncio.Semaphore(limits.BATCHES_IN_FLIGHT_MAX)
        self._slicing = asyncio.Lock()
        self._nothing_sliced = asyncio.Event()
        self._nothing_sliced.set()
        self._is_up = asyncio.Event()

    def up(self) -> None:
        self._reader = self._new_reader()
        self._is_up.set()

    def down(self, reason: str) -> None:
        self._is_up.clear()
        replies, self._replies = self._replies, {}
        for reply in replies.values():
            if not reply.done():
                reply.set_exception(StoreAway(reason))
                reply.exception()  # whoever waited may have given up already

    def received(self, data: memoryview) -> None:
        self._reader.feed(data)
        while (frame := self._reader.next_frame()) is not None:
            if frame.type == wire.ERROR:
                raise ProtocolError(f"the store says: {wire.error_text(frame.payload)}")
            waiting = self._replies.pop(frame.request_id, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(_batch_reply(frame))

    async def ship(self, frame: bytearray, shaper: Shaper) -> BatchReply:
        """Send one batch within the rates and wait for its answer.  StoreAway: send it again.

        frame belongs to the connection from here: another attempt takes a copy.
        """
        await self._is_up.wait()
        if len(frame) > shaper.largest_bytes:
            return await self._ship_sliced(frame, shaper)
        permit = await self._admit(len(frame), shaper)
        # A store that hangs must not take the host's peak from volumes of other stores.
        unanswered = asyncio.get_running_loop().call_later(limits.UNANSWERED_S, permit.finish)
        try:
            async with self._in_flight:
                await self._nothing_sliced.wait()
                reply = self._begin(frame)
                self._write(frame)
                return await self._answer(reply)
        finally:
            unanswered.cancel()
            permit.finish()

    async def _admit(self, bytes_count: int, shaper: Shaper) -> Permit:
        """A permit in hand while a sliced frame is on the wire could starve its next slice."""
        while True:
            await self._nothing_sliced.wait()
            permit = await shaper.admit(bytes_count)
            if self._nothing_sliced.is_set():
                return permit
            permit.finish()

    async def _ship_sliced(self, frame: bytearray, shaper: Shaper) -> BatchReply:
        """One log record larger than a second's peak: its frame leaves in slices."""
        slice_bytes = max(1, int(shaper.largest_bytes) // limits.PEAK_PARTS)
        async with self._slicing:
            self._nothing_sliced.clear()
            try:
                reply = self._begin(frame)
                view = memoryview(frame)
                for start in range(0, len(frame), slice_bytes):
                    await self._write_slice(view[start : start + slice_bytes], shaper)
            finally:
                self._nothing_sliced.set()
        return await self._answer(reply)

    async def _write_slice(self, piece: memoryview, shaper: Shaper) -> None:
        permit = await shaper.admit(len(piece))
        try:
            link = self._link
            if link is None:
                raise StoreAway(self.problem)
            self._write(piece)
            await link.drain()
        except Unreachable as error:
            raise StoreAway(error.message) from None
        finally:
            permit.finish()

    def _begin(self, frame: bytearray) -> asyncio.Future[BatchReply]:
        """Number the frame for this connection and expect its answer."""
        if self._link is None:
            raise StoreAway(self.problem)
        request_id = self._next_request_id
        self._next_request_id += 1
        header = ffi.cast("struct mp_frame *", ffi.from_buffer(frame))
        header.request_id = request_id
        lib.mp_frame_seal(header)
        reply: asyncio.Future[BatchReply] = asyncio.get_running_loop().create_future()
        self._replies[request_id] = reply
        return reply

    def _write(self, data: bytearray | memoryview) -> None:
        assert self._link is not None, "no await lies between the check and here"
        self._link.write(data)
        self.sent_bytes += len(data)

    async def _answer(self, reply: asyncio.Future[BatchReply]) -> BatchReply:
        try:
            async with asyncio.timeout(limits.BATCH_REPLY_TIMEOUT_S):
                return await reply
        except TimeoutError:
            self.drop(f"no answer to a batch within {limits.BATCH_REPLY_TIMEOUT_S:g} s")
            raise StoreAway("the store did not answer a batch") from None

    def _new_reader(self) -> wire.FrameReader:
        return wire.FrameReader(
            payload_max_bytes=limits.BATCH_REPLY_MAX_BYTES,
            types=(wire.BATCH_REPLY, wire.ERROR),
            peer=f"the store at {self.address}",
        )


def _batch_reply(frame: wire.Frame) -> BatchReply:
    """A BATCH_REPLY; one without a payload says only its status."""
    size_bytes = ffi.sizeof("struct mp_batch_reply")
    applied = 0
    if len(frame.payload) >= size_bytes:
        raw: Any = ffi.cast("struct mp_batch_reply *", ffi.from_buffer(frame.payload))
        applied = int(raw.applied_sequence)
    elif frame.status == lib.MP_STATUS_OK:
        raise ProtocolError("the store sent a BATCH_REPLY without a position")
    return BatchReply(frame.status, applied)


class VolumeDestage:
    """Ships one volume as long as it has something to ship."""

    def __init__(
        self,
        volume_id: bytes,
        name: str,
        *,
        engine: Engine,
        events: EngineEvents,
        streams: Sequence[DestageStream],
        shaper: Shaper,
        bound_s: float | None,
        on_drained: Callable[[], None],
    ) -> None:
        self.problem = ""  # why it does not get on, empty while it does
        self.batches = 0
        self.retries = 0
        self._id = volume_id
        self._name = name
        self._engine = engine
        self._events = events
        self._streams = tuple(streams)
        self._shaper = shaper
        self._bound_s = bound_s
        self._on_drained = on_drained
        self._ready = asyncio.Event()
        self._hurry = asyncio.Event()
        self._leaving = False
        self._hurry_until = 0

    def ready(self) -> None:
        """There is something to ship (again)."""
        self._ready.set()

    async def run(self) -> None:
        """Ship for ever; VolumeFenced or VolumeRefused when the volume must stop."""
        resync = Backoff(limits.RESYNC_FIRST_S, limits.RESYNC_MAX_S)
        corrupt = 0
        while True:
            await self._ready.wait()
            self._ready.clear()
            await self._gather()
            while (batch := await self._cut(resync)) is not None:
                corrupt = 0 if await self._ship(batch) else corrupt + 1
                if corrupt > limits.CORRUPT_RETRIES_MAX:
                    raise VolumeRefused("the store finds every copy of a batch corrupt")
                await self._gather()
            self._on_drained()

    def hurry(self) -> None:
        """The volume is to be given back: do not wait for company any more."""
        self._leaving = True
        self._hurry.set()
        self._ready.set()

    def hurry_until(self, sequence: int, *, ignore_rates: bool) -> None:
        """An operator waits for this sequence: no waiting for company until it is shipped."""
        self._hurry_until = max(self._hurry_until, sequence)
        self._shaper.ignored = self._shaper.ignored or ignore_rates
        self._hurry.set()
        self._ready.set()

    async def _gather(self) -> None:
        """Let a batch that is not full yet wait for company."""
        found = find_volume(self._engine, self._id)
        if found is None or found.dirty_bytes >= self._shaper.cut_bytes:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(limits.GATHER_S):
                await self._hurry.wait()

    async def _wait_ready(self, limit_s: float) -> None:
        """Until the engine says that there is something to ship, or not longer than that."""
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._ready.wait()
        self._ready.clear()

    async def _cut(self, resync: Backoff) -> Batch | None:
        """The next batch, or None when everything is applied at the store."""
        while True:
            batch = await self._ask_to_cut()
            if batch.status == 0:
                resync.reset()
                return batch
            if batch.status == -errno.ENODATA:
                if not self._has_undestaged():
                    resync.reset()
                    return None
                await self._wait_ready(resync.next_s())  # the cut started a sync
                continue
            if batch.status == -errno.EBUSY:  # a cut that a cancelled task asked for still runs
                await resync.wait()
                continue
            raise VolumeRefused(
                batch.message
                or f"the write log cannot be read ({os.strerror(-batch.status)});"
                " destage stopped, nothing was dropped"
            )

    async def _ask_to_cut(self) -> Batch:
        cookie = self._events.new_cookie()
        max_bytes = self._shaper.cut_bytes
        found = find_volume(self._engine, self._id)
        if found is not None:
            part_bytes = found.log_share_bytes // limits.SHARE_PARTS
            max_bytes = min(max_bytes, max(part_bytes, limits.BATCH_MIN_BYTES))
        return await self._events.ask(
            Batch,
            cookie,
            lambda: self._engine.cut(self._id, max_bytes=max_bytes, cookie=cookie),
        )

    def _note_age(self) -> None:
        """From when on the rates do not count."""
        if self._bound_s is None:
            return
        found = find_volume(self._engine, self._id)
        age_s = found.oldest_dirty_ns / 1e9 if found is not None else 0.0
        now_s = asyncio.get_running_loop().time()
        self._shaper.late = Lateness.of(age_s, self._bound_s, now_s)

    async def _ship(self, batch: Batch) -> bool:
        """Send until applied: True.  False: cut it again."""
        frame = self._engine.take_batch(self._id, batch.bytes_count)
        backoff = Backoff()
        while True:
            self._note_age()
            try:
                replies = [await stream.ship(frame, self._shaper) for stream in self._streams]
            except StoreAway as error:
                self._delayed(str(error), backoff)
                await backoff.wait()
                frame = bytearray(frame)  # the connection that is gone may still hold the other
                continue
            worst = max(replies, key=lambda reply: reply.status)
            if worst.status == lib.MP_STATUS_OK:
                return self._applied(batch, replies)
            if worst.status == lib.MP_STATUS_CORRUPT:
                log.error("batch corrupt on arrival volume=%s", escaped(self._name))
                self._delayed("the store found a batch corrupt", backoff)
                await backoff.wait()
                return False
            if worst.status not in _DELAYS:
                raise _stop(worst)
            self._delayed(_DELAYS[worst.status], backoff)
            await backoff.wait()
            frame = bytearray(frame)

    def _applied(self, batch: Batch, replies: Sequence[BatchReply]) -> bool:
        """Every in-sync store has it durably: the log may forget it."""
        behind = min(reply.applied_sequence for reply in replies)
        if behind < batch.last_sequence:
            raise VolumeRefused(
                f"the store acknowledged a batch up to sequence {batch.last_sequence}"
                f" but stands at {behind}"
            )
        self._engine.destaged(self._id, batch.last_sequence)
        if batch.last_sequence >= self._hurry_until:
            self._shaper.ignored = False
            if not self._leaving:
                self._hurry.clear()
        self.problem = ""
        self.batches += 1
        return True

    def _delayed(self, reason: str, backoff: Backoff) -> None:
        self.problem = reason
        self.retries += 1
        if backoff.is_first:
            log.warning("destage delayed volume=%s reason=%s", escaped(self._name), escaped(reason))

    def _has_undestaged(self) -> bool:
        found = find_volume(self._engine, self._id)
        return found is not None and found.has_undestaged


def find_volume(engine: Engine, volume_id: bytes) -> VolumeStatus | None:
    """The engine's view of one volume."""
    for status in engine.list_volumes():
        if status.id == volume_id:
            return status
    return None


def _stop(reply: BatchReply) -> VolumeRefused:
    """The store's answer means that this volume must not go on."""
    if reply.status == lib.MP_STATUS_STALE_EPOCH:
        return VolumeFenced(
            "another cache has opened the volume; nothing more is shipped from here"
        )
    return VolumeRefused(
        f"the store refuses a batch ({reply.status_name}) and stands at sequence"
        f" {reply.applied_sequence}; what is not shipped stays on this device"
    )
