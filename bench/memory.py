"""What the cache's tables take in memory: resident pages, with every entry in use.

    bench/memory.py index LOG_BLOCKS          every block of the log holds another block of a guest
    bench/memory.py slots SLOTS SLOT_BLOCKS   every block of every slot is valid

One process per table, so that nothing else comes and goes between the two looks; prints JSON.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from millpond.native import check, ffi, lib

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Of this process (proc(5), statm field 2)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def index(log_blocks: int) -> dict[str, Any]:
    """A log in which every block is another block of a guest's disk."""
    table = ffi.new("struct index *")
    before = resident_bytes()
    check(lib.index_init(table, log_blocks, 1))
    put = lib.index_put
    for block in range(log_blocks):
        put(table, 1, block, block + 1)
    assert table.used == log_blocks
    return {"resident_bytes": resident_bytes() - before, "bytes": lib.index_memory_bytes(table)}


def slots(slot_count: int, slot_blocks: int) -> dict[str, Any]:
    """A table without a free block; memory_bytes counts all of it, sketch and heads too."""
    lib.mp_slots_free(full_table(16, slot_blocks))  # the code's own pages are no part of a table
    before = resident_bytes()
    table = full_table(slot_count, slot_blocks)
    resident = resident_bytes() - before
    return {"resident_bytes": resident, "bytes": lib.mp_slots_memory_bytes(table)}


def full_table(slot_count: int, slot_blocks: int) -> Any:
    """Every block of every slot is valid, every line of the sketch was used."""
    table = lib.mp_slots_new(slot_count, slot_blocks, 1)
    assert table
    for block in range(slot_count * slot_blocks):
        slot = lib.mp_slots_reserve(table, 1, block)
        assert slot >= 0
        lib.mp_slots_touch(table, 1, block)
        lib.mp_slots_install(table, slot, block, block | 1)
        lib.mp_slots_unpin(table, slot)
    for block in range(slot_count * slot_blocks, 2 * slot_count * slot_blocks, slot_blocks):
        lib.mp_slots_touch(table, 1, block)  # has no slot: counted in the sketch
    return table


if __name__ == "__main__":
    what, *numbers = sys.argv[1:]
    print(json.dumps(index(*map(int, numbers)) if what == "index" else slots(*map(int, numbers))))
