"""The engine of one shard, typed: functions of engine.h as methods, events as dataclasses.

No logic.  Every method is "any thread" and does not block, except `open`, `format_device`, `stop`
(which joins the engine's thread) and `free`.  Ids are 16 raw bytes; -errno becomes NativeError.

Happy path: `Engine.open(fd)`, `start()`, watch `notify_fd()`, and on each notification
`clear_notification()`, `events()`; `request_stop()`, the Stopped event, `stop()`, `free()`.

Failure modes: `open` raises NativeError with the engine's one-line message and closes nothing that
it does not own; a method on a freed engine is our own bug (assert).
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from millpond.native import ffi, lib

MESSAGE_BYTES = 512
EVENTS_PER_CALL = 64
VOLUMES_FIRST_GUESS = 64

Buffer = bytes | bytearray | memoryview


class NativeError(OSError):
    """The C core refused or failed: errno, and one line for the operator."""


@dataclass(frozen=True, slots=True)
class FormatOptions:
    """struct mp_cache_format_options."""

    device_bytes: int
    slot_bytes: int
    log_bytes: int
    cache_id: bytes


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """struct mp_engine_options; 0 means the engine's default."""

    buffer_bytes: int = 0
    checkpoint_every_bytes: int = 0
    poll_ns: int = 0
    scrub_bytes_per_s: int = 0  # no default of the engine's: 0 is off
    scrub_patience_ns: int = 0
    test_faults: int = 0


@dataclass(frozen=True, slots=True)
class VolumeShares:
    """struct mp_volume_shares; 0 means nothing set."""

    log_min_bytes: int = 0
    log_max_bytes: int = 0
    slots_min_bytes: int = 0
    slots_max_bytes: int = 0
    strict_bound_ns: int = 0


@dataclass(frozen=True, slots=True)
class VolumeStatus:
    """struct mp_engine_volume, flags decoded."""

    id: bytes
    size_bytes: int
    epoch: int
    lineage: int
    destaged_sequence: int
    synced_sequence: int
    last_sequence: int
    dirty_bytes: int
    log_segments: int
    oldest_dirty_ns: int
    slots_held: int
    log_share_bytes: int
    slowed_bytes_per_s: int
    connections: int
    flags: int
    reads: int
    writes: int
    flushes: int
    trims: int
    zeroes: int
    read_hit_blocks: int
    read_miss_blocks: int
    read_zero_blocks: int
    log_checksum_errors: int
    error: int

    @property
    def has_undestaged(self) -> bool:
        """Records that no store has acknowledged."""
        return self.last_sequence > self.destaged_sequence

    @property
    def is_open(self) -> bool:
        """Opened in this run of the engine."""
        return bool(self.flags & int(lib.MP_VOLUME_OPEN))

    @property
    def is_failed(self) -> bool:
        """The engine serves it no more; `error` says why."""
        return bool(self.flags & int(lib.MP_VOLUME_FAILED))


@dataclass(frozen=True, slots=True)
class Event:
    """struct mp_event; the subclass is its type."""

    volume: bytes
    status: int
    cookie: int
    first_sequence: int
    last_sequence: int
    bytes_count: int
    message: str


class Opened(Event):
    """open_volume is done (status 0) or refused; last_sequence continues the chain."""


class Closed(Event):
    """close_volume is done or refused."""


class ConnectionClosed(Event):
    """The connection `cookie` is gone; status 1: after NBD_CMD_DISC."""


class ConnectionLeft(Event):
    """The connection `cookie` waits to be taken (take_left); bytes_count: what was read of it."""


class NeedDirty(Event):
    """Mutations wait for "dirty at this cache" to be on record at the stores."""


class DirtyClear(Event):
    """Answer to dirty_recorded(False): status 0, or -EBUSY."""


class Batch(Event):
    """Answer to cut: status 0 with sequences and bytes, -ENODATA, or -EIO."""


class DirtyReady(Event):
    """A volume without undestaged records has some now."""


class VolumeFailed(Event):
    """The engine stopped serving a volume."""


class EngineFailed(Event):
    """The shard is lost until restart."""


class LinkBroken(Event):
    """The fetch connection `cookie` is gone: make a new one.  Status as engine.h has it."""


class Position(Event):
    """Answer to position: first_sequence is destaged, last_sequence covers every acknowledgement;
    status -ENOENT when the device does not know the volume."""


class ScrubFound(Event):
    """Damage on the device, found in the background; message: which block, what became of it."""


