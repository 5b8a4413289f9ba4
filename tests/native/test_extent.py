"""Checksums and extents against their plain model: both directions, hostile fields."""

import errno
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from golden import generate
from millpond.native import ffi, lib, record
from models import record_model as model
from models.record_samples import (
    BAD_EXTENTS,
    HOLE,
    PACKED,
    RAW,
    RAW_STORED,
    VOLUME,
    block_of,
    from_model,
    to_model,
)

OTHER = bytes(range(0x50, 0x60))
U64 = st.integers(0, 2**64 - 1)
blocks = st.builds(
    block_of, st.sampled_from(["zero", "random", "text", "sparse"]), st.integers(0, 9)
)
extent_data = st.lists(blocks, min_size=1, max_size=4).map(b"".join)
first_blocks = st.integers(0, 2**51 - 6)
ids = st.binary(min_size=16, max_size=16).filter(any)


# ---- checksums ----


@given(ids, U64, st.binary(max_size=5000))
def test_checksums_are_those_of_the_model(volume: bytes, block: int, data: bytes) -> None:
    assert record.xxh3(data) == model.xxh3(data)
    assert record.volume_seed(volume) == model.xxh3(volume)
    checksum = record.block_checksum(record.volume_seed(volume), block, data)
    assert checksum == model.data_checksum(volume, block, data)


def test_a_checksum_that_would_be_zero_is_one() -> None:
    # XXH3 of nothing is XXH64's avalanche of (seed ^ secret): undone, it gives the seed of 0.
    value = model.xxh3(b"")
    value ^= value >> 32
    value = value * pow(0x165667B19E3779F9, -1, 2**64) % 2**64
    value ^= value >> 29 ^ value >> 58
    value = value * pow(0xC2B2AE3D27D4EB4F, -1, 2**64) % 2**64
    secret = value ^ value >> 33
    assert xxhash.xxh3_64_intdigest(b"", secret) == 0
    assert record.block_checksum(secret ^ model.mix(5), 5, b"") == 1


