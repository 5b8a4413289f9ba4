"""The frame codec of the control plane: any split, any damage, any hostile length."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.native import lib
from millpond.store import limits, wire
from millpond.store.errors import ProtocolError

CLIENT_ID = "0123456789abcdef0123456789abcdef"


def hello(**changes: object) -> bytes:
    fields = {"role": "control", "wire_version": 1, "features": [], "client_id": CLIENT_ID}
    return wire.encode_json(wire.HELLO, {**fields, "client_name": "test", **changes})


def reader(**changes: object) -> wire.FrameReader:
    settings = {
        "payload_max_bytes": limits.HELLO_PAYLOAD_MAX_BYTES,
        "types": (wire.HELLO, wire.CONTROL),
        "peer": "the client",
    }
    return wire.FrameReader(**{**settings, **changes})  # type: ignore[arg-type]


def read_all(frames: wire.FrameReader) -> list[tuple[int, int, bytes]]:
    out = []
    while (frame := frames.next_frame()) is not None:
        out.append((frame.type, frame.request_id, bytes(frame.payload)))
    return out


def test_limits_match_the_format() -> None:
    assert limits.FRAME_BYTES_MAX == lib.MP_FRAME_PAYLOAD_MAX + lib.MP_FRAME_HEADER_BYTES
    assert limits.NAME_BYTES_MAX == lib.MP_NAME_BYTES - 1
    assert limits.IMPORT_WINDOW_BYTES <= lib.MP_FRAME_PAYLOAD_MAX


def test_hello_split_at_every_byte() -> None:
    stream = hello()
    for cut in range(len(stream) + 1):
        frames = reader()
        frames.feed(stream[:cut])
        early = frames.next_frame()
        assert (early is not None) == (cut == len(stream))
        if early is None:
            frames.feed(stream[cut:])
            early = frames.next_frame()
        assert early is not None
        assert wire.check_hello(wire.decode_json(early.payload, wire.Hello, what="HELLO"))
        assert frames.next_frame() is None


def test_hello_one_byte_at_a_time() -> None:
    frames = reader()
    got = []
    for byte in hello() + hello(client_name="second"):
        frames.feed(bytes([byte]))
        got += read_all(frames)
    assert [kind for kind, _, _ in got] == [wire.HELLO, wire.HELLO]


@given(
    payloads=st.lists(st.binary(max_size=300), max_size=20),
    cuts=st.lists(st.integers(1, 200), max_size=60),
)
def test_any_frames_in_any_pieces_come_out_whole_and_in_order(
    payloads: list[bytes], cuts: list[int]
) -> None:
    stream = b"".join(
        wire.encode_frame(wire.CONTROL, payload, request_id=index)
        for index, payload in enumerate(payloads)
    )
    frames = reader()
    got = []
    position = 0
    for cut in [*cuts, len(stream)]:
        frames.feed(stream[position : position + cut])
        position = min(position + cut, len(stream))
        got += read_all(frames)
    assert got == [(wire.CONTROL, index, payload) for index, payload in enumerate(payloads)]
    assert frames.buffered_bytes == 0


def test_bytes_behind_the_handshake_are_kept_for_the_role() -> None:
    frames = reader()
    frames.feed(hello() + b"not a frame of ours")
    assert frames.next_frame() is not None
    assert frames.rest() == b"not a frame of ours"
    assert frames.buffered_bytes == 0


def test_oversized_length_is_refused_by_the_header_alone() -> None:
    stream = bytearray(hello())
    stream[16:20] = (limits.HELLO_PAYLOAD_MAX_BYTES + 1).to_bytes(4, "little")
    frames = reader()
    frames.feed(stream[: wire.HEADER_BYTES])
    with pytest.raises(ProtocolError, match=r"announced 16385 bytes .* 16384 are allowed"):
        frames.next_frame()


def test_unknown_type_is_refused() -> None:
    frames = reader()
    frames.feed(wire.encode_frame(wire.READ, bytes(48)))
    with pytest.raises(ProtocolError, match="unexpected type 5"):
        frames.next_frame()


def test_another_frame_version_is_named_with_ours() -> None:
    stream = bytearray(hello())
    stream[4:6] = (7).to_bytes(2, "little")
    frames = reader()
    frames.feed(stream)
    with pytest.raises(ProtocolError, match=r"the client speaks wire version 7, .* speaks 1"):
        frames.next_frame()


def test_another_protocol_is_recognised_as_such() -> None:
    frames = reader()
    frames.feed(b"GET / HTTP/1.1\r\nHost: store\r\nAccept: */*\r\nUser-Agent: curl/8\r\n\r\n")
    with pytest.raises(ProtocolError, match="does not speak Millpond"):
        frames.next_frame()


def test_every_flipped_bit_is_noticed() -> None:
    stream = hello()
    for position in range(len(stream)):
        damaged = bytearray(stream)
        damaged[position] ^= 1 << (position % 8)
        frames = reader()
        frames.feed(damaged)
        try:
            frame = frames.next_frame()
        except ProtocolError:
            continue
        assert frame is None, f"damage at byte {position} went unnoticed"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"wire_version": 9}, r"the client speaks wire version 9, this store speaks 1"),
        ({"client_id": "xyz"}, "client_id"),
        ({"client_id": CLIENT_ID.upper()}, "client_id"),
        ({"client_name": "n" * 256}, "client_name"),
        ({"role": "root"}, "role"),
        ({"wire_version": "1"}, "wire_version"),
    ],
)
def test_hello_that_says_nonsense(changes: dict[str, object], complaint: str) -> None:
    frames = reader()
    frames.feed(hello(**changes))
    frame = frames.next_frame()
    assert frame is not None
    with pytest.raises(ProtocolError, match=complaint):
        wire.check_hello(wire.decode_json(frame.payload, wire.Hello, what="HELLO"))


def test_hello_from_the_future_has_fields_we_ignore() -> None:
    frames = reader()
    frames.feed(hello(token="secret", nested={"a": [1]}))
    frame = frames.next_frame()
    assert frame is not None
    assert wire.check_hello(wire.decode_json(frame.payload, wire.Hello, what="HELLO"))


@given(st.binary(max_size=400))
def test_random_bytes_never_do_anything_but_refuse(noise: bytes) -> None:
    frames = reader()
    frames.feed(noise)
    with contextlib.suppress(ProtocolError):
        assert frames.next_frame() is None


def test_error_text_of_json_and_of_plain_words() -> None:
    assert wire.error_text(b'{"error": "no"}') == "no"
    assert wire.error_text(b"plain words\0") == "plain words"
    assert wire.error_text(b"a\nb") == "a\\nb"
    assert wire.error_text(b"") == "no reason given"
