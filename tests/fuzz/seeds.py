"""What the fuzzer begins with: whole structures and ordinary lives, made here, not kept as blobs.

An input is a string of steps or patches; the C file of a harness says how it reads them.  A seed is
an ordinary one, so that the fuzzer starts behind the first checks.
"""

import struct
from collections.abc import Callable, Iterator, Sequence

from golden import generate
from millpond.native import ffi
from models import record_model as model

VOLUME = b"volume A of fuzz"
SIZE = 4096 * model.BLOCK
RECORD_NAMES = ("record_log", "record_batch", "record_volume")
FRAME_NAMES = ("frame_read", "frame_read_reply", "frame_status", "frame_status_reply")
# The structures of an image that a patch may change, as fuzz.h numbers them: of format.h, or so
# many bytes of their own.
CACHE_KINDS = (
    *("mp_cache_super", "mp_cache_checkpoint", "mp_cache_volume", "mp_segment_entry"),
    *("mp_tombstone", "mp_index_entry", "mp_slot_entry", "mp_record", "mp_extent"),
)
CHECKPOINT, CHECKPOINT_VOLUME, CHECKPOINT_SEGMENT, GRAVE = 104, 736, 56, 24
STORE_KINDS = (
    *("mp_store_super", "mp_group", "mp_record", "mp_extent", "mp_volume_state", 48, 64, 64),
    *(CHECKPOINT, CHECKPOINT_VOLUME, CHECKPOINT_SEGMENT, 16, GRAVE),
)


def make(name: str) -> Iterator[bytes]:
    """The seeds of one harness."""
    makers: dict[str, Callable[[], Iterator[bytes]]] = {
        "record": _record,
        "nbd": _nbd,
        "fetch": _fetch,
        "wire": _wire,
        "cache": lambda: _patches(CACHE_KINDS),
        "store": lambda: _patches(STORE_KINDS),
    }
    return makers[name]()


def _record() -> Iterator[bytes]:
    """Kind, then bytes."""
    for name in FRAME_NAMES:
        data = generate.path_of(name).read_bytes()
        yield b"\0" + data
        yield b"\1" + data
    for name in RECORD_NAMES:
        data = generate.path_of(name).read_bytes()
        yield b"\2" + data
        yield b"\3" + data
    packed = generate.packed_pattern(4 * model.BLOCK)
    extent = model.lz4_extent(model.Extent(VOLUME, 4092, 4, 1001), packed)
    yield b"\4" + extent.pack() + packed
    yield b"\5" + struct.pack("<QBQ", 100, 9, 1) + b"\xff\xff\3" + bytes(40) + b"data" * 30


def _patch(offset: int, how: int, value: int) -> bytes:
    """Offset, how, value: see input_patch."""
    return struct.pack("<HBQ", offset, how, value)


def _fields(kind: str | int) -> Iterator[tuple[int, int]]:
    """Offset and width of every number in a structure; of an array the first."""
    if isinstance(kind, int):
        step = 2 if kind <= 64 else 8 if kind < 200 else 32
        yield from ((offset, min(step, 8)) for offset in range(0, kind, step))
        return
    for name, field in ffi.typeof(f"struct {kind}").fields:
        if not name.startswith("reserved"):
            size = ffi.sizeof(field.type)
            yield field.offset, size if size in (1, 2, 4) else 8


def _changes(layout: str, start: int = 0) -> Iterator[bytes]:
    """A patch for each field of a structure that begins there: as high as can be, one more."""
    for offset, width in _fields(layout):
        for how, value in ((0, (1 << 64) - 1), (4, 1)):
            yield _patch(start + offset, how | width.bit_length() - 1, value)


# ---- the NBD stream ----


def _request(command: int, block: int, blocks: int, token: int = 7) -> bytes:
    """Step 0: command with flags in the upper half, offset, length, token."""
    length = (blocks * model.BLOCK).to_bytes(3, "little")
    return struct.pack("<BBI", 0, command, block * model.BLOCK) + length + bytes([token])


def _raw(command: int, offset: int, length: int, flags: int = 0) -> bytes:
    """Step 1: bytes; here those of a request."""
    data = struct.pack(">IHHQQI", 0x25609513, flags, command, 1, offset, length)
    return bytes([1, len(data)]) + data


def _turns(count: int) -> bytes:
    return bytes([2, count])


