"""The plain twin of native/record.c: formats with struct, LZ4 and XXH3 from PyPI's bindings.

Written from format.h alone and shares no code with the C side.  Readable before fast: the
tests compare the two, and the golden images are made with this one.

Results follow the C convention: >= 0, or -errno.
"""

import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import lz4.block  # type: ignore[import-untyped]  # ships no types
import xxhash

BLOCK = 4096
EXTENT_BLOCKS = 4
EXTENTS_MAX = 8192
RECORD_PAYLOAD_MAX = 4 << 20
FRAME_PAYLOAD_MAX = 16 << 20
PARTS_MAX = 64
BLOCK_LIMIT = (2**63 - 1) // BLOCK
NONE, LZ4, ZSTD, ZERO, TRIM = 1, 2, 3, 4, 5
LOG, BATCH, SYNCED, VOLUME, PAGES, CHECKPOINT, DELETE = range(1, 8)
LAST_OF_BATCH = 1
READ_REPLY, BATCH_FRAME, PUT_VOLUME = 6, 7, 9
REPLIES = {2, 4, 6, 8, 10, 12, 14, 15, 18}

RECORD = struct.Struct("<8sQHHIII16sQQQQIIQQIIQQQQQQ32s")
EXTENT = struct.Struct("<16sQQQIB3s4Q24s16s")
FRAME = struct.Struct("<IHHQIIIIQQIIQ")
GROUP = struct.Struct("<8sQHHI7Q6Q")
CACHE_SUPER = struct.Struct("<8sQIIII16sQII7Q2Q5QII3912s")
STORE_SUPER = struct.Struct("<8sQIIII16s7Q3992s")
VOLUME_STATE = struct.Struct("<16s16s16s16s6Q16Q256s192s")
RECORD_MAGIC = b"MPNDREC1"
FRAME_MAGIC = 0x31444E4D


# ---- checksums ----


def xxh3(data: bytes, seed: int = 0) -> int:
    """XXH3-64, never 0."""
    return xxhash.xxh3_64_intdigest(data, seed) or 1