@given(st.binary(max_size=300).map(lambda b: b[: len(b) // 8 * 8]), st.integers(0, 300))
def test_zero_is_found_wherever_a_byte_differs(data: bytes, length: int) -> None:
    assert lib.mp_is_zero(data, len(data)) == (not any(data))
    zeroes = bytearray(length // 8 * 8)
    assert lib.mp_is_zero(bytes(zeroes), len(zeroes)) == 1
    for i in range(len(zeroes)):
        zeroes[i] = 1
        assert lib.mp_is_zero(bytes(zeroes), len(zeroes)) == 0
        zeroes[i] = 0


@given(extent_data)
def test_randomness_is_judged_as_by_the_model(data: bytes) -> None:
    assert lib.mp_looks_random(data, len(data)) == model.looks_random(data)


def test_only_randomness_looks_random() -> None:
    random = Random(1)
    noise = [random.randbytes(size) for size in (4096, 8192, 16384) for _ in range(200)]
    assert sum(lib.mp_looks_random(data, len(data)) for data in noise) >= 590
    ramp = bytes(range(256)) * 64  # more even than chance
    half = random.randbytes(8192) + bytes(8192)
    eighth = random.randbytes(14336) + bytes(2048)
    letters = bytes(
        random.choice(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz+/01")
        for _ in range(16384)
    )
    for data in (ramp, half, eighth, letters, bytes(16384), b"x", b""):
        assert not lib.mp_looks_random(data, len(data))


# ---- extents ----


@given(ids, first_blocks, extent_data, U64)
def test_an_encoded_extent_is_what_the_model_reads(
    origin: bytes, first: int, data: bytes, sequence: int
) -> None:
    extent, stored = record.encode_extent(origin, first, data, sequence=sequence)
    twin = to_model(extent)
    assert (twin.origin, twin.first_block, twin.sequence) == (origin, first, sequence)
    assert model.decode_extent(twin, stored) == data
    expected, packed = model.encode_extent(origin, first, data, sequence)
    if expected.codec != model.LZ4:
        assert twin == expected and stored == packed
    elif len(packed) < len(data) * 3 // 4:  # clear of what another LZ4 version may pack
        assert extent.codec == model.LZ4


@given(ids, first_blocks, extent_data, st.data())
def test_a_modelled_extent_decodes_to_the_wanted_blocks(
    origin: bytes, first: int, data: bytes, draw: st.DataObject
) -> None:
    twin, stored = model.encode_extent(origin, first, data)
    count = len(data) // 4096
    skip = draw.draw(st.integers(0, count - 1))
    wanted = draw.draw(st.integers(1, count - skip))
    extent = from_model(twin)
    part = slice(skip * 4096, (skip + wanted) * 4096)
    shipped = stored[part] if twin.codec == model.NONE else stored
    record.verify_extent(extent, shipped, skip_blocks=skip, block_count=wanted)
    decoded = record.decode_extent(extent, shipped, skip_blocks=skip, block_count=wanted)
    assert decoded == data[part]


@pytest.mark.parametrize("kind", ["random", "text"])
def test_a_block_in_the_wrong_place_does_not_verify(kind: str) -> None:
    extent, stored = record.encode_extent(VOLUME, 100, block_of(kind, 1))
    for wrong in (
        replace(extent, first_block=101),
        replace(extent, first_block=100 + (1 << 40)),
        replace(extent, origin=OTHER),
    ):
        with pytest.raises(OSError) as caught:
            record.decode_extent(wrong, stored)
        assert caught.value.errno == errno.EBADMSG


def test_a_packed_extent_that_unpacks_short_or_long_or_not_at_all_is_refused() -> None:
    for lie in (
        generate.packed_pattern(4095),
        generate.packed_pattern(4097),
        generate.packed_pattern(9000),
        generate.packed_pattern(4096)[:-3],
        b"\xff" * 40,
        b"\x0f\x00\x00" + b"\xff" * 20,
    ):
        extent = from_model(model.lz4_extent(model.Extent(VOLUME, 9, 1), lie))
        record.verify_extent(extent, lie)
        with pytest.raises(OSError) as caught:
            record.decode_extent(extent, lie)
        assert caught.value.errno == errno.EBADMSG


@pytest.mark.parametrize(
    ("skip", "count"), [(0, 0), (0, 3), (2, 1), (1, 2), (2**32 - 1, 2**32 - 1)]
)
@pytest.mark.parametrize("kind", ["random", "text", "zero"])
def test_blocks_outside_an_extent_are_refused(kind: str, skip: int, count: int) -> None:
    twin, stored = model.encode_extent(VOLUME, 1, block_of(kind, 1) * 2)
    extent = ffi.new("struct mp_extent *")
    ffi.memmove(extent, twin.pack(), 120)
    shipped = stored[: count * 4096] if twin.codec == model.NONE else stored
    assert lib.mp_extent_verify(extent, skip, count, shipped, len(shipped)) == -errno.EPROTO
    assert lib.mp_extent_decode(extent, skip, count, shipped, len(shipped), ffi.NULL) < 0


@pytest.mark.parametrize("kind", ["random", "text", "zero"])
def test_stored_bytes_of_another_length_are_refused(kind: str) -> None:
    extent, stored = record.encode_extent(VOLUME, 1, block_of(kind, 1) * 2)
    for wrong in (stored + b"\0", stored[:-1] or b"\0\0", stored[:4096] + b"x"):
        with pytest.raises(OSError) as caught:
            record.decode_extent(extent, wrong)
        assert caught.value.errno == errno.EPROTO


def check_extent(extent: model.Extent) -> int:
    """mp_extent_check of the model's extent."""
    cdata = ffi.new("struct mp_extent *")
    ffi.memmove(cdata, extent.pack(), 120)
    return lib.mp_extent_check(cdata)


@pytest.mark.parametrize(("good", "change", "error"), BAD_EXTENTS)
def test_extent_with_a_field_that_no_encoder_writes(
    good: model.Extent, change: dict[str, Any], error: int
) -> None:
    assert check_extent(good) == model.check_extent(good) == 0
    bad = replace(good, **change)
    assert check_extent(bad) == model.check_extent(bad) == -error
    extent = ffi.new("struct mp_extent *")
    ffi.memmove(extent, bad.pack(), 120)
    assert (
        lib.mp_extent_decode(extent, 0, 1, RAW_STORED, 4096, ffi.new("uint8_t[]", 4096)) == -error
    )


def test_the_last_block_that_a_guest_can_address_is_allowed() -> None:
    last = replace(HOLE, first_block=2**51 - 2, block_count=1)
    assert check_extent(last) == model.check_extent(last) == 0
    assert check_extent(replace(HOLE, origin=bytes(16))) == 0  # a hole of nobody's, in a READ_REPLY


small = st.integers(0, 6)
edges = st.sampled_from([4096, 8192, 16384, 2**31, 2**51 - 2, 2**51 - 1, 2**52, 2**63, 2**64 - 1])


@settings(max_examples=300)
@given(
    st.sampled_from([RAW, PACKED, HOLE]),
    st.fixed_dictionaries(
        {},
        optional={
            "first_block": small | edges,
            "block_count": small | edges,
            "codec": small,
            "stored_length_bytes": st.sampled_from([0, 1, 4095, 4096, 8192, 16384, 2**32 - 1]),
            "checksum": st.tuples(*[st.integers(0, 2)] * 4),
        },
    ),
)
def test_extents_are_refused_as_by_the_model(good: model.Extent, change: dict[str, Any]) -> None:
    bad = replace(good, **change)
    assert check_extent(bad) == model.check_extent(bad)
