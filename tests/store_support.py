"""A store core in a simulated world, spoken to in frames, as its daemon would.

Happy path: World(sim).format(), open(), then call() or the shorthands put, write, read, checkpoint.
Failure modes: WorldEnded when the simulated world crashed before the reply; statuses are returned,
not raised, but by the shorthands that end in _ok.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from millpond.native import ffi, lib, record
from millpond.native.drivers import Sim, SimOptions
from millpond.native.store import Lineage, StoreCore, StoreOptions, VolumeState, format_store

BLOCK = lib.MP_BLOCK_BYTES
DAEMON = 0
VOLUME = bytes(range(16))
LINEAGE = 77
SEGMENT_BYTES = 256 * 1024
TURNS_MAX = 20000


class WorldEnded(Exception):
    """The simulated crash came before the reply."""


@dataclass(frozen=True)
class Write:
    """Blocks of data at first_block; data b"": trim block_count blocks."""

    first_block: int
    data: bytes = b""
    block_count: int = 0


def fill(seed: int, blocks: int = 1, *, compressible: bool = False) -> bytes:
    """Blocks that tell who wrote them."""
    import random

    source = random.Random(seed)
    if compressible:
        return b"".join((source.randbytes(64) + bytes(64)) * (BLOCK // 128) for _ in range(blocks))
    return source.randbytes(blocks * BLOCK)


def extents_of(write: Write, volume: bytes, sequence: int) -> list[tuple[record.Extent, bytes]]:
    """One write as extents of up to four blocks."""
    if not write.data:
        extent = record.Extent(
            volume, write.first_block, write.block_count, sequence, lib.MP_CODEC_TRIM
        )
        return [(extent, b"")]
    step = lib.MP_EXTENT_BLOCKS * BLOCK
    return [
        record.encode_extent(
            volume,
            write.first_block + start // BLOCK,
            write.data[start : start + step],
            sequence=sequence,
        )
        for start in range(0, len(write.data), step)
    ]


def batch_payload(
    writes: Sequence[Write],
    *,
    first: int,
    last: int | None = None,
    volume: bytes = VOLUME,
    lineage: int = LINEAGE,
    epoch: int = 1,
    parts: int = 1,
) -> bytes:
    """The records of one batch: write i has sequence first + i."""
    last = first + max(len(writes), 1) - 1 if last is None else last
    extents = [
        pair
        for index, write in enumerate(writes)
        for pair in extents_of(write, volume, min(first + index, last))
    ]
    per_part = -(-len(extents) // parts) or 1
    payload = b""
    for index in range(parts):
        chosen = extents[index * per_part : (index + 1) * per_part]
        whole = record.encode_record(
            record.Record(
                type=lib.MP_RECORD_BATCH,
                volume=volume,
                lineage=lineage,
                first_sequence=first,
                last_sequence=last,
                epoch=epoch,
                part_index=index,
                last_of_batch=index == parts - 1,
                extents=tuple(extent for extent, _ in chosen),
            ),
            b"".join(stored for _, stored in chosen),
        )
        payload += whole + bytes(-len(whole) % 8)
    return payload


@dataclass(frozen=True)
class Reply:
    """A reply frame, with the payload copied out."""

    type: int
    status: int
    request_id: int
    payload: bytes


@dataclass(frozen=True)
class ReadReply:
    """A decoded READ_REPLY."""

    status: int
    sequence: int
    data: bytes


def decode_read(reply: Reply) -> ReadReply:
    """Check the pieces and decode the blocks, as a cache would."""
    head = ffi.new("struct mp_read_reply *")
    ffi.memmove(head, reply.payload, ffi.sizeof(head[0]))
    at = ffi.sizeof(head[0])
    pieces = ffi.new("struct mp_piece[]", head.piece_count)
    ffi.memmove(pieces, reply.payload[at : at + ffi.sizeof(pieces)], ffi.sizeof(pieces))
    at += ffi.sizeof(pieces)
    data = b""
    block = head.first_block
    for piece in pieces:
        assert piece.first_block == block
        block += piece.block_count
        stored = reply.payload[at : at + piece.shipped_bytes]
        at += piece.shipped_bytes
        out = ffi.new("uint8_t[]", piece.block_count * BLOCK)
        skip = piece.first_block - piece.extent.first_block
        result = lib.mp_extent_decode(
            ffi.addressof(piece.extent), skip, piece.block_count, stored, len(stored), out
        )
        assert result == 0, result
        data += bytes(ffi.buffer(out))
    assert at == len(reply.payload)
    if reply.status == lib.MP_STATUS_OK:
        assert block == head.first_block + head.block_count
    return ReadReply(reply.status, head.sequence, data)


class World:
    """One simulated disk and the store on it."""

    def __init__(self, options: SimOptions | None = None, **store_options: int) -> None:
        self.sim = Sim(options or SimOptions(latency_ns=1000))
        self.options = StoreOptions(**store_options)
        self.driver: Any = None
        self.core: StoreCore | None = None
        self._request = 0
        self._streams: dict[int, bytes] = {}
        self.replies: dict[int, Reply] = {}

    def close(self) -> None:
        """Free everything."""
        self.shut()
        self.sim.close()

    def shut(self) -> None:
        """Free the core and its driver; the disk stays. Nothing is written."""
        if self.core:
            self.core.close()
            self.core = None
        if self.driver is not None:
            lib.mp_driver_destroy(self.driver)
            self.driver = None
        self._streams = {}
        self.replies = {}

    def format(self, *, segment_bytes: int = SEGMENT_BYTES) -> "World":
        """An empty store."""
        driver = self.sim.driver()
        try:
            format_store(driver, b"s" * 16, segment_bytes=segment_bytes)
        finally:
            lib.mp_driver_destroy(driver)
        return self

    def open(self) -> "World":
        """Recover. StoreOpenError."""
        self.driver = self.sim.driver()
        self.core = StoreCore.open(self.driver, self.options)
        return self

    def reopen(self) -> "World":
        """As after a crash of the daemon."""
        self.shut()
        return self.open()

    @property
    def store(self) -> StoreCore:
        """The open core."""
        assert self.core
        return self.core

    def state(self, volume: bytes = VOLUME) -> VolumeState:
        """The durable state of a volume that must be there."""
        state = self.store.volume(volume)
        assert state
        return state

    # ---- frames ----

    def send(self, frame_type: int, payload: bytes = b"", *, connection: int = DAEMON) -> int:
        """Feed one frame; the id of the request."""
        self._request += 1
        checked = 0 if frame_type == lib.MP_FRAME_BATCH else len(payload)
        frame = record.encode_frame(
            frame_type, payload, checked_bytes=checked, request_id=self._request
        )
        self.store.feed(connection, frame)
        return self._request

    def collect(self) -> None:
        """Take what is ready and cut it into replies."""
        for connection in self.store.ready():
            while data := self.store.take(connection):
                self._streams[connection] = self._streams.get(connection, b"") + data
            stream = self._streams[connection]
            while (found := record.decode_frame(stream)) is not None:
                frame, length = found
                reply = Reply(frame.type, frame.status, frame.request_id, bytes(frame.payload))
                self.replies[reply.request_id] = reply
                stream = stream[length:]
            self._streams[connection] = stream

    def wait(self, request: int) -> Reply:
        """Turn until the reply is there. WorldEnded."""
        for _ in range(TURNS_MAX):
            self.collect()
            if request in self.replies:
                return self.replies.pop(request)
            if self.store.step(1_000_000) < 0:
                raise WorldEnded
        raise AssertionError("no reply: the store hangs")

    def call(self, frame_type: int, payload: bytes = b"", *, connection: int = DAEMON) -> Reply:
        """send and wait."""
        return self.wait(self.send(frame_type, payload, connection=connection))

    def settle(self, turns: int = 200) -> None:
        """Let background work run."""
        for _ in range(turns):
            if self.store.step(10_000_000) < 0:
                raise WorldEnded

    # ---- shorthands ----

    def put(self, state: VolumeState) -> int:
        """PUT_VOLUME; the status."""
        return self.call(lib.MP_FRAME_PUT_VOLUME, state.encode()).status

    def create(self, volume: bytes = VOLUME, *, blocks: int = 4096, epoch: int = 1) -> VolumeState:
        """A volume that is open for writing in LINEAGE."""
        state = VolumeState(
            id=volume,
            name=volume.hex(),
            size_bytes=blocks * BLOCK,
            epoch=epoch,
            lineages=(Lineage(LINEAGE, 1),),
        )
        assert self.put(state) == lib.MP_STATUS_OK
        return state

    def delete(self, volume: bytes = VOLUME) -> int:
        """DELETE_VOLUME; the status."""
        return self.call(lib.MP_FRAME_DELETE_VOLUME, volume).status

    def write(self, writes: Sequence[Write], **how: Any) -> int:
        """BATCH; the status."""
        return self.call(lib.MP_FRAME_BATCH, batch_payload(writes, **how), connection=1).status

    def send_write(self, writes: Sequence[Write], **how: Any) -> int:
        """BATCH without waiting; the request."""
        return self.send(lib.MP_FRAME_BATCH, batch_payload(writes, **how), connection=1)

    def checkpoint(self) -> int:
        """CHECKPOINT; the status."""
        return self.call(lib.MP_FRAME_CHECKPOINT).status

    def read(
        self,
        first_block: int,
        block_count: int,
        *,
        volume: bytes = VOLUME,
        epoch: int = 1,
        minimum: int = 0,
    ) -> ReadReply:
        """READ of at most MP_READ_BLOCKS_MAX blocks."""
        request = ffi.new("struct mp_read_request *")
        ffi.memmove(request.volume, volume, 16)
        request.epoch = epoch
        request.minimum_sequence = minimum
        request.first_block = first_block
        request.block_count = block_count
        payload = bytes(ffi.buffer(request))
        return decode_read(self.call(lib.MP_FRAME_READ, payload, connection=2))

    def image(self, blocks: int, *, volume: bytes = VOLUME, epoch: int = 1) -> bytes:
        """The first blocks of a volume."""
        data = b""
        for first in range(0, blocks, lib.MP_READ_BLOCKS_MAX):
            count = min(lib.MP_READ_BLOCKS_MAX, blocks - first)
            reply = self.read(first, count, volume=volume, epoch=epoch)
            assert reply.status == lib.MP_STATUS_OK, reply.status
            data += reply.data
        return data
