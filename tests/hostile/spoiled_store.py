"""A store's files that were spoiled: opened, read and written in a simulated world.

It may refuse to open, in one line; it may answer a read with a status; what it shows is the disk as
it was at the store's own position.  Afterwards it takes a batch and a checkpoint, or says why not,
and opens again.
"""

import errno
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hostile.spoiling import Region, forge, hostile_integer, seal, seal_record
from millpond.native import ffi, lib
from millpond.native import record as codec
from millpond.native.drivers import Sim, destroy
from millpond.native.record import Frame
from millpond.native.store import StoreCore, StoreOpenError
from sim.history import BLOCK
from sim.nodes import MIB, decode_read_reply
from sim.oracle import Illegal
from sim.world import VOLUME, World

SUPERS = (0, BLOCK)
FILES_MAX = 64
RUN_BLOCKS = 48
PAYLOADS = (lib.MP_RECORD_VOLUME, lib.MP_RECORD_CHECKPOINT, lib.MP_RECORD_PAGES)


@dataclass(frozen=True)
class Group:
    """Where a group is, and its records' offsets and types."""

    file: int
    offset: int
    length_bytes: int
    records: tuple[tuple[int, codec.Record], ...]


def groups(sim: Sim) -> Iterator[Group]:
    """Every group of every segment that begins with one."""
    for file in range(1, FILES_MAX):
        offset = 0
        while (group := _group_at(sim, file, offset)) is not None:
            yield group
            offset += group.length_bytes


