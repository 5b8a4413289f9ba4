"""Records, extents and frames for Python: typed values in and out of the C codec.

Thin: layout, limits and checksums are C's (record.h); this module only moves fields
between dataclasses and C structs.  Used by the wire, by imports and by tests; the data
path does not come through here.

Happy path: encode_* returns bytes; decode_* returns values, or None when more bytes are
needed.  Failure modes: OSError with errno EBADMSG (checksum), EPROTO (malformed) or
ENOTSUP (newer format); ValueError where the caller passed what no record can hold.
"""

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from millpond.native import check, ffi, lib

__all__ = [
    "Extent",
    "Frame",
    "Record",
    "batch_capacity_bytes",
    "block_checksum",
    "check_payload",
    "decode_extent",
    "decode_frame",
    "decode_record",
    "encode_batch",
    "encode_extent",
    "encode_frame",
    "encode_record",
    "iterate_records",
    "verify_extent",
    "volume_seed",
    "xxh3",
]

Bytes = bytes | bytearray | memoryview

_NO_ID = bytes(16)


@dataclass(frozen=True, slots=True)
class Extent:
    """One entry of a record's table; checksums are the nonzero ones (see struct mp_extent)."""

    origin: bytes
    first_block: int
    block_count: int
    sequence: int
    codec: int
    stored_length_bytes: int = 0
    checksums: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """A record's header and table; lengths are filled by decode_record."""

    type: int
    volume: bytes = _NO_ID
    lineage: int = 0
    first_sequence: int = 0
    last_sequence: int = 0
    epoch: int = 0
    part_index: int = 0
    last_of_batch: bool = False
    extents: tuple[Extent, ...] = ()
    incarnation: int = 0
    previous_checksum: int = 0
    segment_ordinal: int = 0
    segment_offset_bytes: int = 0
    synced_sequence: int = 0
    checksum: int = 0
    header_length_bytes: int = 0
    payload_length_bytes: int = 0

    @property
    def length_bytes(self) -> int:
        """Of the whole record, without the padding that follows it in a batch or a group."""
        return self.header_length_bytes + self.payload_length_bytes


@dataclass(frozen=True, slots=True)
class Frame:
    """A wire frame. payload is whole; its first checked_bytes were verified with the header."""

    type: int
    payload: Bytes
    checked_bytes: int
    request_id: int = 0
    status: int = 0
    trace_id: int = 0
    tenant: int = 0
    deadline_ns: int = 0


# ---- checksums ----


def xxh3(data: Bytes) -> int:
    """XXH3-64 of data, 0 mapped to 1."""
    return lib.mp_xxh3(ffi.from_buffer(data), len(data))


def volume_seed(volume: bytes) -> int:
    """The part of every data checksum's seed that a volume contributes."""
    return lib.mp_volume_seed(_id(volume))


def block_checksum(seed: int, block: int, data: Bytes) -> int:
    """Checksum of the bytes stored for block of the volume whose volume_seed is seed."""
    return lib.mp_block_checksum(seed, block, ffi.from_buffer(data), len(data))


# ---- extents ----


def encode_extent(
    origin: bytes, first_block: int, data: Bytes, *, sequence: int = 0
) -> tuple[Extent, bytes]:
    """The extent and stored bytes of 1 to MP_EXTENT_BLOCKS whole blocks."""
    block_count, rest = divmod(len(data), lib.MP_BLOCK_BYTES)
    if rest or not 1 <= block_count <= lib.MP_EXTENT_BLOCKS:
        raise ValueError(
            f"an extent holds 1 to {lib.MP_EXTENT_BLOCKS} blocks, not {len(data)} bytes"
        )
    if not 0 <= first_block <= 2**51 - 1 - block_count:
        raise ValueError(f"no volume has a block {first_block}")
    extent = ffi.new("struct mp_extent *")
    out = ffi.new("uint8_t[]", len(data))
    stored_bytes = lib.mp_extent_encode(
        extent, _id(origin), first_block, block_count, ffi.from_buffer(data), out
    )
    extent.sequence = sequence
    return _extent_from(extent), bytes(ffi.buffer(out, stored_bytes))


def decode_extent(
    extent: Extent, stored: Bytes, *, skip_blocks: int = 0, block_count: int | None = None
) -> bytes:
    """The wanted blocks (default: all). stored: raw: just those; compressed: the whole extent."""
    count = extent.block_count - skip_blocks if block_count is None else block_count
    out = ffi.new("uint8_t[]", count * lib.MP_BLOCK_BYTES)
    source = ffi.from_buffer(stored)
    check(lib.mp_extent_decode(_extent_to(extent), skip_blocks, count, source, len(stored), out))
    return bytes(ffi.buffer(out))


def verify_extent(
    extent: Extent, stored: Bytes, *, skip_blocks: int = 0, block_count: int | None = None
) -> None:
    """decode_extent without the decoding: OSError when the bytes are not the extent's."""
    count = extent.block_count - skip_blocks if block_count is None else block_count
    source = ffi.from_buffer(stored)
    check(lib.mp_extent_verify(_extent_to(extent), skip_blocks, count, source, len(stored)))


