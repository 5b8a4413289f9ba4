"""The store's core for Python: one object over the functions of store.h, typed values in and out.

Happy path: format_store once; StoreCore.open(driver) recovers; start() runs the reactor in its own
thread (tests call step() instead); feed() what a socket brought, take() what goes back; stop().
Failure modes: StoreOpenError with one line for the operator; feed() raises ProtocolError when the
peer broke the protocol (an ERROR frame is queued for it); failure() tells why a store acknowledges
nothing any more.  All methods may be called from any thread, but for step(), and feed() from one
thread at a time per connection.
"""

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any

from millpond.native import ffi, lib

__all__ = [
    "Lineage",
    "ProtocolError",
    "ScrubFinding",
    "ScrubKind",
    "StoreCore",
    "StoreOpenError",
    "StoreOptions",
    "VolumeState",
    "format_store",
]

Bytes = bytes | bytearray | memoryview

NO_ID = bytes(16)
_TAKE_BYTES = 1 << 20
_MESSAGE_BYTES = 512


class StoreOpenError(Exception):
    """The store cannot be formatted or opened; the message is one line for the operator."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.errno = code


class ProtocolError(Exception):
    """The peer sent bytes that are no frame, or a frame that has no business here."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """A writable open: its random id, and the sequence it started with."""

    id: int
    first_sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeState:
    """struct mp_volume_state: one entry of the catalogue."""

    id: bytes
    name: str
    size_bytes: int
    epoch: int = 0
    lineage: int = 0
    applied_sequence: int = 0
    parent: bytes = NO_ID
    dirty_holder: bytes = NO_ID
    open_holder: bytes = NO_ID
    created_commit: int = 0
    flags: int = 0
    lineages: tuple[Lineage, ...] = ()

    def encode(self) -> bytes:
        """The payload of a PUT_VOLUME frame.  ValueError when the name is too long."""
        name = self.name.encode()
        if len(name) >= lib.MP_NAME_BYTES or b"\0" in name:
            raise ValueError(f"volume name {self.name!r}: longer than 255 bytes, or has a NUL")
        if len(self.lineages) > lib.MP_LINEAGES:
            raise ValueError(f"volume {self.name}: more than {lib.MP_LINEAGES} lineages")
        state = ffi.new("struct mp_volume_state *")
        for field in ("id", "parent", "dirty_holder", "open_holder"):
            ffi.memmove(getattr(state, field), getattr(self, field), lib.MP_VOLUME_ID_BYTES)
        for field in ("size_bytes", "epoch", "lineage", "applied_sequence", "created_commit"):
            setattr(state, field, getattr(self, field))
        state.flags = self.flags
        ffi.memmove(state.name, name, len(name))
        for index, lineage in enumerate(self.lineages):
            state.lineages[index].id = lineage.id
            state.lineages[index].first_sequence = lineage.first_sequence
        return bytes(ffi.buffer(state))

    @staticmethod
    def decode(state: Any) -> "VolumeState":
        """From a struct mp_volume_state."""
        return VolumeState(
            id=bytes(state.id),
            name=ffi.string(ffi.cast("char *", state.name), lib.MP_NAME_BYTES).decode(
                errors="backslashreplace"  # a damaged one is shown as what it is
            ),
            size_bytes=state.size_bytes,
            epoch=state.epoch,
            lineage=state.lineage,
            applied_sequence=state.applied_sequence,
            parent=bytes(state.parent),
            dirty_holder=bytes(state.dirty_holder),
            open_holder=bytes(state.open_holder),
            created_commit=state.created_commit,
            flags=state.flags,
            lineages=tuple(
                Lineage(entry.id, entry.first_sequence) for entry in state.lineages if entry.id
            ),
        )

    def with_changes(self, **changes: object) -> "VolumeState":
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]  # checked by the constructor


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """struct mp_store_options; 0 takes the default of store.h."""

    segment_bytes: int = 0
    page_cache_bytes: int = 0
    checkpoint_every_bytes: int = 0
    test_faults: int = 0
    scrub_bytes_per_s: int = 0
    scrub_interval_ns: int = 0


class ScrubKind(IntEnum):
    """enum mp_scrub_kind of store.h."""

    EXTENT = lib.MP_SCRUB_EXTENT
    RECORD = lib.MP_SCRUB_RECORD
    TABLE = lib.MP_SCRUB_TABLE
    UNREADABLE = lib.MP_SCRUB_UNREADABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrubFinding:
    """struct mp_scrub_finding: something that does not verify. No blocks: a record."""

    kind: ScrubKind
    volume: bytes
    first_block: int
    block_count: int
    segment: int
    offset_bytes: int


def format_store(driver: Any, store_id: bytes, *, segment_bytes: int = 64 << 20) -> None:
    """Make the empty directory behind driver a store.  StoreOpenError."""
    assert len(store_id) == 16
    code = -lib.mp_store_format(driver, store_id, segment_bytes)
    if code == errno.EEXIST:
        raise StoreOpenError("the directory holds a store already; nothing was changed", code)
    if code == errno.EINVAL:
        raise StoreOpenError(
            f"segments of {segment_bytes} bytes: choose 64 KiB to 1 GiB, a multiple of 4096", code
        )
    if code:
        raise StoreOpenError(f"cannot write the superblocks: {os.strerror(code)}", code)


class StoreCore:
    """An open store.  close() it before its driver is destroyed."""

    def __init__(self, store: Any, driver: Any) -> None:
        """Use open()."""
        self._store = store
        self._driver = driver
        self._buffer = bytearray(_TAKE_BYTES)
        self._view = ffi.from_buffer("uint8_t[]", self._buffer, True)

    @classmethod
    def open(cls, driver: Any, options: StoreOptions | None = None) -> "StoreCore":
        """Recover the store behind driver, which stays the caller's.  StoreOpenError."""
        wanted = options or StoreOptions()
        chosen = ffi.new(
            "struct mp_store_options *",
            {field.name: getattr(wanted, field.name) for field in fields(wanted)},
        )
        error = ffi.new("int *")
        message = ffi.new("char[]", _MESSAGE_BYTES)
        store = lib.mp_store_open(driver, chosen, error, message, _MESSAGE_BYTES)
        if store == ffi.NULL:
            raise StoreOpenError(ffi.string(message).decode(), -error[0])
        return cls(store, driver)

    def close(self) -> None:
        """Free the core; stop() it first, or lose what was not acknowledged."""
        if self._store != ffi.NULL:
            lib.mp_store_free(self._store)
            self._store = ffi.NULL

    def start(self) -> None:
        """Run the reactor in a thread of its own."""
        if code := lib.mp_store_start(self._living()):
            raise OSError(-code, os.strerror(-code))

    def stop(self) -> None:
        """Finish what was accepted, write a checkpoint, end the thread.  Blocks."""
        lib.mp_store_stop(self._living())

    def step(self, timeout_ns: int = 0) -> int:
        """One turn of the reactor (tests): events handled, or -errno when the world ended."""
        return lib.mp_store_step(self._living(), timeout_ns)

    def feed(self, connection: int, data: Bytes) -> None:
        """Bytes a connection brought: whole or partial frames.  ProtocolError."""
        code = -lib.mp_store_feed(self._living(), connection, ffi.from_buffer(data), len(data))
        if code == errno.ESHUTDOWN:
            raise ProtocolError("the store is stopping")
        if code:
            raise ProtocolError(f"not a frame this store takes: {os.strerror(code)}")

    def take(self, connection: int, capacity_bytes: int = _TAKE_BYTES) -> bytes:
        """Bytes to send on a connection; b"" when there are none."""
        capacity_bytes = min(capacity_bytes, _TAKE_BYTES)
        got = lib.mp_store_take(self._living(), connection, self._view, capacity_bytes)
        return bytes(memoryview(self._buffer)[:got])

    def ready(self, capacity: int = 1024) -> list[int]:
        """Connections that have bytes to take; call again after taking them."""
        out = ffi.new("uint64_t[]", capacity)
        return list(out[0 : lib.mp_store_ready(self._living(), out, capacity)])

    def connect(self, connection: int, fd: int, *, received: Bytes, greeting: bytes) -> None:
        """Hand over a socket after its handshake.  OSError: fd stays the caller's."""
        code = -lib.mp_store_connect(
            self._living(),
            connection,
            fd,
            ffi.from_buffer(received),
            len(received),
            greeting,
            len(greeting),
        )
        if code:
            raise OSError(code, os.strerror(code))

    def ended(self, capacity: int = 64) -> list[int]:
        """Connections whose sockets are gone; call again while it returns capacity of them."""
        out = ffi.new("uint64_t[]", capacity)
        return list(out[0 : lib.mp_store_ended(self._living(), out, capacity)])

    def hangup(self, connection: int) -> None:
        """The connection is gone: drop its streams; what was accepted goes on."""
        lib.mp_store_hangup(self._living(), connection)

    def pending_bytes(self, connection: int) -> int:
        """Bytes of frames that are not answered yet: stop reading above a limit."""
        return lib.mp_store_pending_bytes(self._living(), connection)

    def volume(self, volume_id: bytes) -> VolumeState | None:
        """The durable state of a volume; None: unknown."""
        state = ffi.new("struct mp_volume_state *")
        if lib.mp_store_get_volume(self._living(), volume_id, state):
            return None
        return VolumeState.decode(state)

    def volumes(self) -> list[VolumeState]:
        """The durable state of all volumes, in no particular order."""
        capacity = 64
        while True:
            states = ffi.new("struct mp_volume_state[]", capacity)
            count = lib.mp_store_list_volumes(self._living(), states, capacity)
            if count < capacity:
                return [VolumeState.decode(states[index]) for index in range(count)]
            capacity *= 4

    def volume_bytes(self, volume_id: bytes) -> int:
        """Stored bytes reachable from a volume's map, approximately."""
        return lib.mp_store_volume_bytes(self._living(), volume_id)

    def counters(self) -> Mapping[str, int]:
        """struct mp_store_counters, as of the end of the last turn."""
        out = ffi.new("struct mp_store_counters *")
        lib.mp_store_counters(self._living(), out)
        return {name: getattr(out, name) for name, _ in ffi.typeof(out[0]).fields}

    def scrub_findings(self, capacity: int = 64) -> list[ScrubFinding]:
        """What scrubbing found since the last call."""
        out = ffi.new("struct mp_scrub_finding[]", capacity)
        count = lib.mp_store_scrub_findings(self._living(), out, capacity)
        return [
            ScrubFinding(
                kind=ScrubKind(found.kind),
                volume=bytes(found.volume),
                first_block=found.first_block,
                block_count=found.block_count,
                segment=found.segment,
                offset_bytes=found.offset_bytes,
            )
            for found in out[0:count]
        ]

    def failure(self) -> str | None:
        """Why the store acknowledges nothing any more; None: it is well."""
        message = ffi.new("char[]", _MESSAGE_BYTES)
        if not lib.mp_store_failure(self._living(), message, _MESSAGE_BYTES):
            return None
        return ffi.string(message).decode()

    def _living(self) -> Any:
        """The core.  A call after close() is our error, and must not reach freed memory."""
        assert self._store != ffi.NULL, "the store core is closed"
        return self._store
