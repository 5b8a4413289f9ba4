"""Ways to spoil bytes: what a disk does by itself, and what only malice does.

`Damage` is what happens to a device: a bit, a sector, a block that belongs elsewhere, an end cut
off; checksums do not fit afterwards.  `forge` sets a field of a C struct to a hostile value; the
caller seals the checksum again, so that it reaches the code behind the checks.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from millpond.native import ffi, lib
from millpond.native import record as codec
from millpond.native.drivers import Sim

SECTOR = 512
BLOCK = lib.MP_BLOCK_BYTES

Peek = Callable[[int, int], bytes]
Poke = Callable[[int, bytes], None]


@dataclass(frozen=True)
class Region:
    """A part of a file that holds something."""

    name: str
    offset: int
    length_bytes: int


@dataclass(frozen=True)
class Damage:
    """What was done; cut: everything behind is gone, so an earlier end is legal."""

    text: str
    cut: bool = False


def damage(chance: random.Random, region: Region, peek: Peek, poke: Poke) -> Damage:
    """Do something to a region."""
    at = region.offset + chance.randrange(region.length_bytes)
    if chance.randrange(2):  # headers and tables are where the code looks
        at = region.offset + chance.randrange(min(region.length_bytes, 2 * BLOCK))
    kind = chance.choice(("bit", "bit", "sector", "zeroes", "block", "cut"))
    sector = at // SECTOR * SECTOR
    if kind == "bit":
        bit = chance.randrange(8)
        poke(at, bytes([peek(at, 1)[0] ^ 1 << bit]))
        return Damage(f"bit {bit} of byte {at} in {region.name}")
    if kind == "sector":
        poke(sector, chance.randbytes(SECTOR))
        return Damage(f"sector at {sector} in {region.name} random")
    if kind == "zeroes":
        poke(sector, bytes(SECTOR))
        return Damage(f"sector at {sector} in {region.name} zero")
    block = at // BLOCK * BLOCK
    if kind == "block":
        other = region.offset // BLOCK + chance.randrange(region.length_bytes // BLOCK)
        poke(block, peek(other * BLOCK, BLOCK))
        return Damage(f"block at {block} in {region.name} is a copy of that at {other * BLOCK}")
    poke(block, bytes(region.offset + region.length_bytes - block))
    return Damage(f"{region.name} zero from {block} on", cut=True)


def hostile_integer(chance: random.Random, bits: int, old: int) -> int:
    """Small, huge, at a limit, a little beside what it was, or the old one twice."""
    limits = (MAX.RECORD_EXTENTS, MAX.RECORD_PAYLOAD, MAX.FRAME_PAYLOAD, MAX.SEGMENT, BLOCK)
    value = chance.choice(
        (
            0,
            1,
            (1 << bits) - 1,
            1 << bits - 1,
            1 << chance.randrange(bits),
            chance.getrandbits(bits),
            old + chance.choice((-1, 1, -8, 8, BLOCK, -BLOCK)),
            old * 2,
            old ^ 1 << chance.randrange(bits),
            chance.choice(limits) + chance.choice((-1, 0, 1)),
            (1 << bits) - BLOCK,
            (1 << 51) - 1,
        )
    )
    return value & (1 << bits) - 1


class MAX:
    """Limits of format.h that lengths and counts are compared with."""

    RECORD_EXTENTS = lib.MP_RECORD_EXTENTS_MAX
    RECORD_PAYLOAD = lib.MP_RECORD_PAYLOAD_MAX
    FRAME_PAYLOAD = lib.MP_FRAME_PAYLOAD_MAX
    SEGMENT = lib.MP_CACHE_SEGMENT_BYTES


def forge(chance: random.Random, struct: str, data: bytearray, at: int, *, skip: int = 0) -> str:
    """Set a field of the struct at this place of data to something hostile; says which."""
    fields = [
        (name, field)
        for name, field in ffi.typeof(f"struct {struct}").fields
        if field.offset >= skip
    ]
    name, field = chance.choice(fields)
    length = ffi.sizeof(field.type)
    place = at + field.offset
    if field.type.kind == "primitive":
        old = int.from_bytes(data[place : place + length], "little")
        new = hostile_integer(chance, 8 * length, old)
    else:
        width = chance.choice((1, 8)) if length % 8 == 0 else 1
        place += chance.randrange(length // width) * width
        length = width
        old = int.from_bytes(data[place : place + length], "little")
        new = hostile_integer(chance, 8 * length, old)
        name = f"{name}[{place - at - field.offset}]"
    data[place : place + length] = new.to_bytes(length, "little")
    return f"{struct}.{name} = {new:#x} (was {old:#x})"


def seal(data: bytearray, *, at: int = 0, length: int) -> None:
    """The checksum of a superblock or header, over what is behind it."""
    value = codec.xxh3(bytes(data[at + 16 : at + length]))
    data[at + 8 : at + 16] = value.to_bytes(8, "little")


def seal_record(data: bytearray, at: int) -> None:
    """The checksum of a record over header, table and padding, when its lengths are possible."""
    header: Any = ffi.new("struct mp_record *")
    ffi.memmove(header, bytes(data[at : at + lib.MP_RECORD_HEADER_BYTES]), 192)
    length = min(header.header_length_bytes, len(data) - at, 2 << 20)
    value = codec.xxh3(bytes(data[at + 16 : at + max(length, 16)]))
    data[at + 8 : at + 16] = value.to_bytes(8, "little")


class Forger:
    """Forged fields in a simulated cache device, with every checksum above them made right."""

    def __init__(self, chance: random.Random, sim: Sim) -> None:
        self.chance = chance
        self.sim = sim

    def super(self, data: bytearray) -> str:
        """A field of the superblock, in both copies."""
        text = forge(self.chance, "mp_cache_super", data, 0, skip=16)
        self.write_super(data)
        return text

    def write_super(self, data: bytearray) -> None:
        """Seal, and put it into both places."""
        seal(data, length=BLOCK)
        for offset in (0, 65536):
            self.sim.poke(offset_bytes=offset, data=bytes(data))

    def checkpoint(self, superblock: bytearray) -> str:
        """A field of the checkpoint's header, or of an entry in one of its tables."""
        found = ffi.new("struct mp_cache_super *")
        ffi.memmove(found, bytes(superblock), BLOCK)
        area = found.checkpoint_offset_bytes[found.checkpoint_area]
        length = found.checkpoint_length_bytes
        data = bytearray(self.sim.peek(offset_bytes=area, length_bytes=length))
        header = ffi.new("struct mp_cache_checkpoint *")
        ffi.memmove(header, bytes(data[:128]), 128)
        tables = [("mp_cache_checkpoint", 0, 1)]
        at = BLOCK
        for name, count in (
            ("mp_cache_volume", header.volume_count),
            ("mp_segment_entry", header.segment_count),
            ("mp_tombstone", header.tombstone_count),
            ("mp_index_entry", header.index_count),
        ):
            tables.append((name, at, count))
            at += ffi.sizeof(f"struct {name}") * count
        name, at, count = self.chance.choice([table for table in tables if table[2]])
        at += self.chance.randrange(count) * ffi.sizeof(f"struct {name}")
        text = forge(self.chance, name, data, at, skip=0 if at else 16)
        seal(data, length=128)
        self.sim.poke(offset_bytes=area, data=bytes(data))
        found.checkpoint_checksum = codec.xxh3(bytes(data[BLOCK:]))
        self.write_super(bytearray(ffi.buffer(found)))
        return text

    def log_record(self, places: list[tuple[int, int]]) -> str:
        """A field of a record or of one of its extents; places: (offset, header length)."""
        offset, length = self.chance.choice(places)
        places.remove((offset, length))
        data = bytearray(self.sim.peek(offset_bytes=offset, length_bytes=length))
        extents = int.from_bytes(data[84:88], "little")
        if extents and self.chance.randrange(2):
            at = lib.MP_RECORD_HEADER_BYTES + self.chance.randrange(extents) * lib.MP_EXTENT_BYTES
            text = forge(self.chance, "mp_extent", data, at)
        else:
            text = forge(self.chance, "mp_record", data, 0, skip=16)
        seal_record(data, 0)
        self.sim.poke(offset_bytes=offset, data=bytes(data))
        return f"record at {offset}: {text}"