def mix(value: int) -> int:
    """splitmix64's finalizer."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def data_checksum(volume: bytes, block: int, data: bytes) -> int:
    """Of stored bytes that begin at block of volume."""
    return xxh3(data, xxh3(volume) ^ mix(block))


def looks_random(data: bytes) -> bool:
    """Pairs of equal bytes in sixteen stretches of 32 bytes are as rare as chance would have it."""
    if len(data) < 512:
        return False
    step = len(data) // 16
    sample = b"".join(data[i * step : i * step + 32] for i in range(16))
    pairs = sum(n * (n - 1) // 2 for n in map(sample.count, range(256)))
    return 420 <= pairs <= 602


# ---- extents ----


@dataclass(frozen=True)
class Extent:
    """struct mp_extent, field by field."""

    origin: bytes = bytes(16)
    first_block: int = 0
    block_count: int = 1
    sequence: int = 1
    stored_length_bytes: int = 0
    codec: int = ZERO
    reserved0: bytes = bytes(3)
    checksum: tuple[int, ...] = (0, 0, 0, 0)
    nonce: bytes = bytes(24)
    tag: bytes = bytes(16)

    def pack(self) -> bytes:
        """The 120 bytes."""
        values: list[object] = []
        for f in fields(self):
            value = getattr(self, f.name)
            values.extend(value if isinstance(value, tuple) else [value])
        return EXTENT.pack(*values)

    @staticmethod
    def unpack(data: bytes) -> "Extent":
        """From 120 bytes."""
        v = EXTENT.unpack(data)
        return Extent(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7:11], v[11], v[12])


def check_extent(extent: Extent) -> int:
    """0 or -errno, by the rules of format.h and record.h."""
    data_blocks = {NONE: extent.block_count, LZ4: 1, ZERO: 0, TRIM: 0}
    if extent.codec == ZSTD:
        return -errno.ENOTSUP
    raw = extent.block_count * BLOCK
    good = (
        extent.codec in data_blocks
        and extent.block_count >= 1
        and extent.first_block + extent.block_count <= BLOCK_LIMIT
        and (extent.codec != NONE or extent.stored_length_bytes == raw)
        and (extent.codec != LZ4 or 0 < extent.stored_length_bytes < raw)
        and (extent.codec not in (ZERO, TRIM) or extent.stored_length_bytes == 0)
        and (extent.codec not in (NONE, LZ4) or extent.block_count <= EXTENT_BLOCKS)
        and (extent.codec not in (NONE, LZ4) or any(extent.origin))
        and all((c != 0) == (i < data_blocks[extent.codec]) for i, c in enumerate(extent.checksum))
        and not any(extent.reserved0 + extent.nonce + extent.tag)
    )
    return 0 if good else -errno.EPROTO


def encode_extent(
    origin: bytes, first_block: int, data: bytes, sequence: int = 1
) -> tuple[Extent, bytes]:
    """What the C side may produce (another LZ4 version may pack differently)."""
    count = len(data) // BLOCK
    extent = Extent(origin, first_block, count, sequence)
    if not any(data):
        return extent, b""
    packed = lz4.block.compress(data, store_size=False)
    if not looks_random(data) and len(packed) <= len(data) - len(data) // 8:
        return lz4_extent(extent, packed), packed
    sums = [
        data_checksum(origin, first_block + i, data[i * BLOCK : (i + 1) * BLOCK])
        for i in range(count)
    ]
    sums += [0] * (4 - count)
    return replace(extent, codec=NONE, stored_length_bytes=len(data), checksum=tuple(sums)), data


def lz4_extent(extent: Extent, packed: bytes) -> Extent:
    """extent, stored as packed."""
    checksum = data_checksum(extent.origin, extent.first_block, packed)
    return replace(extent, codec=LZ4, stored_length_bytes=len(packed), checksum=(checksum, 0, 0, 0))


def decode_extent(extent: Extent, stored: bytes) -> bytes:
    """All blocks of an extent; AssertionError when it does not verify."""
    assert check_extent(extent) == 0
    assert len(stored) == extent.stored_length_bytes
    if extent.codec in (ZERO, TRIM):
        return bytes(extent.block_count * BLOCK)
    if extent.codec == LZ4:
        assert data_checksum(extent.origin, extent.first_block, stored) == extent.checksum[0]
        raw = lz4.block.decompress(stored, uncompressed_size=extent.block_count * BLOCK)
        assert len(raw) == extent.block_count * BLOCK
        return bytes(raw)
    for i in range(extent.block_count):
        block = stored[i * BLOCK : (i + 1) * BLOCK]
        assert data_checksum(extent.origin, extent.first_block + i, block) == extent.checksum[i]
    return stored


# ---- records ----


@dataclass(frozen=True)
class Record:
    """struct mp_record, field by field, with its table. None: computed by pack."""

    type: int
    magic: bytes = RECORD_MAGIC
    version: int = 1
    flags: int = 0
    compatible_features: int = 0
    incompatible_features: int = 0
    volume: bytes = bytes(16)
    lineage: int = 0
    first_sequence: int = 0
    last_sequence: int = 0
    epoch: int = 0
    part_index: int = 0
    extent_count: int | None = None
    header_length_bytes: int | None = None
    payload_length_bytes: int | None = None
    cipher: int = 0
    key_id: int = 0
    incarnation: int = 0
    previous_checksum: int = 0
    segment_ordinal: int = 0
    segment_offset_bytes: int = 0
    synced_sequence: int = 0
    payload_checksum: int | None = None
    reserved: bytes = bytes(32)
    extents: Sequence[Extent] = field(default=())
    payload: bytes = b""
    padding: bytes = b""


def header_length(record_type: int, extent_count: int) -> int:
    """Where the payload starts."""
    length = RECORD.size + extent_count * EXTENT.size
    return -(-length // BLOCK) * BLOCK if record_type in (LOG, SYNCED) else length


def pack_record(r: Record) -> bytes:
    """Sealed: the checksum fits whatever the fields say."""
    count = len(r.extents) if r.extent_count is None else r.extent_count
    table = b"".join(e.pack() for e in r.extents) + r.padding
    length = header_length(r.type, len(r.extents))
    own = r.type in (VOLUME, PAGES, CHECKPOINT)
    behind = RECORD.pack(
        r.magic,
        0,
        r.version,
        r.type,
        r.flags,
        r.compatible_features,
        r.incompatible_features,
        r.volume,
        r.lineage,
        r.first_sequence,
        r.last_sequence,
        r.epoch,
        r.part_index,
        count,
        length if r.header_length_bytes is None else r.header_length_bytes,
        len(r.payload) if r.payload_length_bytes is None else r.payload_length_bytes,
        r.cipher,
        r.key_id,
        r.incarnation,
        r.previous_checksum,
        r.segment_ordinal,
        r.segment_offset_bytes,
        r.synced_sequence,
        (xxh3(r.payload) if own else 0) if r.payload_checksum is None else r.payload_checksum,
        r.reserved,
    )
    body = (behind + table).ljust(length, b"\0")
    return body[:8] + struct.pack("<Q", xxh3(body[16:])) + body[16:] + r.payload


def unpack_record(data: bytes) -> Record:
    """Fields as they are, unchecked; data holds header and table."""
    v = RECORD.unpack_from(data)
    count, length, payload_length = v[13], v[14], v[15]
    end = RECORD.size + count * EXTENT.size
    starts = range(RECORD.size, end, EXTENT.size)
    names = [f.name for f in fields(Record)]
    return Record(
        **dict(zip(names, (v[3], v[0], v[2], *v[4:]), strict=False)),
        extents=[Extent.unpack(data[at : at + EXTENT.size]) for at in starts],
        payload=data[length : length + payload_length],
        padding=data[end:length],
    )


def check_record(data: bytes) -> int:
    """Length of the record at the start of data, or -errno: what mp_record_check says."""
    if len(data) < RECORD.size:
        return -errno.EAGAIN
    v = RECORD.unpack_from(data)
    if v[0] == RECORD_MAGIC and v[2] != 1:
        return -errno.ENOTSUP
    if v[0] != RECORD_MAGIC or not plausible(v[3], v[13], v[14], v[15]):
        return -errno.EPROTO
    if len(data) < v[14]:
        return -errno.EAGAIN
    if v[1] != xxh3(data[16 : v[14]]):
        return -errno.EBADMSG
    record = unpack_record(data)
    if record.incompatible_features:
        return -errno.ENOTSUP
    if not all(rules(record)):
        return -errno.EPROTO
    if error := check_table(record) if record.type in (LOG, BATCH) else 0:
        return error
    return -errno.EPROTO if any(record.padding) else int(v[14] + v[15])


def plausible(kind: int, count: int, length: int, payload_length: int) -> bool:
    """What must hold of the lengths before anything behind the header is looked at."""
    return (
        LOG <= kind <= DELETE
        and count <= EXTENTS_MAX
        and payload_length <= RECORD_PAYLOAD_MAX
        and length == header_length(kind, count)
    )


def check_table(record: Record) -> int:
    """0, or the error of the first extent that is wrong."""
    for extent in record.extents:
        if error := check_extent(extent):
            return error
        if not record.first_sequence <= extent.sequence <= record.last_sequence:
            return -errno.EPROTO
        if record.type == LOG and extent.codec == LZ4:
            return -errno.EPROTO
    stored = sum(e.stored_length_bytes for e in record.extents)
    return 0 if stored == record.payload_length_bytes else -errno.EPROTO


def rules(r: Record) -> list[bool]:
    """What must hold of the header's fields among themselves."""
    with_extents = r.type in (LOG, BATCH)
    with_payload = r.type in (VOLUME, PAGES, CHECKPOINT)
    link = (r.incarnation, r.previous_checksum, r.segment_ordinal, r.segment_offset_bytes)
    return [
        r.flags in ((0, LAST_OF_BATCH) if r.type == BATCH else (0,)),
        r.part_index < (PARTS_MAX if r.type == BATCH else 1),
        r.cipher == 0 and r.key_id == 0 and not any(r.reserved),
        (1 if with_extents else 0) <= r.first_sequence <= r.last_sequence < 2**64 - 1,
        r.type in (PAGES, CHECKPOINT) or any(r.volume),
        with_extents or r.extent_count == 0,
        with_extents or with_payload or r.payload_length_bytes == 0,
        r.type != VOLUME or r.payload_length_bytes == VOLUME_STATE.size,
        (r.payload_checksum != 0) == with_payload,
        r.type in (LOG, SYNCED) or not any((*link, r.synced_sequence)),
        r.segment_offset_bytes % BLOCK == 0,
    ]