class ScrubPass(Event):
    """Everything that is needed on the device has been verified once."""


class Stopped(Event):
    """The engine has written its clean checkpoint."""


_EVENTS: dict[int, type[Event]] = {
    lib.MP_EVENT_OPENED: Opened,
    lib.MP_EVENT_CLOSED: Closed,
    lib.MP_EVENT_CONNECTION_CLOSED: ConnectionClosed,
    lib.MP_EVENT_NEED_DIRTY: NeedDirty,
    lib.MP_EVENT_DIRTY_CLEAR: DirtyClear,
    lib.MP_EVENT_BATCH: Batch,
    lib.MP_EVENT_DIRTY_READY: DirtyReady,
    lib.MP_EVENT_VOLUME_FAILED: VolumeFailed,
    lib.MP_EVENT_ENGINE_FAILED: EngineFailed,
    lib.MP_EVENT_STOPPED: Stopped,
    lib.MP_EVENT_LINK_BROKEN: LinkBroken,
    lib.MP_EVENT_POSITION: Position,
    lib.MP_EVENT_SCRUB_FOUND: ScrubFound,
    lib.MP_EVENT_SCRUB_PASS: ScrubPass,
    lib.MP_EVENT_CONNECTION_LEFT: ConnectionLeft,
}


def _check(result: int, what: str) -> int:
    """A C result as a count, or -errno as NativeError."""
    if result < 0:
        raise NativeError(-result, f"{what}: {os.strerror(-result)}")
    return result


def _message(buffer: Any, error: int) -> str:
    """The engine's own line, or what errno says."""
    text = ffi.string(buffer).decode("utf-8", "replace")
    return text or os.strerror(abs(error))


def _device_driver(fd: int) -> Any:
    """The real driver on a device; fd is consumed, on failure too."""
    driver = lib.mp_driver_linux_device(fd)
    if driver == ffi.NULL:
        error = ffi.errno
        os.close(fd)
        raise NativeError(error, f"cannot use the device: {os.strerror(error)}")
    return driver


def format_device(fd: int, options: FormatOptions) -> None:
    """Format the cache device behind fd (opened O_DIRECT for writing); blocks, overwrites.

    The descriptor is consumed.  Raises NativeError with one line for the operator.
    """
    driver = _device_driver(fd)
    try:
        c_options = ffi.new("struct mp_cache_format_options *")
        c_options.device_bytes = options.device_bytes
        c_options.slot_bytes = options.slot_bytes
        c_options.log_bytes = options.log_bytes
        c_options.cache_id = options.cache_id
        message = ffi.new("char[]", MESSAGE_BYTES)
        result = lib.mp_cache_format(driver, c_options, ffi.NULL, message, MESSAGE_BYTES)
        if result < 0:
            raise NativeError(-result, _message(message, result))
    finally:
        lib.mp_driver_destroy(driver)


