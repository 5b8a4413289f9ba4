"""The files of a store and of a cache device, read as format.h says; nothing is guessed.

For tests that flip bits or watch what is appended.  The files are read through the page cache while
their owner writes with O_DIRECT, which the kernel keeps coherent at our scale: a group or record is
taken only when its checksum is right.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millpond.native import ffi, lib
from millpond.native import record as codec
from millpond.native.record import Extent, Record

BLOCK = lib.MP_BLOCK_BYTES
GROUP_BYTES = lib.MP_GROUP_HEADER_BYTES
SUPER_COPIES = (0, 65536)  # of a cache device: format.h


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
