"""The two machines of the simulated world: a hypervisor with its cache device, a box with a store.

Each has one simulated disk that outlives its process.  Happy path: format, open, step, close.
Failure modes: WorldEnded when the disk's crash came, also while opening; whatever else a core
refuses is Illegal: nothing of what is done here gives it a reason.
"""

import errno
import random
from dataclasses import dataclass, field
from typing import Any

from millpond.native import ffi, lib, record
from millpond.native.drivers import Sim, SimOptions, destroy
from millpond.native.engine import Engine, EngineOptions, NativeError
from millpond.native.store import StoreCore, StoreOpenError, StoreOptions, format_store
from sim.oracle import Illegal

KIB = 1 << 10
MIB = 1 << 20
CACHE_ID = b"cache of a test."
STORE_ID = b"store of a test."
SEGMENT_BYTES = 3 * MIB // 2
SEGMENTS = 6
DEVICE_BYTES = 7 * MIB + SEGMENTS * SEGMENT_BYTES + 3 * MIB // 2  # the rest: some 90 slots
SLOT_BYTES = 16384
TURN_NS = 1_000_000
READ_BLOCKS_MAX: int = lib.MP_READ_BLOCKS_MAX


@dataclass(slots=True)
class Pipe:
    """A stream on its way: arrives in pieces, in order."""

    data: bytearray = field(default_factory=bytearray)

    def take(self, rng: random.Random) -> bytes:
        """What arrives now."""
        dice = rng.randrange(8)
        length = 0 if dice == 0 else rng.randrange(len(self.data) + 1) if dice == 1 else None
        taken = bytes(self.data[:length])
        del self.data[:length]
        return taken


class FetchSocket:
    """The engine's fetch connection, and a test at its other end."""

    def __init__(self, sim: Sim, engine: Engine, *, block_status: bool = True) -> None:
        self._sim = sim
        self._socket = sim.socket()
        engine.fetch_open(
            0, self._socket, received=b"", cookie=self._socket, block_status=block_status
        )

    def take(self) -> bytes:
        """READ frames that the engine sent."""
        return self._sim.pop(self._socket)

    def feed(self, data: bytes) -> None:
        """Replies."""
        self._sim.push(self._socket, data)

    def hang_up(self) -> None:
        """As a store that went away."""
        self._sim.hangup(self._socket)


class WorldEnded(Exception):
    """The simulated crash."""


class CacheNode:
    """A cache device and, while it runs, the engine on it."""

    def __init__(self, options: EngineOptions, cache_id: bytes = CACHE_ID) -> None:
        self.options = options
        self.sim = Sim(SimOptions(device_bytes=DEVICE_BYTES))
        self._open: Engine | None = None
        driver = self.sim.driver()
        chosen = ffi.new("struct mp_cache_format_options *")
        chosen.device_bytes, chosen.slot_bytes = DEVICE_BYTES, SLOT_BYTES
        chosen.log_bytes = SEGMENTS * SEGMENT_BYTES
        chosen.segment_bytes, chosen.cache_id = SEGMENT_BYTES, cache_id
        message = ffi.new("char[]", 256)
        result = lib.mp_cache_format(driver, chosen, ffi.NULL, message, 256)
        assert result == 0, ffi.string(message)
        destroy(driver)

    @property
    def engine(self) -> Engine:
        """The running engine."""
        assert self._open is not None
        return self._open

    @property
    def is_up(self) -> bool:
        """It runs."""
        return self._open is not None

    def start(self) -> None:
        """Recover.  WorldEnded, Illegal."""
        driver = self.sim.driver()
        try:
            self._open = Engine.open_driver(driver, self.options)
        except NativeError as error:
            destroy(driver)
            if error.errno == errno.ESHUTDOWN:
                raise WorldEnded from error
            raise Illegal(f"the cache does not open: {error.args[1]}") from error

    def step(self, timeout_ns: int = TURN_NS) -> int:
        """One turn.  WorldEnded."""
        handled = self.engine.step(timeout_ns)
        if handled < 0 or self.sim.crashed:
            raise WorldEnded
        return handled

    def die(self) -> None:
        """As the crash left it, or crash now."""
        self.sim.crash()
        if self._open is not None:
            self._open.free()
            self._open = None


