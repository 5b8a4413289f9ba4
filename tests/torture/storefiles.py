"""The files of a store, read as format.h says; nothing is guessed.

For tests that flip bits or watch what is appended.  The files are read through the page cache while
their owner writes with O_DIRECT, which the kernel keeps coherent at our scale: a group or record is
taken only when its checksum is right.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millpond.native import ffi, lib
from millpond.native import record as codec
from millpond.native.record import Extent, Record

BLOCK = lib.MP_BLOCK_BYTES
GROUP_BYTES = lib.MP_GROUP_HEADER_BYTES


def struct_at(path: Path, name: str, offset: int) -> Any:
    """A C struct as the file has it."""
    found = ffi.new(f"struct {name} *")
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(ffi.sizeof(found[0]))
    ffi.memmove(found, data, len(data))
    return found


def checksum_of(found: Any, *, skip_bytes: int = 16) -> int:
    """Over a struct behind its checksum field."""
    return codec.xxh3(bytes(ffi.buffer(found))[skip_bytes:])


@dataclass(frozen=True)
class Group:
    """One append of the store: its records, each with its offset in the segment file."""

    segment: int
    offset: int
    length_bytes: int
    records: tuple[tuple[int, Record], ...]

    @property
    def batch_bytes(self) -> int:
        """What destage has brought in it."""
        batches = (each for _, each in self.records if each.type == lib.MP_RECORD_BATCH)
        return sum(batch.length_bytes for batch in batches)


def group_at(path: Path, segment: int, offset: int) -> Group | None:
    """The group at this place; None when there is none, or not all of it."""
    if not path.exists() or path.stat().st_size < offset + GROUP_BYTES:
        return None
    header = struct_at(path, "mp_group", offset)
    if header.checksum != checksum_of(header) or header.segment != segment:
        return None
    with path.open("rb") as file:
        file.seek(offset)
        data = memoryview(file.read(header.length_bytes))
    records = []
    at = GROUP_BYTES
    for _ in range(header.record_count):
        try:
            found = codec.decode_record(data[at:])
        except OSError:
            return None
        if found is None:
            return None
        records.append((offset + at, found))
        at += -(-found.length_bytes // 8) * 8
    return Group(segment, offset, header.length_bytes, tuple(records))


def segment_paths(store: Path) -> dict[int, Path]:
    """Segment files of a store's directory by number; file 0 holds the superblocks."""
    found = {}
    for path in store.iterdir():
        if (number := segment_number(path)) is not None:
            found[number] = path
    return dict(sorted(found.items()))


def segment_number(path: Path) -> int | None:
    """As driver_linux_files.c names them: 16 hexadecimal digits and .seg."""
    if path.suffix != ".seg" or len(path.stem) != 16:
        return None
    return int(path.stem, 16) or None


def groups_of(store: Path) -> Iterator[tuple[Path, Group]]:
    """All groups of a store's log, segment by segment."""
    for segment, path in segment_paths(store).items():
        offset = 0
        while (group := group_at(path, segment, offset)) is not None:
            yield path, group
            offset += group.length_bytes


def extents_at(offset: int, found: Record) -> Iterator[tuple[int, Extent]]:
    """The extents of a record at this offset of a file, each with the place of its bytes."""
    at = offset + found.header_length_bytes
    for extent in found.extents:
        yield at, extent
        at += extent.stored_length_bytes


def raw_block_at(offset: int, found: Record, block: int) -> int | None:
    """Where a record at this offset has the raw bytes of a block; None: it has not."""
    for at, extent in extents_at(offset, found):
        inside = block - extent.first_block
        if extent.codec == lib.MP_CODEC_NONE and 0 <= inside < extent.block_count:
            return at + inside * BLOCK
    return None


def find_in_store(store: Path, block: int) -> tuple[Path, int]:
    """The file and offset of the newest raw copy of a block."""
    newest = None
    for path, group in groups_of(store):
        for offset, found in group.records:
            if found.type == lib.MP_RECORD_BATCH:
                at = raw_block_at(offset, found, block)
                newest = newest if at is None else (path, at)
    assert newest is not None, f"the store has no raw block {block}"
    return newest


def flip(path: Path, offset: int, bit: int = 3) -> None:
    """One bit, on the device."""
    with path.open("r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), offset)
        os.fsync(file.fileno())
