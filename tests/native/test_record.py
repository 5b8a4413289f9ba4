"""Records against their plain model: both directions, cut off, flipped, hostile.

Extents, batches, frames, golden images and the doorway: the other files of this folder.
"""

import errno
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golden import generate
from millpond.native import ffi, lib, record
from models import record_model as model
from models.record_samples import BAD_EXTENTS, HOLE, PACKED, VOLUME


def c_check(data: bytes) -> int:
    """mp_record_check of a copy that ends where data ends: a sanitizer sees one byte too far."""
    exact = ffi.new("uint8_t[]", data) if data else ffi.NULL
    return lib.mp_record_check(exact, len(data))


def c_check_payload(data: bytes) -> int:
    """mp_record_check_payload, likewise."""
    exact = ffi.new("uint8_t[]", data) if data else ffi.NULL
    return lib.mp_record_check_payload(exact, len(data))


def log_record() -> model.Record:
    """The golden log record, as fields to change."""
    return model.unpack_record(generate.record_log())


def batch_record() -> model.Record:
    """The golden batch record, as fields to change."""
    return model.unpack_record(generate.record_batch())


def volume_record() -> model.Record:
    """The golden volume record, as fields to change."""
    return model.unpack_record(generate.record_volume())


def synced_record() -> model.Record:
    """A marker of the write log."""
    return model.Record(model.SYNCED, volume=VOLUME, incarnation=1, synced_sequence=5)


def pages_record() -> model.Record:
    """Pages of a checkpoint: of no volume."""
    return model.Record(model.PAGES, payload=generate.noise("pages", 2))


def delete_record() -> model.Record:
    """The end of a volume."""
    return model.Record(model.DELETE, volume=VOLUME)


EVERY_TYPE = [
    log_record, batch_record, volume_record, synced_record, pages_record, delete_record,
]  # fmt: skip


@pytest.mark.parametrize("make", EVERY_TYPE)
def test_a_record_of_every_type_passes_both_ways(make: Callable[[], model.Record]) -> None:
    data = model.pack_record(make())
    assert c_check(data) == model.check_record(data) == len(data)
    assert c_check_payload(data) == 0
    decoded = record.decode_record(data)
    assert decoded is not None and decoded.length_bytes == len(data)
    assert record.encode_record(decoded, data[decoded.header_length_bytes :]) == data
    shifted = memoryview(b"\0\0\0" + data + b"behind")[3:]  # at an odd address, more behind it
    assert record.decode_record(shifted) == decoded
    record.check_payload(shifted)


@pytest.mark.parametrize("make", EVERY_TYPE)
def test_a_record_cut_off_anywhere_asks_for_more(make: Callable[[], model.Record]) -> None:
    data = model.pack_record(make())
    header = model.unpack_record(data).header_length_bytes
    assert header is not None
    for length in {*range(0, len(data), 1 if len(data) < 6000 else 37), header - 1, header}:
        expected = -errno.EAGAIN if length < header else len(data)
        assert c_check(data[:length]) == expected
        if length < len(data):
            assert c_check_payload(data[:length]) == -errno.EBADMSG


def small_record() -> bytes:
    """Two data extents of one block, one packed and one hole: every kind of field, few bits."""
    packed = generate.packed_pattern(4096)
    extents = [
        model.lz4_extent(model.Extent(VOLUME, 3, 1, 7), packed),
        model.Extent(VOLUME, 4, 9, 8),
    ]
    return model.pack_record(
        model.Record(
            model.BATCH, volume=VOLUME, lineage=5, first_sequence=7, last_sequence=8, epoch=2,
            extents=extents, payload=packed,
        )
    )  # fmt: skip


