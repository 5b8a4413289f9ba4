"""Write the golden images: one object of every format, made by the plain Python model.

    PYTHONPATH=tests python tests/golden/generate.py

An image changes only with a new format version, and then the old one stays beside it
under its old name.  Nothing here depends on an LZ4 version: the packed bytes are made
by hand.
"""

import hashlib
import struct
from pathlib import Path

from models import record_model as model

HERE = Path(__file__).resolve().parent
VOLUME = bytes(range(0x10, 0x20))
STORE_ID = bytes(range(0x20, 0x30))
CACHE_ID = bytes(range(0x30, 0x40))
LINEAGE = 0x1122334455667788
PATTERN = b"millpond pattern"


def noise(label: str, blocks: int) -> bytes:
    """Blocks that no codec shrinks, the same for ever."""
    return hashlib.shake_128(label.encode()).digest(blocks * model.BLOCK)


def packed_pattern(length_bytes: int) -> bytes:
    """PATTERN repeated to length_bytes as an LZ4 block: literals, one long match, five literals."""
    match = length_bytes - len(PATTERN) - 5
    rest = match - 4 - 15
    out = bytes([0xFF, len(PATTERN) - 15]) + PATTERN + struct.pack("<H", len(PATTERN))
    out += b"\xff" * (rest // 255) + bytes([rest % 255])
    return out + b"\x50" + PATTERN[-5:]


def record_log() -> bytes:
    """Write log: two raw blocks, five zero blocks, one trim of 4 GiB."""
    data, stored = model.encode_extent(VOLUME, 77, noise("log", 2), sequence=1001)
    extents = [
        data,
        model.Extent(VOLUME, 200, 5, 1002),
        model.Extent(VOLUME, 1 << 30, 1 << 20, 1003, codec=model.TRIM),
    ]
    return model.pack_record(
        model.Record(
            model.LOG, volume=VOLUME, lineage=LINEAGE, first_sequence=1001, last_sequence=1003,
            epoch=7, incarnation=3 << 32 | 0xABCDEF, previous_checksum=0x0123456789ABCDEF,
            segment_ordinal=12, segment_offset_bytes=40960, synced_sequence=990,
            extents=extents, payload=stored,
        )
    )  # fmt: skip


def record_batch() -> bytes:
    """Destage: four blocks compressed, one raw, a run of zeroes; the only part of its batch."""
    packed = packed_pattern(4 * model.BLOCK)
    raw, stored = model.encode_extent(VOLUME, 4099, noise("batch", 1), sequence=1002)
    extents = [
        model.lz4_extent(model.Extent(VOLUME, 4092, 4, 1001), packed),
        raw,
        model.Extent(VOLUME, 5000, 1234, 1003),
    ]
    return model.pack_record(
        model.Record(
            model.BATCH, flags=model.LAST_OF_BATCH, volume=VOLUME, lineage=LINEAGE,
            first_sequence=1001, last_sequence=1003, epoch=7,
            extents=extents, payload=packed + stored,
        )
    )  # fmt: skip


def record_volume() -> bytes:
    """Store: the state of a dirty, open volume of 1 TiB."""
    lineages = [LINEAGE - 1, 1, LINEAGE, 900] + [0] * 12
    state = model.VOLUME_STATE.pack(
        VOLUME, bytes(16), CACHE_ID, CACHE_ID, 1 << 40, 7, LINEAGE, 1003, 42, 0, *lineages,
        "Mühlteich".encode(), bytes(192),
    )  # fmt: skip
    return model.pack_record(model.Record(model.VOLUME, volume=VOLUME, payload=state))


def frame_read() -> bytes:
    """READ of 32 blocks with a deadline of two seconds."""
    request = struct.pack("<16sQQQII", VOLUME, 7, 1003, 4092, 32, 0)
    return model.pack_frame(
        5, request, request_id=99, trace_id=0xFEED, tenant=3, deadline_ns=2_000_000_000
    )


def frame_read_reply() -> bytes:
    """READ_REPLY of two blocks: one of a raw extent, one hole; stored bytes are not checked."""
    raw, stored = model.encode_extent(VOLUME, 4099, noise("batch", 1), sequence=1002)
    reply = struct.pack("<16sQQQII", VOLUME, LINEAGE, 1003, 4099, 2, 2)
    reply += struct.pack("<QII", 4099, 1, model.BLOCK) + raw.pack()
    reply += struct.pack("<QII", 4100, 1, 0) + model.Extent(first_block=4100, sequence=0).pack()
    return model.pack_frame(6, reply + stored, checked_bytes=len(reply), request_id=99)


def frame_status() -> bytes:
    """BLOCK_STATUS of a TiB."""
    request = struct.pack("<16sQQQQ", VOLUME, 7, 1003, 4092, 1 << 28)
    return model.pack_frame(17, request, request_id=100, trace_id=0xFEED, tenant=3)


def frame_status_reply() -> bytes:
    """BLOCK_STATUS_REPLY: data, a long hole, data; the rest of the range is not told."""
    reply = struct.pack("<16sQQQII", VOLUME, LINEAGE, 1003, 4092, 3, 0)
    for block_count, hole in ((4, 0), (1 << 27, 1), (1, 0)):
        reply += struct.pack("<QII", block_count, hole, 0)
    return model.pack_frame(18, reply, request_id=100)


def cache_super() -> bytes:
    """First copy of the superblock of a 100 GiB cache of one shard."""
    return model.seal(
        model.CACHE_SUPER.pack(
            b"MPNDSCP1", 0, 1, 0, 0, 0, CACHE_ID, 5, 0, 1, 100 << 30, 1 << 20, 8 << 20, 1024,
            9 << 30, 16384, 5_000_000, 95 << 30, 97 << 30, 2 << 30, 3 << 32 | 0xABCDEF, 4,
            123_456, 0x1111222233334444, 1, 1, bytes(3912),
        )
    )  # fmt: skip


def store_super() -> bytes:
    """First copy of the superblock of a store with one checkpoint."""
    return model.seal(
        model.STORE_SUPER.pack(
            b"MPNDSSP1", 0, 1, 0, 0, 0, STORE_ID, 6, 4 << 32 | 0x123456, 64 << 20, 17, 81920,
            4096, 0x5555666677778888, bytes(3992),
        )
    )  # fmt: skip


def group() -> bytes:
    """One append to the store's log: a volume's state and a batch, padded to 4 KiB."""
    records = b"".join(
        record + bytes(-len(record) % 8) for record in (record_volume(), record_batch())
    )
    length = -(-(model.GROUP.size + len(records)) // model.BLOCK) * model.BLOCK
    header = model.GROUP.pack(
        b"MPNDGRP1", 0, 1, 1, 2, 4 << 32 | 0x123456, 4711, 17, 86016, length,
        0x0F0F0F0F0F0F0F0F, 4700, *[0] * 6,
    )  # fmt: skip
    return (model.seal(header) + records).ljust(length, b"\0")


IMAGES = (
    record_log,
    record_batch,
    record_volume,
    frame_read,
    frame_read_reply,
    frame_status,
    frame_status_reply,
    cache_super,
    store_super,
    group,
)


def path_of(name: str) -> Path:
    """Where the image of that name is kept."""
    return HERE / f"{name}.v1.bin"


if __name__ == "__main__":
    for image in IMAGES:
        path_of(image.__name__).write_bytes(image())
