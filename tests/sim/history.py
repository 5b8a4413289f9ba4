"""What a guest does, from one seed: writes, partial writes, overlaps, trims, flushes, pauses.

Most of it hits the first blocks of the disk, so that overlaps are frequent; some of it is large, so
that the log wraps and range tombstones appear.  Every write carries its own number.
"""

import random
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from types import MappingProxyType

BLOCK = 4096
KIB = 1024


class Kind(IntEnum):
    """NBD commands; PAUSE is ours: wait for all replies, then let time pass."""

    READ = 0
    WRITE = 1
    FLUSH = 3
    TRIM = 4
    ZERO = 6
    PAUSE = 100


@dataclass(frozen=True, slots=True)
class Op:
    """One request."""

    kind: Kind
    offset_bytes: int = 0
    length_bytes: int = 0
    data: bytes = b""
    fua: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """How a history looks."""

    requests: int = 200
    blocks: int = 768
    hot_blocks: int = 48
    large_percent: int = 20  # of the writes
    large_bytes: int = 640 * KIB  # at most
    longest_blocks: int = 100  # of trims and reads; 1: every request is one block
    read_percent: int = 13
    depth: int = 0  # requests in flight; 0: by the seed


# usual: everything. small: one block after the other, so that records fit where others were.
# wrap: large ones, so that the log is used again and again. reread: what is in slots is written.
SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "usual": Shape(),
        "small": Shape(blocks=64, hot_blocks=4, large_percent=0, longest_blocks=1, depth=1),
        "wrap": Shape(large_percent=40),
        "reread": Shape(requests=300, blocks=256, large_percent=50, read_percent=40),
    }
)


@lru_cache(maxsize=32)
def make_history(seed: int, shape: Shape) -> tuple[Op, ...]:
    """The requests of one guest."""
    rng = random.Random(f"history {seed}")
    return tuple(_make_op(rng, number, shape) for number in range(shape.requests))


def _make_op(rng: random.Random, number: int, shape: Shape) -> Op:
    fua = rng.randrange(12) == 0
    if rng.randrange(100) < shape.read_percent:
        return Op(Kind.READ, *_range(rng, shape))
    dice = rng.randrange(87)
    if dice < 58:
        offset, length = _write_range(rng, shape)
        return Op(Kind.WRITE, offset, length, _data(rng, number, length), fua)
    if dice < 66:
        offset, length = _range(rng, shape)
        return Op(Kind.TRIM, offset, length, fua=fua)
    if dice < 74:
        offset, length = _range(rng, shape)
        return Op(Kind.ZERO, offset, length, fua=fua)
    if dice < 84:
        return Op(Kind.FLUSH)
    return Op(Kind.PAUSE)


def _place(rng: random.Random, blocks: int, length_bytes: int, *, aligned: bool) -> int:
    last = max(blocks * BLOCK - length_bytes, 0)
    return rng.randrange(last // BLOCK + 1) * BLOCK if aligned else rng.randrange(last + 1)


def _write_range(rng: random.Random, shape: Shape) -> tuple[int, int]:
    if rng.randrange(100) < shape.large_percent:
        length = rng.randrange(32 * KIB, shape.large_bytes + 1)
        aligned = rng.randrange(2) == 0
        length = length // BLOCK * BLOCK if aligned else length
        return _place(rng, shape.blocks, length, aligned=aligned), length
    if shape.longest_blocks == 1:
        return rng.randrange(shape.hot_blocks) * BLOCK, BLOCK
    if rng.randrange(2):
        length = rng.randrange(1, 9) * BLOCK
        return _place(rng, shape.hot_blocks, length, aligned=True), length
    length = rng.choice((1, 512, 4000, rng.randrange(1, 3 * BLOCK)))
    return _place(rng, shape.hot_blocks, length, aligned=False), length


def _range(rng: random.Random, shape: Shape) -> tuple[int, int]:
    """Of a trim, a write of zeroes or a read: short, long (range tombstones), and odd ones."""
    if shape.longest_blocks == 1:
        return rng.randrange(shape.hot_blocks) * BLOCK, BLOCK
    dice = rng.randrange(4)
    if dice == 0:
        length = rng.randrange(1, 7) * BLOCK
        return _place(rng, shape.hot_blocks, length, aligned=True), length
    if dice == 1:
        length = rng.randrange(9, 40) * BLOCK
        return _place(rng, shape.hot_blocks, length, aligned=True), length
    if dice == 2:
        length = rng.randrange(9 * BLOCK, shape.longest_blocks * BLOCK)
        return _place(rng, shape.blocks, length, aligned=False), length
    length = rng.randrange(1, 3 * BLOCK)
    return _place(rng, shape.hot_blocks, length, aligned=False), length


def _data(rng: random.Random, number: int, length_bytes: int) -> bytes:
    dice = rng.randrange(10)
    if dice == 0:
        return bytes(length_bytes)
    if dice < 6:
        return rng.randbytes(length_bytes)
    stamp = struct.pack("<QQ", number + 1, rng.getrandbits(64))
    return (stamp * (length_bytes // len(stamp) + 1))[:length_bytes]