# ---- batches and frames ----


def unpack_batch(data: bytes) -> list[Record]:
    """The records of a BATCH payload; AssertionError when it is not one."""
    records = []
    while data:
        length = check_record(data)
        assert 0 < length <= len(data)
        records.append(unpack_record(data))
        padded = -(-length // 8) * 8
        assert not any(data[length:padded])
        data = data[padded:]
    return records


def extents_of(record: Record) -> list[tuple[Extent, bytes]]:
    """Each extent with its stored bytes."""
    out, at = [], 0
    for extent in record.extents:
        out.append((extent, record.payload[at : at + extent.stored_length_bytes]))
        at += extent.stored_length_bytes
    assert at == len(record.payload)
    return out


def split_runs(first_block: int, data: bytes) -> list[tuple[int, int, bool]]:
    """(first, count, zero) of the extents that a flat range becomes."""
    runs: list[tuple[int, int, bool]] = []
    for i in range(len(data) // BLOCK):
        block, zero = first_block + i, not any(data[i * BLOCK : (i + 1) * BLOCK])
        if runs and runs[-1][2] == zero and (zero or block % EXTENT_BLOCKS):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, zero)
        else:
            runs.append((block, 1, zero))
    return runs


def pack_frame(
    kind: int,
    payload: bytes = b"",
    *,
    checked_bytes: int | None = None,
    payload_bytes: int | None = None,
    magic: int = FRAME_MAGIC,
    version: int = 1,
    status: int = 0,
    flags: int = 0,
    request_id: int = 0,
    trace_id: int = 0,
    tenant: int = 0,
    reserved: int = 0,
    deadline_ns: int = 0,
) -> bytes:
    """Sealed: the checksum fits whatever the fields say."""
    length = len(payload) if payload_bytes is None else payload_bytes
    checked = length if checked_bytes is None else checked_bytes
    header = FRAME.pack(
        magic, version, kind, 0, length, checked, status, flags,
        request_id, trace_id, tenant, reserved, deadline_ns,
    )  # fmt: skip
    checksum = frame_checksum(header + payload[:checked])
    return header[:8] + struct.pack("<Q", checksum) + header[16:] + payload


def frame_checksum(data: bytes) -> int:
    """Over all of data but the checksum's own place: what stands before it is the seed."""
    return xxh3(data[16:], int.from_bytes(data[:8], "little"))


def check_frame(data: bytes) -> int:
    """Length of the frame at the start of data, or -errno: what mp_frame_check says."""
    if len(data) < FRAME.size:
        return -errno.EAGAIN
    magic, version, kind, checksum, length, checked, status, flags, *rest = FRAME.unpack_from(data)
    if magic != FRAME_MAGIC:
        return -errno.EPROTO
    if version != 1:
        return -errno.ENOTSUP
    if length > FRAME_PAYLOAD_MAX or checked > length:
        return -errno.EPROTO
    if len(data) < FRAME.size + checked:
        return -errno.EAGAIN
    if checksum != frame_checksum(data[: FRAME.size + checked]):
        return -errno.EBADMSG
    good = (
        1 <= kind <= 18
        and kind != 16
        and flags == 0
        and rest[3] == 0
        and (status == 0 or kind in REPLIES)
        and (checked == length or kind in (READ_REPLY, BATCH_FRAME, PUT_VOLUME))
    )
    return FRAME.size + length if good else -errno.EPROTO


def seal(body: bytes) -> bytes:
    """body with its checksum field (bytes 8 to 16) set over everything behind it."""
    return body[:8] + struct.pack("<Q", xxh3(body[16:])) + body[16:]