def _group_at(sim: Sim, file: int, offset: int) -> Group | None:
    header: Any = ffi.new("struct mp_group *")
    try:
        ffi.memmove(header, sim.peek(file=file, offset_bytes=offset, length_bytes=BLOCK), 128)
        if header.segment != file or header.offset_bytes != offset or not header.length_bytes:
            return None
        length = int(header.length_bytes)
        data = sim.peek(file=file, offset_bytes=offset, length_bytes=length)
    except OSError:
        return None
    found, at = [], lib.MP_GROUP_HEADER_BYTES
    for _ in range(header.record_count):
        record = codec.decode_record(data[at:])
        assert record is not None
        found.append((offset + at, record))
        at += -(-record.length_bytes // 8) * 8
    return Group(file, offset, length, tuple(found))


def regions(world: World) -> list[tuple[int, Region]]:
    """Files and what they hold."""
    found = [(0, Region("superblock", offset, BLOCK)) for offset in SUPERS]
    for each in groups(world.store.sim):
        name = f"group at {each.offset} of segment {each.file}"
        found.append((each.file, Region(name, each.offset, each.length_bytes)))
    return found


# ---- forging ----


def forge_store(chance: random.Random, sim: Sim) -> str:
    """A field of a superblock, a group's header, a record, or a record's payload; sealed."""
    if chance.randrange(6) == 0:
        data = bytearray(sim.peek(offset_bytes=0, length_bytes=BLOCK))
        text = forge(chance, "mp_store_super", data, 0, skip=16)
        seal(data, length=BLOCK)
        for offset in SUPERS:
            sim.poke(offset_bytes=offset, data=bytes(data))
        return text
    group = chance.choice(list(groups(sim)))
    where = f"segment {group.file}"
    if not group.records or chance.randrange(4) == 0:
        data = bytearray(
            sim.peek(
                file=group.file,
                offset_bytes=group.offset,
                length_bytes=lib.MP_GROUP_HEADER_BYTES,
            )
        )
        text = forge(chance, "mp_group", data, 0, skip=16)
        seal(data, length=lib.MP_GROUP_HEADER_BYTES)
        sim.poke(file=group.file, offset_bytes=group.offset, data=bytes(data))
        return f"{where} at {group.offset}: {text}"
    offset, record = chance.choice(group.records)
    data = bytearray(
        sim.peek(file=group.file, offset_bytes=offset, length_bytes=record.length_bytes)
    )
    text = _forge_record(chance, record, data)
    sim.poke(file=group.file, offset_bytes=offset, data=bytes(data))
    return f"{where} at {offset}: {text}"


def _forge_record(chance: random.Random, record: codec.Record, data: bytearray) -> str:
    head = record.header_length_bytes
    if record.type in PAYLOADS and chance.randrange(3):
        at = head + chance.randrange(record.payload_length_bytes // 8) * 8
        old = int.from_bytes(data[at : at + 8], "little")
        new = hostile_integer(chance, 64, old)
        data[at : at + 8] = new.to_bytes(8, "little")
        header: Any = ffi.new("struct mp_record *")
        ffi.memmove(header, bytes(data[:192]), 192)
        header.payload_checksum = codec.xxh3(bytes(data[head:]))
        data[:192] = bytes(ffi.buffer(header))
        text = f"payload of type {record.type} at {at - head}: {new:#x} (was {old:#x})"
    elif record.extents and chance.randrange(2):
        at = lib.MP_RECORD_HEADER_BYTES
        at += chance.randrange(len(record.extents)) * lib.MP_EXTENT_BYTES
        text = forge(chance, "mp_extent", data, at)
    else:
        text = forge(chance, "mp_record", data, 0, skip=16)
    seal_record(data, 0)
    return text


# ---- what comes of it ----


@dataclass
class Spoiled:
    """A store to be opened over spoiled files."""

    world: World
    trusted: bool = True
    may_lose: bool = False  # an end was cut off: an earlier position is legal

    def outlive(self) -> str:
        """Refused, errors or whole."""
        if not self._open():
            return "refused"
        outcome = self._read_all()
        self._write()
        self.world.store.die()
        return outcome if self._open() else f"{outcome}, then refused"

    def _open(self) -> bool:
        node = self.world.store
        node._driver = node.sim.driver()
        try:
            node._core = StoreCore.open(node._driver, node.options)
        except StoreOpenError as error:
            destroy(node._driver)
            node._driver = None
            line = str(error)
            assert line and "\n" not in line and error.errno != errno.ENOMEM, line
            return False
        return True

    def _ask(self, frame_type: int, payload: bytes, *, connection: int) -> Frame:
        node = self.world.store
        checked = 0 if frame_type == lib.MP_FRAME_BATCH else len(payload)
        node._request += 1
        frame = codec.encode_frame(
            frame_type, payload, checked_bytes=checked, request_id=node._request
        )
        node.core.feed(connection, frame)
        for _ in range(20_000):
            node.collect(connection)
            if node._request in node.replies:
                return node.replies.pop(node._request)
            node.step()
        raise AssertionError("the store does not answer: it hangs")

    def _read_all(self) -> str:
        state = self.world.store.core.volume(VOLUME)
        if state is None:
            assert not self.trusted or self.may_lose, "the volume is gone, without a word"
            return "no volume"
        image, errors = bytearray(), 0
        for first in range(0, self.world.settings.shape.blocks, RUN_BLOCKS):
            wanted: Any = ffi.new("struct mp_read_request *")
            wanted.volume, wanted.epoch, wanted.first_block = VOLUME, state.epoch, first
            wanted.block_count = min(RUN_BLOCKS, self.world.settings.shape.blocks - first)
            reply = self._ask(lib.MP_FRAME_READ, bytes(ffi.buffer(wanted)), connection=1)
            if reply.status == lib.MP_STATUS_OK:
                image += self._decode(reply, wanted.block_count)
            else:
                errors += 1
        if errors:
            return "errors"
        if self.trusted:
            if state.applied_sequence < self.world.confirmed and not self.may_lose:
                raise Illegal("a batch that was acknowledged is gone, without a word")
            self.world.disk.check_position(bytes(image), state.applied_sequence)
        return "whole"

    def _decode(self, reply: Frame, block_count: int) -> bytes:
        """The cache checks what it is sent; forged bytes may fail there."""
        try:
            return decode_read_reply(reply)
        except Illegal:
            if self.trusted:
                raise
            return bytes(block_count * BLOCK)

    def _write(self) -> None:
        state = self.world.store.core.volume(VOLUME)
        if state is not None and state.lineages:
            batch, _ = codec.encode_batch(
                VOLUME,
                lineage=state.lineages[-1].id,
                epoch=state.epoch,
                first_sequence=min(state.applied_sequence + 1, (1 << 63) - 1),
                first_block=0,
                data=random.Random(1).randbytes(MIB // 4),
            )
            self._ask(lib.MP_FRAME_BATCH, batch, connection=2)
        self._ask(lib.MP_FRAME_CHECKPOINT, b"", connection=0)