def _nbd() -> Iterator[bytes]:
    answer, narrow, hang_up, again, ship = b"\3", b"\4\0\x10", b"\5", b"\6", b"\7"
    everything = b"".join(
        _request(command, 10 + command, 3) + _turns(2) for command in (1, 0, 4, 6, 5, 7, 3)
    )
    for how in (0, 6, 8, 14, 1):  # crash and stop; simple, structured, read-only
        yield bytes([how]) + everything + answer + _turns(4)
    yield b"\x08" + _request(1, 0, 64) * 6 + ship + ship + _request(0, 0, 70) + answer + _turns(3)
    yield b"\x0e" + narrow + _request(0, 0, 70) * 3 + answer + _turns(2) + hang_up + _turns(2)
    yield b"\x00" + _raw(1, 5, 100) + _turns(1) + again + _request(3, 0, 0) + _turns(1)
    yield b"\x08" + _raw(0, 1 << 40, 1 << 20) + _raw(9, 0, 0) + _raw(2, 0, 0) + _turns(3)
    yield b"\x08" + _request(4, 0, 900) + _request(1, 4, 8) + _request(6, 0, 4000) + ship + ship
    yield b"\x0e" + _request(7, 0, 4000) + _turns(1) + answer + _turns(2)
    edges = (
        (0, 0),
        (SIZE - 1, 1),
        (SIZE - 1, 2),
        (SIZE, 0),
        ((1 << 64) - 1, 1),
        (1, (1 << 32) - 1),
    )
    for command in (0, 1, 3, 4, 5, 6, 7, 8, 0xFFFF):
        asked = b"".join(_raw(command, *edge) + _turns(1) for edge in edges)
        yield b"\x0e" + asked + answer + _turns(2)


# ---- replies of a store ----


def _ask(block: int, blocks: int) -> bytes:
    return struct.pack("<BHB", 0, block, blocks)


def _reply(flags: int, patches: bytes = b"", rest: bytes = b"") -> bytes:
    return bytes([1, flags, len(patches) // 11]) + patches + rest


def _fetch() -> Iterator[bytes]:
    for flags, rest in (
        *((0, b""), (1, _patch(20, 1, 7)), (2, b"\5"), (4, b"\6"), (128, b"")),
        *((8, b"\0\1\0"), (16, b"\2"), (64, b"\x10\0\0"), (32, b"")),
    ):
        yield b"\1" + _ask(3, 20) + _reply(flags, rest=rest) + b"\3\2" + _ask(4, 9) + b"\5\3\2"
    for layout, start in (("mp_read_reply", 0), ("mp_piece", 48), ("mp_extent", 64)):
        for change in _changes(layout, start):
            yield b"\0" + _ask(12, 12) + _reply(0, change) + b"\3\3\5\3\2"
    for layout, start in (("mp_status_reply", 0), ("mp_status_run", 48)):
        for change in _changes(layout, start):
            yield b"\0" + _ask(16, 5) + _reply(0, change) + b"\3\3\5\3\2"
    for block in (15, 17):  # one piece of data, one of zeroes; both say that they are two blocks
        longer = _patch(56, 5, 1) + _patch(88, 5, 1)
        yield b"\1" + _ask(block, 0) + _reply(0, longer) + b"\3\3" + _ask(9, 3) + b"\5\3\2"
    yield b"\1" + _ask(12, 60) + b"\4\0" + b"\5\3\1" + _ask(600, 60) + b"\4\0\5\6\3\1"
    yield b"\1" + _ask(1, 200) + _reply(0, _patch(48, 3, 900)) + _ask(4, 99) + b"\5\3\3"


# ---- frames to a store ----


def _wire() -> Iterator[bytes]:
    ask = struct.pack("<BBHB", 1, 0x20 | 4, 10, 0)[:4]
    batch = struct.pack("<BBHB", 2, 2, 30, 9)
    put, delete, checkpoint, turns = b"\3\0", b"\4\0", b"\5", b"\x08\4"
    yield b"\1" + batch + turns + ask + turns + checkpoint + turns + batch + turns
    yield b"\0" + put + batch + batch + turns + delete + turns + checkpoint + turns
    yield b"\1" + b"\3\1" + turns + struct.pack("<BBHB", 2, 3, 5, 5) + turns + ask + turns
    for connection in range(4):
        for kind in range(20):
            yield bytes([connection & 1, 0, connection, kind, 48, 0]) + VOLUME + bytes(32) + turns
    sealed = struct.pack("<BBHB", 2, 2 | 1 << 5, 30, 9)
    for layout, start in (("mp_record", 0), ("mp_extent", 192)):
        for change in _changes(layout, start):
            yield b"\1" + sealed + change + turns + checkpoint + turns
    for change in _changes("mp_volume_state"):
        yield b"\1" + bytes([3, 0x20]) + change + turns + checkpoint + turns
    for kind, layout in ((5, "mp_read_request"), (17, "mp_status_request")):
        for offset, width in _fields(layout):
            asked = bytearray(VOLUME + struct.pack("<QQQQ", 1, 0, 10, 20))
            asked[offset : offset + width] = b"\xff" * width
            yield b"\1" + bytes([0, 2, kind, 48, 0]) + asked + turns
    yield b"\0" + bytes([6, 1, 9]) + b"no frame." + turns + b"\7\1" + b"\7\3" + turns


# ---- images ----


def _patches(kinds: Sequence[str | int]) -> Iterator[bytes]:
    """Nothing changed, in each image; then each field of each kind: as high as can be, one more."""
    for how in range(16):
        yield bytes([how])
    for kind, layout in enumerate(kinds):
        for offset, width in _fields(layout):
            for how, value, which in ((0, (1 << 64) - 1, 0), (4, 1, offset * 7 % 256)):
                how |= width.bit_length() - 1
                place = struct.pack("<BH", which + how & 1, kind << 8 | which)
                yield place + _patch(offset, how, value)