def test_every_single_flipped_bit_is_found() -> None:
    data = bytearray(small_record())
    assert c_check(bytes(data)) == len(data) and c_check_payload(bytes(data)) == 0
    for bit in range(len(data) * 8):
        data[bit // 8] ^= 1 << bit % 8
        flipped = bytes(data)
        length = c_check(flipped)
        # A longer table or payload than is there is "more to come", never "good".
        assert length < 0 or length > len(data) or c_check_payload(flipped) == -errno.EBADMSG, bit
        assert length == model.check_record(flipped), bit
        assert length > 0 or c_check_payload(flipped) in (0, -errno.EBADMSG)
        data[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("make", [log_record, volume_record, pages_record])
def test_a_flipped_bit_of_the_payload_is_found_in_every_block(
    make: Callable[[], model.Record],
) -> None:
    data = bytearray(model.pack_record(make()))
    start = model.unpack_record(bytes(data)).header_length_bytes
    assert start is not None
    for at in [*range(start, len(data), 509), len(data) - 1]:
        data[at] ^= 0x10
        assert c_check(bytes(data)) == len(data)
        assert c_check_payload(bytes(data)) == -errno.EBADMSG
        data[at] ^= 0x10


P, N = errno.EPROTO, errno.ENOTSUP
HOSTILE: list[tuple[Callable[[], model.Record], dict[str, Any], int]] = [
    (log_record, {"magic": b"MPNDREC2"}, P),
    (log_record, {"version": 2}, N),
    (log_record, {"version": 0}, N),
    (log_record, {"type": 0}, P),
    (log_record, {"type": 8}, P),
    (log_record, {"type": 65535}, P),
    (log_record, {"incompatible_features": 1}, N),
    (log_record, {"flags": model.LAST_OF_BATCH}, P),
    (batch_record, {"flags": 2}, P),
    (batch_record, {"flags": 1 << 31}, P),
    (batch_record, {"part_index": 64}, P),
    (log_record, {"part_index": 1}, P),
    (batch_record, {"volume": bytes(16)}, P),
    (volume_record, {"volume": bytes(16)}, P),
    (delete_record, {"volume": bytes(16)}, P),
    (batch_record, {"first_sequence": 1002}, P),  # the first extent is older
    (batch_record, {"last_sequence": 1002}, P),  # the last extent is newer
    (batch_record, {"first_sequence": 0}, P),
    (batch_record, {"last_sequence": 2**64 - 1}, P),
    (volume_record, {"first_sequence": 2, "last_sequence": 1}, P),
    (batch_record, {"extent_count": 8193}, P),
    (batch_record, {"extent_count": 2**32 - 1}, P),
    (batch_record, {"extent_count": 2}, P),
    (batch_record, {"header_length_bytes": 0}, P),
    (batch_record, {"header_length_bytes": 192}, P),
    (batch_record, {"header_length_bytes": 2**64 - 8}, P),
    (log_record, {"header_length_bytes": 8192}, P),
    (batch_record, {"payload_length_bytes": 2**64 - 1}, P),
    (batch_record, {"payload_length_bytes": (4 << 20) + 1}, P),
    (batch_record, {"payload_length_bytes": 4 << 20}, P),
    (batch_record, {"payload_length_bytes": 0}, P),
    (batch_record, {"cipher": 1}, P),
    (batch_record, {"key_id": 1}, P),
    (batch_record, {"reserved": bytes(31) + b"\1"}, P),
    (batch_record, {"incarnation": 1}, P),
    (batch_record, {"previous_checksum": 1}, P),
    (batch_record, {"segment_ordinal": 1}, P),
    (batch_record, {"segment_offset_bytes": 4096}, P),
    (batch_record, {"synced_sequence": 1}, P),
    (batch_record, {"payload_checksum": 1}, P),
    (log_record, {"segment_offset_bytes": 4095}, P),
    (log_record, {"padding": b"\0\1"}, P),
    (volume_record, {"payload_checksum": 0}, P),
    (volume_record, {"payload": bytes(687)}, P),
    (delete_record, {"payload": b"x"}, P),
    (synced_record, {"payload": bytes(4096)}, P),
    (synced_record, {"extents": [HOLE]}, P),
    (volume_record, {"extents": [HOLE]}, P),
]


@pytest.mark.parametrize(("make", "change", "error"), HOSTILE)
def test_sealed_header_that_breaks_a_rule(
    make: Callable[[], model.Record], change: dict[str, Any], error: int
) -> None:
    # Counts and lengths as the good record has them, unless the change is about them.
    computed = {"extent_count", "header_length_bytes", "payload_length_bytes", "payload_checksum"}
    blank = {name: None for name in computed - set(change)}
    bad = replace(make(), **{**blank, **change})
    data = model.pack_record(bad)
    assert model.check_record(data) == -error
    assert c_check(data) == -error
    assert c_check_payload(data) in (0, -errno.EBADMSG)


@pytest.mark.parametrize("make", [log_record, batch_record])
@pytest.mark.parametrize(("good", "change", "error"), BAD_EXTENTS)
def test_sealed_record_around_a_bad_extent(
    make: Callable[[], model.Record], good: model.Extent, change: dict[str, Any], error: int
) -> None:
    bad = replace(good, sequence=1002, **change)
    base = make()
    length = base.payload_length_bytes or 0
    data = model.pack_record(
        replace(
            base, extents=[*base.extents, bad], extent_count=None, header_length_bytes=None,
            payload_length_bytes=min(length + bad.stored_length_bytes, 4 << 20), padding=b"",
        )
    )  # fmt: skip
    assert c_check(data) == model.check_record(data) == -error
    assert c_check_payload(data) in (0, -errno.EBADMSG)


def test_packed_extents_are_no_part_of_a_write_log() -> None:
    packed = generate.packed_pattern(16384)
    data = model.pack_record(
        replace(
            log_record(), extents=[replace(PACKED, sequence=1001)], payload=packed, padding=b"",
            extent_count=None, header_length_bytes=None, payload_length_bytes=None,
        )
    )  # fmt: skip
    assert c_check(data) == model.check_record(data) == -errno.EPROTO


def test_a_compatible_feature_is_ignored() -> None:
    data = model.pack_record(replace(batch_record(), compatible_features=2**32 - 1))
    assert c_check(data) == len(data)


def test_extents_up_to_the_limit_and_not_one_more() -> None:
    hole = model.Extent(VOLUME, 1, 1, 1)
    base = model.Record(model.BATCH, volume=VOLUME, first_sequence=1, last_sequence=1)
    for kind in (model.BATCH, model.LOG):
        full = model.pack_record(replace(base, type=kind, extents=[hole] * 8192))
        assert c_check(full) == len(full)
        over = model.pack_record(replace(base, type=kind, extents=[hole] * 8193))
        assert c_check(over) == -errno.EPROTO


numbers = st.sampled_from([0, 1, 2, 63, 64, 192, 4096, 2**31, 2**32 - 1])
wide = numbers | st.sampled_from([1000, 1001, 1003, 2**63, 2**64 - 2, 2**64 - 1])


@settings(max_examples=400)
@given(
    st.sampled_from(EVERY_TYPE),
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.integers(0, 9),
            "version": st.integers(0, 2),
            "flags": st.integers(0, 3),
            "compatible_features": numbers,
            "incompatible_features": st.integers(0, 1),
            "first_sequence": wide,
            "last_sequence": wide,
            "part_index": numbers,
            "extent_count": st.integers(0, 4) | numbers,
            "header_length_bytes": wide,
            "payload_length_bytes": wide,
            "cipher": st.integers(0, 1),
            "synced_sequence": wide,
            "segment_offset_bytes": wide,
            "payload_checksum": st.integers(0, 1),
            "payload": st.binary(max_size=10),
        },
    ),
)
def test_records_are_refused_as_by_the_model(
    make: Callable[[], model.Record], change: dict[str, Any]
) -> None:
    data = model.pack_record(replace(make(), **change))
    assert c_check(data) == model.check_record(data)
    assert c_check_payload(data) in (0, -errno.EBADMSG)


@settings(max_examples=300)
@given(
    st.sampled_from(EVERY_TYPE),
    st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), max_size=4),
    st.booleans(),
)
def test_scribbled_bytes_never_crash(
    make: Callable[[], model.Record], scribbles: list[tuple[int, int]], reseal: bool
) -> None:
    data = bytearray(model.pack_record(make()))
    length = model.unpack_record(bytes(data)).header_length_bytes or 0
    for at, value in scribbles:
        data[at % len(data)] = value
    if reseal:
        data[:length] = model.seal(bytes(data[:length]))
    assert c_check(bytes(data)) == model.check_record(bytes(data))
    assert c_check_payload(bytes(data)) in (0, -errno.EBADMSG)
