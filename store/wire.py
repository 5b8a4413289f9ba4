"""Frames of the wire in Python, sans-I/O: bytes in, frames out. HELLO, CONTROL, and transfers.

Both ends of the protocol live here; data frames between a cache and the store core are built and
parsed in C and never pass through this module on the data path.

Rules: a frame's length is checked against the reader's limit as soon as its header is there, so
that a hostile length costs nothing. Payloads of control frames are wholly under the checksum.
Happy path: feed(bytes), then next_frame() until None.
Failure modes: ProtocolError, after which the reader is dead: version (names both sides), type,
length, checksum, holes that are not zero.
"""

from collections.abc import Collection
from errno import EBADMSG
from typing import Any, Literal, TypeVar

import msgspec

from millpond.native import ffi, lib
from millpond.native.record import Frame, decode_frame, encode_frame
from millpond.store import limits
from millpond.store.errors import ProtocolError, one_line

HEADER_BYTES: int = lib.MP_FRAME_HEADER_BYTES
PAYLOAD_MAX_BYTES: int = lib.MP_FRAME_PAYLOAD_MAX
WIRE_VERSION: int = lib.MP_WIRE_VERSION

HELLO: int = lib.MP_FRAME_HELLO
HELLO_REPLY: int = lib.MP_FRAME_HELLO_REPLY
CONTROL: int = lib.MP_FRAME_CONTROL
CONTROL_REPLY: int = lib.MP_FRAME_CONTROL_REPLY
READ: int = lib.MP_FRAME_READ
READ_REPLY: int = lib.MP_FRAME_READ_REPLY
BATCH: int = lib.MP_FRAME_BATCH
BATCH_REPLY: int = lib.MP_FRAME_BATCH_REPLY
PUT_VOLUME: int = lib.MP_FRAME_PUT_VOLUME
PUT_VOLUME_REPLY: int = lib.MP_FRAME_PUT_VOLUME_REPLY
DELETE_VOLUME: int = lib.MP_FRAME_DELETE_VOLUME
DELETE_VOLUME_REPLY: int = lib.MP_FRAME_DELETE_VOLUME_REPLY
CHECKPOINT: int = lib.MP_FRAME_CHECKPOINT
CHECKPOINT_REPLY: int = lib.MP_FRAME_CHECKPOINT_REPLY
ERROR: int = lib.MP_FRAME_ERROR
BLOCK_STATUS: int = lib.MP_FRAME_BLOCK_STATUS
BLOCK_STATUS_REPLY: int = lib.MP_FRAME_BLOCK_STATUS_REPLY

# What a side can do beyond the wire version, as named in HELLO and HELLO_REPLY.
FEATURE_BLOCK_STATUS = "block-status"

STATUS_OK: int = lib.MP_STATUS_OK
STATUS_UNKNOWN_VOLUME: int = lib.MP_STATUS_UNKNOWN_VOLUME
STATUS_STALE_EPOCH: int = lib.MP_STATUS_STALE_EPOCH
STATUS_FULL: int = lib.MP_STATUS_FULL
STATUS_INVALID: int = lib.MP_STATUS_INVALID
STATUS_CONFLICT: int = lib.MP_STATUS_CONFLICT

STATUS_NAMES: dict[int, str] = {
    lib.MP_STATUS_OK: "ok",
    lib.MP_STATUS_UNKNOWN_VOLUME: "unknown volume",
    lib.MP_STATUS_STALE_EPOCH: "stale epoch: another writer has opened the volume",
    lib.MP_STATUS_BEHIND: "the store is behind the position asked for",
    lib.MP_STATUS_GAP: "gap: earlier writes are missing",
    lib.MP_STATUS_LINEAGE: "unknown lineage",
    lib.MP_STATUS_CORRUPT: "corrupt data",
    lib.MP_STATUS_IO: "I/O error",
    lib.MP_STATUS_FULL: "the store is full",
    lib.MP_STATUS_INVALID: "invalid request",
    lib.MP_STATUS_RANGE: "outside of the volume",
    lib.MP_STATUS_CONFLICT: "conflict",
}

__all__ = ["Frame", "FrameReader", "Hello", "HelloReply", "encode_frame", "encode_json"]

Role = Literal["control", "fetch", "destage"]
Bytes = bytes | bytearray | memoryview
T = TypeVar("T")


class Hello(msgspec.Struct, frozen=True):
    """Opens a connection and names its role."""

    role: Role
    wire_version: int
    client_id: str
    client_name: str = ""
    features: list[str] = []


class HelloReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """The store's answer; error is set when the frame's status is not OK."""

    wire_version: int
    features: list[str] = []
    store_id: str = ""
    max_frame_bytes: int = 0
    version: str = ""
    error: str = ""


def encode_json(
    frame_type: int, value: Any, *, request_id: int = 0, status: int = STATUS_OK
) -> bytes:
    """A frame with a JSON payload."""
    return encode_frame(
        frame_type, msgspec.json.encode(value), request_id=request_id, status=status
    )


def encode_error(message: str) -> bytes:
    """The ERROR frame that ends a connection whose peer broke the protocol."""
    return encode_json(ERROR, {"error": message}, status=STATUS_INVALID)