# ---- records ----


def encode_record(record: Record, payload: Bytes = b"") -> bytes:
    """Seal a record around its payload: the stored bytes of its extents, in order, or its own.

    Lengths and checksum of record are computed, whatever it says.
    """
    in_log = record.type in (lib.MP_RECORD_LOG, lib.MP_RECORD_SYNCED)
    header_length_bytes = lib.MP_RECORD_HEADER_BYTES + len(record.extents) * lib.MP_EXTENT_BYTES
    if in_log:
        header_length_bytes = -(-header_length_bytes // lib.MP_BLOCK_BYTES) * lib.MP_BLOCK_BYTES
    if len(record.extents) > lib.MP_RECORD_EXTENTS_MAX:
        raise ValueError(f"a record holds at most {lib.MP_RECORD_EXTENTS_MAX} extents")
    if len(payload) > lib.MP_RECORD_PAYLOAD_MAX:
        raise ValueError(f"a record holds at most {lib.MP_RECORD_PAYLOAD_MAX} bytes of payload")
    if not lib.MP_RECORD_LOG <= record.type <= lib.MP_RECORD_DELETE:
        raise ValueError(f"no record has type {record.type}")
    memory = ffi.new("uint64_t[]", (header_length_bytes + len(payload) + 7) // 8)
    header = ffi.cast("struct mp_record *", memory)
    for name in _RECORD_FIELDS:
        setattr(header, name, getattr(record, name))
    header.volume[0:16] = _id(record.volume)
    header.flags = lib.MP_RECORD_LAST_OF_BATCH if record.last_of_batch else 0
    header.extent_count = len(record.extents)
    header.header_length_bytes = header_length_bytes
    header.payload_length_bytes = len(payload)
    if record.type in (lib.MP_RECORD_VOLUME, lib.MP_RECORD_PAGES, lib.MP_RECORD_CHECKPOINT):
        header.payload_checksum = xxh3(payload)
    view = memoryview(ffi.buffer(memory)).cast("B")
    for index, extent in enumerate(record.extents):
        start = lib.MP_RECORD_HEADER_BYTES + index * lib.MP_EXTENT_BYTES
        view[start : start + lib.MP_EXTENT_BYTES] = bytes(ffi.buffer(_extent_to(extent)))
    lib.mp_record_seal(header)
    length_bytes = header_length_bytes + len(payload)
    view[header_length_bytes:length_bytes] = payload
    return bytes(view[:length_bytes])


def decode_record(data: Bytes) -> Record | None:
    """Header and table of the record at the start of data; None when they are not all there.

    The payload is not looked at and need not be there: see check_payload.
    """
    source = ffi.from_buffer(data)
    length_bytes = lib.mp_record_check(source, len(data))
    if length_bytes == -errno.EAGAIN:
        return None
    check(length_bytes)
    header = ffi.new("struct mp_record *")
    ffi.memmove(header, data, lib.MP_RECORD_HEADER_BYTES)
    table = ffi.new("struct mp_extent[]", header.extent_count)
    ffi.memmove(table, source + lib.MP_RECORD_HEADER_BYTES, ffi.sizeof(table))
    return Record(
        volume=bytes(header.volume),
        last_of_batch=bool(header.flags & lib.MP_RECORD_LAST_OF_BATCH),
        extents=tuple(_extent_from(extent) for extent in table),
        checksum=header.checksum,
        header_length_bytes=header.header_length_bytes,
        payload_length_bytes=header.payload_length_bytes,
        **{name: getattr(header, name) for name in _RECORD_FIELDS},
    )


def check_payload(data: Bytes) -> None:
    """Verify the payload of the whole record at the start of data, which decode_record accepted."""
    check(lib.mp_record_check_payload(ffi.from_buffer(data), len(data)))


def iterate_records(data: Bytes) -> Iterator[tuple[Record, memoryview]]:
    """The verified records of a BATCH payload or of a group's inside, each with its bytes."""
    view = memoryview(data)
    while view:
        record = decode_record(view)
        if record is None or record.length_bytes > len(view):
            raise OSError(errno.EPROTO, "record cut off")
        whole = view[: record.length_bytes]
        check_payload(whole)
        yield record, whole
        view = view[-(-record.length_bytes // 8) * 8 :]


def batch_capacity_bytes(block_count: int) -> int:
    """Room that encode_batch needs at most: every block raw, in an extent of its own."""
    extents_bytes = block_count * (lib.MP_BLOCK_BYTES + lib.MP_EXTENT_BYTES)
    parts = block_count // (lib.MP_RECORD_PAYLOAD_MAX // lib.MP_BLOCK_BYTES) + 2
    return extents_bytes + parts * (lib.MP_RECORD_HEADER_BYTES + 8)


def encode_batch(
    volume: bytes, *, lineage: int, epoch: int, first_sequence: int, first_block: int, data: Bytes
) -> tuple[bytes, int]:
    """A BATCH payload of all blocks of data, and its last sequence. OSError ENOSPC: too much."""
    block_count, rest = divmod(len(data), lib.MP_BLOCK_BYTES)
    if rest:
        raise ValueError(f"{len(data)} bytes are not whole blocks")
    capacity_bytes = min(batch_capacity_bytes(block_count), lib.MP_FRAME_PAYLOAD_MAX)
    out = ffi.new("uint64_t[]", capacity_bytes // 8)
    last_sequence = ffi.new("uint64_t *")
    length_bytes = check(
        lib.mp_batch_encode(
            _id(volume),
            lineage,
            epoch,
            first_sequence,
            first_block,
            block_count,
            ffi.from_buffer(data),
            out,
            capacity_bytes // 8 * 8,
            last_sequence,
        )
    )
    return bytes(ffi.buffer(out, length_bytes)), last_sequence[0]


# ---- frames ----


def encode_frame(
    frame_type: int,
    payload: Bytes | Sequence[Bytes] = b"",
    *,
    checked_bytes: int | None = None,
    request_id: int = 0,
    status: int = 0,
    trace_id: int = 0,
    tenant: int = 0,
    deadline_ns: int = 0,
) -> bytes:
    """A sealed frame. checked_bytes (default: all) may be less only where records follow."""
    body = payload if isinstance(payload, bytes | bytearray | memoryview) else b"".join(payload)
    checked = len(body) if checked_bytes is None else checked_bytes
    carries_records = frame_type in (
        lib.MP_FRAME_READ_REPLY,
        lib.MP_FRAME_BATCH,
        lib.MP_FRAME_PUT_VOLUME,
    )
    if len(body) > lib.MP_FRAME_PAYLOAD_MAX:
        raise ValueError(f"a frame holds at most {lib.MP_FRAME_PAYLOAD_MAX} bytes of payload")
    if not 0 <= checked <= len(body) or (checked < len(body) and not carries_records):
        raise ValueError(
            f"frame type {frame_type} cannot leave {len(body) - checked} bytes unchecked"
        )
    memory = ffi.new("uint64_t[]", (lib.MP_FRAME_HEADER_BYTES + len(body) + 7) // 8)
    header = ffi.cast("struct mp_frame *", memory)
    header.type = frame_type
    header.payload_bytes = len(body)
    header.checked_bytes = checked
    header.request_id = request_id
    header.status = status
    header.trace_id = trace_id
    header.tenant = tenant
    header.deadline_ns = deadline_ns
    view = memoryview(ffi.buffer(memory)).cast("B")
    view[lib.MP_FRAME_HEADER_BYTES : lib.MP_FRAME_HEADER_BYTES + len(body)] = body
    lib.mp_frame_seal(header)
    return bytes(view[: lib.MP_FRAME_HEADER_BYTES + len(body)])


def decode_frame(data: Bytes) -> tuple[Frame, int] | None:
    """The frame at the start of data and its length; None when it is not all there.

    The payload is a view into data.
    """
    length_bytes = lib.mp_frame_check(ffi.from_buffer(data), len(data))
    if length_bytes == -errno.EAGAIN:
        return None
    if check(length_bytes) > len(data):
        return None
    header = ffi.new("struct mp_frame *")
    ffi.memmove(header, data, lib.MP_FRAME_HEADER_BYTES)
    return Frame(
        type=header.type,
        payload=memoryview(data)[lib.MP_FRAME_HEADER_BYTES : length_bytes],
        checked_bytes=header.checked_bytes,
        request_id=header.request_id,
        status=header.status,
        trace_id=header.trace_id,
        tenant=header.tenant,
        deadline_ns=header.deadline_ns,
    ), length_bytes


# ---- fields ----

_RECORD_FIELDS = (
    "type",
    "lineage",
    "first_sequence",
    "last_sequence",
    "epoch",
    "part_index",
    "incarnation",
    "previous_checksum",
    "segment_ordinal",
    "segment_offset_bytes",
    "synced_sequence",
)


def _id(volume: bytes) -> bytes:
    if len(volume) != lib.MP_VOLUME_ID_BYTES:
        raise ValueError(f"a volume id has {lib.MP_VOLUME_ID_BYTES} bytes, not {len(volume)}")
    return volume


def _extent_to(extent: Extent) -> Any:
    """As struct mp_extent *."""
    out = ffi.new("struct mp_extent *")
    out.origin[0:16] = _id(extent.origin)
    out.first_block = extent.first_block
    out.block_count = extent.block_count
    out.sequence = extent.sequence
    out.stored_length_bytes = extent.stored_length_bytes
    out.codec = extent.codec
    out.checksum = extent.checksums
    return out


def _extent_from(extent: Any) -> Extent:
    return Extent(
        origin=bytes(extent.origin),
        first_block=extent.first_block,
        block_count=extent.block_count,
        sequence=extent.sequence,
        codec=extent.codec,
        stored_length_bytes=extent.stored_length_bytes,
        checksums=tuple(value for value in extent.checksum if value),
    )
