"""Wire frames: sealed, split at every position, hostile."""

import errno
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golden import generate
from millpond.native import ffi, lib, record
from models import record_model as model


def c_check(data: bytes) -> int:
    """mp_frame_check of a copy that ends where data ends: a sanitizer sees one byte too far."""
    return lib.mp_frame_check(ffi.new("uint8_t[]", data) if data else ffi.NULL, len(data))


U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)


@given(st.sampled_from([*range(1, 16), 17, 18]), st.binary(max_size=200), U64, U64, U32, U64, U32)
def test_frames_are_written_and_read_as_by_the_model(
    kind: int, payload: bytes, request: int, trace: int, tenant: int, deadline: int, status: int
) -> None:
    fields: dict[str, Any] = {
        "request_id": request,
        "trace_id": trace,
        "tenant": tenant,
        "deadline_ns": deadline,
        "status": status if kind in model.REPLIES else 0,
    }
    data = model.pack_frame(kind, payload, **fields)
    assert record.encode_frame(kind, payload, **fields) == data
    assert c_check(data) == model.check_frame(data) == len(data)
    decoded = record.decode_frame(data + b"next")
    assert decoded == (record.Frame(kind, payload, len(payload), **fields), len(data))


@pytest.mark.parametrize(
    "name", ["frame_read", "frame_read_reply", "frame_status", "frame_status_reply"]
)
def test_golden_frames_are_read_and_written_alike(name: str) -> None:
    data = generate.path_of(name).read_bytes()
    decoded = record.decode_frame(data)
    assert decoded is not None
    frame, length = decoded
    assert length == len(data) == c_check(data)
    again = record.encode_frame(
        frame.type,
        [frame.payload[:48], frame.payload[48:]],
        checked_bytes=frame.checked_bytes,
        request_id=frame.request_id,
        trace_id=frame.trace_id,
        tenant=frame.tenant,
        deadline_ns=frame.deadline_ns,
    )
    assert again == data


def test_golden_read_reply_holds_its_pieces() -> None:
    data = generate.path_of("frame_read_reply").read_bytes()
    reply = ffi.new("struct mp_read_reply *")
    ffi.memmove(reply, data[64:], 48)
    assert (reply.first_block, reply.block_count, reply.piece_count) == (4099, 2, 2)
    pieces = ffi.new("struct mp_piece[2]")
    ffi.memmove(pieces, data[112:], 272)
    assert [(p.first_block, p.block_count, p.shipped_bytes) for p in pieces] == [
        (4099, 1, 4096),
        (4100, 1, 0),
    ]
    out = ffi.new("uint8_t[]", 4096)
    extent = ffi.addressof(pieces[0], "extent")
    assert lib.mp_extent_decode(extent, 0, 1, data[384:], 4096, out) == 0
    assert bytes(ffi.buffer(out)) == generate.noise("batch", 1)
    assert lib.mp_extent_decode(ffi.addressof(pieces[1], "extent"), 0, 1, ffi.NULL, 0, out) == 0
    assert bytes(ffi.buffer(out)) == bytes(4096)


@pytest.mark.parametrize("name", ["frame_read", "frame_read_reply"])
def test_a_frame_split_at_every_position_asks_for_more(name: str) -> None:
    data = generate.path_of(name).read_bytes()
    checked = model.FRAME.unpack_from(data)[5]
    for length in range(len(data)):
        enough = length >= 64 + checked
        assert c_check(data[:length]) == (len(data) if enough else -errno.EAGAIN)
        assert record.decode_frame(data[:length]) is None


def test_every_single_flipped_bit_is_found_up_to_the_checked_end() -> None:
    whole = generate.path_of("frame_read_reply").read_bytes()
    data = bytearray(whole)
    for bit in range((64 + 320) * 8):
        data[bit // 8] ^= 1 << bit % 8
        assert c_check(bytes(data)) == model.check_frame(bytes(data)) < 0, bit
        data[bit // 8] ^= 1 << bit % 8
    data[-1] ^= 1  # the stored bytes carry their own checksum
    assert c_check(bytes(data)) == len(whole)


@pytest.mark.parametrize(
    ("kind", "fields", "error"),
    [
        (5, {"magic": 0}, errno.EPROTO),
        (5, {"version": 0}, errno.ENOTSUP),
        (5, {"version": 2}, errno.ENOTSUP),
        (0, {}, errno.EPROTO),
        (16, {}, errno.EPROTO),
        (65535, {}, errno.EPROTO),
        (5, {"flags": 1}, errno.EPROTO),
        (5, {"reserved": 1}, errno.EPROTO),
        (5, {"status": 1}, errno.EPROTO),
        (7, {"status": 1}, errno.EPROTO),
        (7, {"payload_bytes": (16 << 20) + 1, "checked_bytes": 0}, errno.EPROTO),
        (7, {"payload_bytes": 2**32 - 1, "checked_bytes": 0}, errno.EPROTO),
        (7, {"checked_bytes": 11}, errno.EPROTO),
        (7, {"checked_bytes": 2**32 - 1}, errno.EPROTO),
        (3, {"checked_bytes": 9}, errno.EPROTO),
        (5, {"checked_bytes": 0}, errno.EPROTO),
    ],
)
def test_sealed_frame_that_breaks_a_rule(kind: int, fields: dict[str, int], error: int) -> None:
    data = model.pack_frame(kind, b"0123456789", **fields)
    assert c_check(data) == model.check_frame(data) == -error


def test_the_largest_frame_is_accepted_before_its_records_arrived() -> None:
    data = model.pack_frame(7, payload_bytes=16 << 20, checked_bytes=0)
    assert c_check(data) == 64 + (16 << 20)
    assert record.decode_frame(data) is None


@settings(max_examples=300)
@given(
    st.integers(0, 17),
    st.binary(max_size=20),
    st.fixed_dictionaries(
        {},
        optional={
            "checked_bytes": st.integers(0, 22) | U32,
            "payload_bytes": st.integers(0, 22) | U32,
            "version": st.integers(0, 2),
            "status": st.integers(0, 12),
            "flags": st.integers(0, 1),
            "reserved": st.integers(0, 1),
            "tenant": U32,
        },
    ),
    st.lists(st.tuples(st.integers(0, 80), st.integers(0, 255)), max_size=2),
)
def test_frames_are_refused_as_by_the_model(
    kind: int, payload: bytes, fields: dict[str, int], scribbles: list[tuple[int, int]]
) -> None:
    data = bytearray(model.pack_frame(kind, payload, **fields))
    for at, value in scribbles:
        data[at % len(data)] = value
    assert c_check(bytes(data)) == model.check_frame(bytes(data))


def test_python_refuses_to_seal_what_nobody_would_accept() -> None:
    with pytest.raises(ValueError, match="unchecked"):
        record.encode_frame(lib.MP_FRAME_CONTROL, b"{}", checked_bytes=1)
    with pytest.raises(ValueError, match="at most"):
        record.encode_frame(lib.MP_FRAME_BATCH, bytes((16 << 20) + 1))