def decode_json(payload: Bytes, kind: type[T], *, what: str) -> T:
    """A typed, validated JSON payload; unknown fields are ignored (they are from the future)."""
    try:
        return msgspec.json.decode(payload, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"malformed {what}: {one_line(str(error))}") from None


def error_text(payload: Bytes) -> str:
    """What an ERROR frame says: JSON from our Python, plain text from the core."""
    try:
        text = msgspec.json.decode(payload, type=dict[str, Any]).get("error", "")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        text = bytes(payload).rstrip(b"\0").decode("utf-8", "replace")
    return one_line(str(text)) or "no reason given"


def check_hello(hello: Hello) -> bytes:
    """The client id of an acceptable HELLO; ProtocolError names what is wrong."""
    if hello.wire_version != WIRE_VERSION:
        raise ProtocolError(version_mismatch(hello.wire_version, "this store", "the client"))
    if len(hello.client_name) > limits.CLIENT_NAME_MAX:
        raise ProtocolError(f"client_name is longer than {limits.CLIENT_NAME_MAX} characters")
    client_id = parse_id(hello.client_id)
    if client_id is None:
        raise ProtocolError("client_id is not 16 bytes in lower-case hex")
    return client_id


def version_mismatch(theirs: int, we: str, they: str) -> str:
    """The line for a version we do not speak; it names both sides."""
    return f"{they} speaks wire version {theirs}, {we} speaks {WIRE_VERSION}; upgrade the older one"


def parse_id(text: str) -> bytes | None:
    """16 bytes from lower-case hex, or None."""
    if len(text) != 2 * lib.MP_VOLUME_ID_BYTES or not set(text) <= set("0123456789abcdef"):
        return None
    return bytes.fromhex(text)


class FrameReader:
    """Reassembles frames from a byte stream; one per connection and direction."""

    def __init__(self, *, payload_max_bytes: int, types: Collection[int], peer: str) -> None:
        assert payload_max_bytes <= PAYLOAD_MAX_BYTES
        self._buffer = bytearray()
        self._start = 0
        self._payload_max_bytes = payload_max_bytes
        self._types = frozenset(types)
        self._peer = peer
        self._broken = False

    def feed(self, data: Bytes) -> None:
        """Take bytes from the stream."""
        if self._start > 0 and self._start >= len(self._buffer) // 2:
            del self._buffer[: self._start]
            self._start = 0
        self._buffer += data

    def expect(self, *, payload_max_bytes: int, types: Collection[int]) -> None:
        """Change what is acceptable from the next frame on (after the handshake)."""
        assert payload_max_bytes <= PAYLOAD_MAX_BYTES
        self._payload_max_bytes = payload_max_bytes
        self._types = frozenset(types)

    @property
    def buffered_bytes(self) -> int:
        """Bytes taken and not yet returned as frames."""
        return len(self._buffer) - self._start

    def rest(self) -> bytes:
        """Bytes behind the last frame, for another parser; the reader is empty afterwards."""
        rest = bytes(memoryview(self._buffer)[self._start :])
        self._buffer.clear()
        self._start = 0
        return rest

    def next_frame(self) -> Frame | None:
        """The next whole frame, None when more bytes are needed; ProtocolError ends the reader."""
        assert not self._broken, "reading on after a protocol error"
        if self.buffered_bytes < HEADER_BYTES:
            return None
        try:
            return self._parse()
        except ProtocolError:
            self._broken = True
            raise

    def _parse(self) -> Frame | None:
        with memoryview(self._buffer) as view, view[self._start :] as stream:
            header_bytes = bytes(stream[:HEADER_BYTES])
            header = ffi.cast("struct mp_frame *", ffi.from_buffer(header_bytes))
            self._check_header(header)
            length_bytes = HEADER_BYTES + int(header.payload_bytes)
            if len(stream) < length_bytes:
                return None
            whole = bytes(stream[:length_bytes])
        try:
            decoded = decode_frame(whole)
        except OSError as error:
            raise ProtocolError(f"{self._peer} sent a {_flaw(error)} frame") from None
        assert decoded is not None, "the whole frame is here"
        self._start += length_bytes
        return decoded[0]

    def _check_header(self, header: Any) -> None:
        """What can be refused before the payload is there."""
        if header.magic != FRAME_MAGIC:
            raise ProtocolError(f"{self._peer} does not speak Millpond's protocol (bad magic)")
        if header.version != WIRE_VERSION:
            raise ProtocolError(version_mismatch(header.version, "this side", self._peer))
        if header.type not in self._types:
            raise ProtocolError(f"{self._peer} sent a frame of unexpected type {header.type}")
        if header.payload_bytes > self._payload_max_bytes:
            raise ProtocolError(
                f"{self._peer} announced {header.payload_bytes} bytes of payload,"
                f" {self._payload_max_bytes} are allowed"
            )
        if header.checked_bytes > header.payload_bytes or header.reserved != 0:
            raise ProtocolError(f"{self._peer} sent a malformed frame header")


def _flaw(error: OSError) -> str:
    return "corrupt (its checksum does not match)" if error.errno == EBADMSG else "malformed"


# The magic is a #define, which cffi does not see: take it from a frame that the core sealed.
FRAME_MAGIC = int.from_bytes(encode_frame(HELLO)[:4], "little")