class StoreNode:
    """A store directory and, while it runs, the store core on it."""

    def __init__(self, options: StoreOptions) -> None:
        self.options = options
        self.sim = Sim(SimOptions())
        self._core: StoreCore | None = None
        self._driver: Any = None
        self._request = 0
        self._streams: dict[int, bytearray] = {}
        self.replies: dict[int, record.Frame] = {}  # to our own requests
        driver = self.sim.driver()
        format_store(driver, STORE_ID, segment_bytes=options.segment_bytes)
        destroy(driver)

    @property
    def core(self) -> StoreCore:
        """The running core."""
        assert self._core is not None
        return self._core

    @property
    def is_up(self) -> bool:
        """It runs."""
        return self._core is not None

    def start(self) -> None:
        """Recover.  WorldEnded, Illegal."""
        self._driver = self.sim.driver()
        try:
            self._core = StoreCore.open(self._driver, self.options)
        except StoreOpenError as error:
            destroy(self._driver)
            self._driver = None
            if error.errno == errno.ESHUTDOWN or self.sim.crashed:
                raise WorldEnded from error
            raise Illegal(f"the store does not open: {error}") from error

    def step(self, timeout_ns: int = TURN_NS) -> int:
        """One turn.  WorldEnded."""
        handled = self.core.step(timeout_ns)
        if handled < 0 or self.sim.crashed:
            raise WorldEnded
        return handled

    def die(self) -> None:
        """As the crash left it, or crash now."""
        self.sim.crash()
        if self._core is not None:
            self._core.close()
            destroy(self._driver)
            self._core = self._driver = None
        self._streams.clear()
        self.replies.clear()

    # -- connection 0 and the tester's own, both ours

    def send(self, frame_type: int, payload: bytes, *, connection: int = 0) -> int:
        """Feed a frame; the id of the request."""
        self._request += 1
        self.core.feed(
            connection, record.encode_frame(frame_type, payload, request_id=self._request)
        )
        return self._request

    def collect(self, *connections: int) -> None:
        """Take the replies of connections that are ours."""
        for connection in connections:
            stream = self._streams.setdefault(connection, bytearray())
            while data := self.core.take(connection):
                stream += data
            while (found := record.decode_frame(bytes(stream))) is not None:
                frame, length = found
                self.replies[frame.request_id] = frame
                del stream[:length]

    def call(self, frame_type: int, payload: bytes) -> record.Frame:
        """A frame of the tester's own, and its reply."""
        request = self.send(frame_type, payload, connection=1)
        for _ in range(10_000):
            self.collect(1)
            if request in self.replies:
                return self.replies.pop(request)
            self.step()
        raise Illegal("the store does not answer")

    def image(self, volume: bytes, block_count: int) -> bytes:
        """A volume as the store has it, read frame by frame, verified as a cache would."""
        state = self.core.volume(volume)
        assert state is not None
        requests = []
        for first in range(0, block_count, READ_BLOCKS_MAX):
            wanted = ffi.new("struct mp_read_request *")
            wanted.volume, wanted.epoch, wanted.first_block = volume, state.epoch, first
            wanted.block_count = min(READ_BLOCKS_MAX, block_count - first)
            payload = bytes(ffi.buffer(wanted))
            requests.append(self.send(lib.MP_FRAME_READ, payload, connection=1))
        for _ in range(10_000):
            self.collect(1)
            if all(request in self.replies for request in requests):
                break
            self.step()
        else:
            raise Illegal("the store does not answer a read")
        return b"".join(decode_read_reply(self.replies.pop(request)) for request in requests)


def decode_read_reply(frame: record.Frame) -> bytes:
    """Check the pieces of a READ_REPLY and decode the blocks.  Illegal."""
    if frame.status != lib.MP_STATUS_OK:
        raise Illegal(f"the store refuses a read with status {frame.status}")
    payload = bytes(frame.payload)
    head = ffi.new("struct mp_read_reply *")
    ffi.memmove(head, payload, ffi.sizeof(head[0]))
    pieces = ffi.new("struct mp_piece[]", head.piece_count)
    at = ffi.sizeof(head[0])
    ffi.memmove(pieces, payload[at : at + ffi.sizeof(pieces)], ffi.sizeof(pieces))
    at += ffi.sizeof(pieces)
    out = ffi.new("uint8_t[]", head.block_count * lib.MP_BLOCK_BYTES)
    source = ffi.from_buffer(payload)
    for piece in pieces:
        place = (piece.first_block - head.first_block) * lib.MP_BLOCK_BYTES
        skip = piece.first_block - piece.extent.first_block
        result = lib.mp_extent_decode(
            ffi.addressof(piece.extent),
            skip,
            piece.block_count,
            source + at,
            piece.shipped_bytes,
            out + place,
        )
        if result < 0:
            raise Illegal(f"the store sends a block that does not verify: {result}")
        at += piece.shipped_bytes
    return bytes(ffi.buffer(out))
