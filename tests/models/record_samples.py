"""Blocks, extents and broken extents that several tests of the codec share."""

import errno
from random import Random
from typing import Any

from golden import generate
from millpond.native import record
from models import record_model as model

VOLUME = generate.VOLUME


def block_of(kind: str, seed: int) -> bytes:
    """One block: zero, random, text-like, or nearly zero."""
    random = Random(seed)
    if kind == "random":
        return random.randbytes(4096)
    if kind == "text":
        words = [random.randbytes(3).hex() for _ in range(40)]
        return " ".join(random.choice(words) for _ in range(600)).encode()[:4096]
    if kind == "sparse":
        return bytes(4000) + b"\1" + bytes(95)
    return bytes(4096)


def to_model(extent: record.Extent) -> model.Extent:
    """The same extent as the model writes it."""
    return model.Extent(
        extent.origin,
        extent.first_block,
        extent.block_count,
        extent.sequence,
        extent.stored_length_bytes,
        extent.codec,
        checksum=(*extent.checksums, *[0] * (4 - len(extent.checksums))),
    )


def from_model(extent: model.Extent) -> record.Extent:
    """The same extent as record.py has it; holes are lost."""
    return record.Extent(
        extent.origin,
        extent.first_block,
        extent.block_count,
        extent.sequence,
        extent.codec,
        extent.stored_length_bytes,
        tuple(filter(None, extent.checksum)),
    )


RAW, RAW_STORED = model.encode_extent(VOLUME, 8, generate.noise("raw", 4))
PACKED = model.lz4_extent(model.Extent(VOLUME, 8, 4), generate.packed_pattern(16384))
HOLE = model.Extent(VOLUME, 8, 1 << 40)
BAD_EXTENTS: list[tuple[model.Extent, dict[str, Any], int]] = [
    (RAW, {"block_count": 0}, errno.EPROTO),
    (RAW, {"block_count": 5}, errno.EPROTO),
    (RAW, {"block_count": 5, "stored_length_bytes": 20480}, errno.EPROTO),
    (RAW, {"block_count": 2**52 + 4}, errno.EPROTO),
    (RAW, {"stored_length_bytes": 16383}, errno.EPROTO),
    (RAW, {"checksum": (1, 2, 0, 4)}, errno.EPROTO),
    (RAW, {"block_count": 3, "stored_length_bytes": 12288}, errno.EPROTO),
    (RAW, {"origin": bytes(16)}, errno.EPROTO),
    (PACKED, {"stored_length_bytes": 0}, errno.EPROTO),
    (PACKED, {"stored_length_bytes": 16384}, errno.EPROTO),
    (PACKED, {"block_count": 5}, errno.EPROTO),
    (PACKED, {"checksum": (0, 0, 0, 0)}, errno.EPROTO),
    (PACKED, {"checksum": (1, 1, 0, 0)}, errno.EPROTO),
    (PACKED, {"codec": model.ZSTD}, errno.ENOTSUP),
    (PACKED, {"codec": 0}, errno.EPROTO),
    (PACKED, {"codec": 6}, errno.EPROTO),
    (PACKED, {"codec": 255}, errno.EPROTO),
    (PACKED, {"origin": bytes(16)}, errno.EPROTO),
    (HOLE, {"block_count": 0}, errno.EPROTO),
    (HOLE, {"stored_length_bytes": 1}, errno.EPROTO),
    (HOLE, {"checksum": (1, 0, 0, 0)}, errno.EPROTO),
    (HOLE, {"first_block": 2**64 - 1}, errno.EPROTO),
    (HOLE, {"block_count": 2**64 - 1}, errno.EPROTO),
    (HOLE, {"first_block": 2**51 - 1, "block_count": 1}, errno.EPROTO),
    (HOLE, {"first_block": 2**63, "block_count": 2**63}, errno.EPROTO),
    *[(e, {"reserved0": b"\0\0\1"}, errno.EPROTO) for e in (RAW, PACKED, HOLE)],
    *[(e, {"nonce": bytes(23) + b"\1"}, errno.EPROTO) for e in (RAW, PACKED, HOLE)],
    *[(e, {"tag": b"\1" + bytes(15)}, errno.EPROTO) for e in (RAW, PACKED, HOLE)],
]
