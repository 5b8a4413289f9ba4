"""A cache device, read as format.h says: superblock, checkpoint, log records, slots."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from millpond.native import ffi
from millpond.native import record as codec
from millpond.native.record import Record
from torture.storefiles import BLOCK, checksum_of, raw_block_at, struct_at

SUPER_COPIES = (0, 65536)
SUPER_MAGIC = int.from_bytes(b"MPNDSCP1", "little")


def superblock(path: Path) -> Any:
    """The valid one with the higher generation."""
    copies = [struct_at(path, "mp_cache_super", offset) for offset in SUPER_COPIES]
    valid = [
        each for each in copies if each.magic == SUPER_MAGIC and each.checksum == checksum_of(each)
    ]
    assert valid, f"{path} has no superblock"
    return max(valid, key=lambda each: int(each.generation))


def log_records(path: Path) -> Iterator[tuple[int, Record]]:
    """Every record of every segment that begins with one, with its offset on the device."""
    found = superblock(path)
    with path.open("rb") as file:
        for index in range(found.log_segment_count):
            begin = found.log_offset_bytes + index * found.log_segment_bytes
            file.seek(begin)
            segment = memoryview(file.read(found.log_segment_bytes))
            at = 0
            while at < len(segment):
                try:
                    record = codec.decode_record(segment[at:])
                except OSError:
                    break
                if record is None:
                    break
                yield begin + at, record
                at += record.length_bytes


def find_in_log(path: Path, block: int) -> tuple[int, int]:
    """The offset of the newest raw copy of a block, and the sequence of its record."""
    newest = (0, 0)
    for offset, record in log_records(path):
        at = raw_block_at(offset, record, block)
        if at is not None and record.last_sequence > newest[1]:
            newest = (at, record.last_sequence)
    assert newest[0], f"the log has no raw block {block}"
    return newest


def slot_table(path: Path) -> Iterator[tuple[int, Any]]:
    """The entries of the last checkpoint's slot table that are in use, with their index."""
    found = superblock(path)
    assert found.checkpoint_generation, "no checkpoint yet"
    offset = found.checkpoint_offset_bytes[found.checkpoint_area]
    header = struct_at(path, "mp_cache_checkpoint", offset)
    assert header.generation == found.checkpoint_generation
    at = offset + BLOCK
    for name, count in (
        ("mp_cache_volume", header.volume_count),
        ("mp_segment_entry", header.segment_count),
        ("mp_tombstone", header.tombstone_count),
        ("mp_index_entry", header.index_count),
    ):
        at += ffi.sizeof(f"struct {name}") * count
    entry_bytes = ffi.sizeof("struct mp_slot_entry") + 4 * header.slot_blocks
    with path.open("rb") as file:
        file.seek(at)
        table = file.read(entry_bytes * header.slot_count)
    for index in range(header.slot_count):
        entry = ffi.new("struct mp_slot_entry *")
        ffi.memmove(entry, table[index * entry_bytes : (index + 1) * entry_bytes], 16)
        if entry.valid:
            yield index, entry


def find_in_slots(path: Path, block: int) -> int:
    """The offset of a block's copy in the read slots, as the last checkpoint tells."""
    found = superblock(path)
    blocks = found.slot_bytes // BLOCK
    for index, entry in slot_table(path):
        if entry.key & ((1 << 40) - 1) == block // blocks and entry.valid >> block % blocks & 1:
            place = found.slots_offset_bytes + index * found.slot_bytes
            return int(place + block % blocks * BLOCK)
    raise AssertionError(f"no slot has block {block}")
