"""The record codec: what each block costs on its way through the cache.

One extent is 16 KiB. Every figure contains one cffi call, about 0.14 us.
"""

import random
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from millpond.native import check, ffi, lib

EXTENT_BYTES: int = lib.MP_BLOCK_BYTES * lib.MP_EXTENT_BLOCKS
ORIGIN = b"benchmark volume"


def text() -> bytes:
    """Real, compressible bytes: source code of the standard library."""
    source = Path(sysconfig.get_path("stdlib"), "typing.py").read_bytes()
    return (source * (EXTENT_BYTES // len(source) + 1))[:EXTENT_BYTES]


DATA = {
    "text": text(),
    "random": random.Random(1).randbytes(EXTENT_BYTES),
    "zeroes": bytes(EXTENT_BYTES),
}


def encoded(data: bytes) -> tuple[Any, Any, int]:
    """(extent, memory of the stored bytes, their count)."""
    extent, out = ffi.new("struct mp_extent *"), ffi.new("uint8_t[]", EXTENT_BYTES)
    length = lib.mp_extent_encode(extent, ORIGIN, 0, lib.MP_EXTENT_BLOCKS, data, out)
    return extent, out, check(length)


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.benchmark(group="codec: encode 16 KiB")
def test_encode(benchmark: BenchmarkFixture, kind: str) -> None:
    """Zero test, entropy test, LZ4 where it pays, checksums."""
    data = DATA[kind]
    extent, out = ffi.new("struct mp_extent *"), ffi.new("uint8_t[]", EXTENT_BYTES)
    source = ffi.from_buffer(data)
    benchmark(lib.mp_extent_encode, extent, ORIGIN, 0, lib.MP_EXTENT_BLOCKS, source, out)


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.benchmark(group="codec: decode 16 KiB")
def test_decode(benchmark: BenchmarkFixture, kind: str) -> None:
    """Verify and decompress."""
    data = DATA[kind]
    extent, stored, length = encoded(data)
    back = ffi.new("uint8_t[]", EXTENT_BYTES)
    blocks = lib.MP_EXTENT_BLOCKS
    result = benchmark(lib.mp_extent_decode, extent, 0, blocks, stored, length, back)
    assert result >= 0
    assert bytes(ffi.buffer(back)) == data


@pytest.mark.benchmark(group="codec: checksum 4 KiB")
def test_checksum(benchmark: BenchmarkFixture) -> None:
    """XXH3 of one block, as on every hit."""
    seed = lib.mp_volume_seed(ORIGIN)
    source = ffi.from_buffer(DATA["random"])
    benchmark(lib.mp_block_checksum, seed, 0, source, lib.MP_BLOCK_BYTES)