class Engine:
    """One shard's engine and the driver it runs on."""

    _COUNTERS: ClassVar[tuple[str, ...]] = tuple(
        name for name, _ in ffi.typeof("struct mp_engine_counters").fields
    )

    def __init__(self, engine: Any, driver: Any) -> None:
        self._engine = engine
        self._driver = driver
        self._events = ffi.new("struct mp_event[]", EVENTS_PER_CALL)
        cache_id = ffi.new("uint8_t[16]")
        lib.mp_engine_cache_id(engine, cache_id)
        self.cache_id = bytes(ffi.buffer(cache_id))

    @classmethod
    def open(cls, fd: int, options: EngineOptions) -> "Engine":
        """Recover the device behind fd (O_DIRECT, read-write), which is consumed.  Blocks."""
        driver = _device_driver(fd)
        try:
            return cls.open_driver(driver, options)
        except BaseException:
            lib.mp_driver_destroy(driver)
            raise

    @classmethod
    def open_driver(cls, driver: Any, options: EngineOptions) -> "Engine":
        """Recover on any driver (tests: the simulator's).  On failure the driver stays yours."""
        c_options = ffi.new("struct mp_engine_options *")
        for field in fields(options):
            setattr(c_options, field.name, getattr(options, field.name))
        error = ffi.new("int *")
        message = ffi.new("char[]", MESSAGE_BYTES)
        engine = lib.mp_engine_open(driver, c_options, error, message, MESSAGE_BYTES)
        if engine == ffi.NULL:
            raise NativeError(abs(error[0]), _message(message, error[0]))
        return cls(engine, driver)

    def notify_fd(self) -> int:
        """The eventfd to watch (real driver only); the driver owns it."""
        return _check(lib.mp_driver_linux_notify_fd(self._driver), "notify descriptor")

    def clear_notification(self) -> None:
        """Before draining: what comes during the drain notifies again."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.notify_fd())

    def start(self) -> None:
        """Run the reactor in its own thread."""
        _check(lib.mp_engine_start(self._engine), "start of the engine thread")

    def step(self, timeout_ns: int) -> int:
        """One turn of the reactor (tests); -errno when the world ended."""
        return int(lib.mp_engine_step(self._engine, timeout_ns))

    def request_stop(self) -> None:
        """Begin to stop; the Stopped event follows."""
        lib.mp_engine_request_stop(self._engine)

    def stopped(self) -> bool:
        """The stop that was requested is complete."""
        return bool(lib.mp_engine_stopped(self._engine))

    def stop(self) -> None:
        """Stop and join the thread.  Blocks: call it after Stopped."""
        lib.mp_engine_stop(self._engine)

    def free(self) -> None:
        """Give back engine and driver; nothing is written.  The reactor must be stopped."""
        assert self._engine != ffi.NULL, "the engine was freed before"
        lib.mp_engine_free(self._engine)
        lib.mp_driver_destroy(self._driver)
        self._engine = self._driver = ffi.NULL

    def list_volumes(self) -> list[VolumeStatus]:
        """Every volume the shard remembers, open or not."""
        capacity = VOLUMES_FIRST_GUESS
        while True:
            out = ffi.new("struct mp_engine_volume[]", capacity)
            count = _check(
                lib.mp_engine_list_volumes(self._engine, out, capacity), "list of volumes"
            )
            if count < capacity:
                return [_volume_status(out[index]) for index in range(count)]
            capacity *= 2

    def counters(self) -> dict[str, int]:
        """struct mp_engine_counters by name."""
        out = ffi.new("struct mp_engine_counters *")
        lib.mp_engine_counters(self._engine, out)
        return {name: int(getattr(out, name)) for name in self._COUNTERS}

    def open_volume(
        self,
        volume: bytes,
        *,
        size_bytes: int,
        epoch: int,
        lineage: int,
        applied_sequence: int,
        keep_slots: bool,
        cookie: int,
        store: int = 0,
    ) -> None:
        """Make a volume known under this epoch and lineage; Opened follows.

        store: whose fetch stream carries its misses.
        """
        result = lib.mp_engine_open_volume(
            self._engine,
            volume,
            size_bytes,
            epoch,
            lineage,
            applied_sequence,
            int(keep_slots),
            store,
            cookie,
        )
        _check(result, "open of a volume")

    def configure_volume(self, volume: bytes, shares: VolumeShares) -> None:
        """What an open volume may take; in force at once, until it is closed."""
        c_shares = ffi.new("struct mp_volume_shares *")
        for field in fields(shares):
            setattr(c_shares, field.name, getattr(shares, field.name))
        _check(lib.mp_engine_configure_volume(self._engine, volume, c_shares), "shares")

    def close_volume(self, volume: bytes, *, forget_slots: bool, cookie: int) -> None:
        """Drop a volume without dirty records and connections; Closed follows."""
        result = lib.mp_engine_close_volume(self._engine, volume, int(forget_slots), cookie)
        _check(result, "close of a volume")

    def grow_volume(self, volume: bytes, *, size_bytes: int) -> None:
        """An open volume is larger from here on, as the store's record says already."""
        _check(lib.mp_engine_grow_volume(self._engine, volume, size_bytes), "grow of a volume")

    def position(self, volume: bytes, *, cookie: int) -> None:
        """Where the volume stands now; Position follows."""
        _check(lib.mp_engine_position(self._engine, volume, cookie), "position of a volume")

    def connect(
        self,
        volume: bytes,
        fd: int,
        *,
        read_only: bool,
        received: Buffer,
        cookie: int,
        structured: bool = False,
        allocation: bool = False,
    ) -> None:
        """Hand over a connection in transmission phase; fd is consumed, on error too.

        structured, allocation: the client negotiated structured replies, and base:allocation.
        """
        flags = lib.MP_CONNECT_READ_ONLY if read_only else 0
        flags |= lib.MP_CONNECT_STRUCTURED if structured else 0
        flags |= lib.MP_CONNECT_ALLOCATION if allocation else 0
        result = lib.mp_engine_connect(
            self._engine,
            volume,
            fd,
            flags,
            ffi.from_buffer(received),
            len(received),
            cookie,
        )
        _check(result, "hand-over of a connection")

    def disconnect(self, cookie: int) -> None:
        """Stop a connection; ConnectionClosed follows."""
        _check(lib.mp_engine_disconnect(self._engine, cookie), "disconnect")

    def leave(self, cookie: int) -> None:
        """Give a connection back between two requests; ConnectionLeft or ConnectionClosed."""
        _check(lib.mp_engine_leave(self._engine, cookie), "giving back a connection")

    def take_left(self, cookie: int, bytes_count: int) -> tuple[int, bytes]:
        """After ConnectionLeft: the socket, now the caller's, and what was read of it."""
        out, fd = ffi.new("uint8_t[]", max(bytes_count, 1)), ffi.new("int *")
        length = lib.mp_engine_take_left(self._engine, cookie, fd, out, bytes_count)
        _check(length, "taking a connection")
        return int(fd[0]), bytes(ffi.buffer(out, length))

    def dirty_recorded(self, volume: bytes, recorded: bool) -> None:
        """Recorded at the stores (True), or about to be cleared (False: DirtyClear follows)."""
        _check(lib.mp_engine_dirty_recorded(self._engine, volume, int(recorded)), "dirty state")

    def cut(self, volume: bytes, *, max_bytes: int, cookie: int) -> None:
        """Cut the next batch; Batch follows."""
        _check(lib.mp_engine_cut(self._engine, volume, max_bytes, cookie), "cut of a batch")

    def take_batch(self, volume: bytes, bytes_count: int) -> bytearray:
        """The frame of the batch that was cut, whole.  Once: keep it until it is applied."""
        frame = bytearray(bytes_count)
        taken = _check(
            lib.mp_engine_take_batch(self._engine, volume, ffi.from_buffer(frame), bytes_count),
            "take of a batch",
        )
        assert taken == bytes_count, f"a batch of {bytes_count} bytes gave {taken}"
        return frame

    def destaged(self, volume: bytes, sequence: int) -> None:
        """The store has durably applied everything up to sequence."""
        _check(lib.mp_engine_destaged(self._engine, volume, sequence), "destage acknowledgement")

    def fetch_open(
        self,
        store: int,
        fd: int,
        *,
        received: Buffer,
        cookie: int,
        block_status: bool = True,
    ) -> None:
        """Hand over a fetch connection after its handshake; fd is consumed, on error too.

        block_status: the store answers BLOCK_STATUS.
        """
        features = lib.MP_STORE_BLOCK_STATUS if block_status else 0
        result = lib.mp_engine_fetch_open(
            self._engine, store, fd, features, ffi.from_buffer(received), len(received), cookie
        )
        _check(result, "hand-over of a fetch connection")

    def fetch_close(self, store: int) -> None:
        """Close a store's fetch connection, if there is one; no event follows."""
        _check(lib.mp_engine_fetch_close(self._engine, store), "close of a fetch connection")

    def fetch_bytes(self, store: int) -> tuple[int, int]:
        """Bytes sent and received over a store's fetch connections so far."""
        out = ffi.new("uint64_t[2]")
        lib.mp_engine_fetch_bytes(self._engine, store, out, out + 1)
        return int(out[0]), int(out[1])

    def events(self) -> Iterator[Event]:
        """Drain."""
        while True:
            count = _check(
                lib.mp_engine_events(self._engine, self._events, EVENTS_PER_CALL), "events"
            )
            batch = [_event(self._events[index]) for index in range(count)]
            yield from batch
            if count < EVENTS_PER_CALL or self._engine == ffi.NULL:
                return


def _volume_status(raw: Any) -> VolumeStatus:
    """One struct mp_engine_volume, copied."""
    numbers = {
        field.name: int(getattr(raw, field.name))
        for field in fields(VolumeStatus)
        if field.name != "id"
    }
    return VolumeStatus(id=bytes(ffi.buffer(raw.id)), **numbers)


def _event(raw: Any) -> Event:
    """One struct mp_event, copied."""
    return _EVENTS[int(raw.type)](
        volume=bytes(ffi.buffer(raw.volume)),
        status=int(raw.status),
        cookie=int(raw.cookie),
        first_sequence=int(raw.first_sequence),
        last_sequence=int(raw.last_sequence),
        bytes_count=int(raw.bytes),
        message=ffi.string(raw.message).decode("utf-8", "replace"),
    )
