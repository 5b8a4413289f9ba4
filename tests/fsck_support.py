"""A check of a simulated store, and the proof that it wrote nothing."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from driver_support import Harness
from millpond.native import ffi, lib
from millpond.native import record as codec
from millpond.native.drivers import Op, SimOptions
from millpond.native.storefsck import Finding, FsckKind, StoreCheck, Summary
from store_support import BLOCK, World

FILES_MAX = 64


@dataclass(frozen=True)
class Checked:
    """What a check found."""

    findings: tuple[Finding, ...]
    summary: Summary

    @property
    def kinds(self) -> set[FsckKind]:
        """Of the findings."""
        return {finding.kind for finding in self.findings}

    def only(self, kind: FsckKind) -> Finding:
        """The one finding there is."""
        assert [finding.kind for finding in self.findings] == [kind], self.findings
        return self.findings[0]

    def of(self, kind: FsckKind) -> list[Finding]:
        """All of one kind."""
        return [finding for finding in self.findings if finding.kind is kind]


def check(world: World, *, memory_bytes: int = 1 << 20) -> Checked:
    """Check a store that is shut; it is as shut afterwards."""
    assert world.core is None and world.driver is None, "somebody serves it"
    world.sim.set(SimOptions(latency_ns=1000))
    driver = world.sim.driver()
    made = StoreCheck(driver, memory_bytes=memory_bytes)
    try:
        findings = tuple(made.findings())
        summary = made.summary()
    finally:
        made.close()
        lib.mp_driver_destroy(driver)
    assert world.sim.io_count == 0, "the check changed the disk"
    assert summary.findings == len(findings)
    return Checked(findings, summary)


def check_clean(world: World, *, memory_bytes: int = 1 << 20) -> Summary:
    """Check a store that is shut and has no fault."""
    checked = check(world, memory_bytes=memory_bytes)
    assert not checked.findings, checked.findings
    assert checked.summary.compared
    return checked.summary


def flip(world: World, file: int, at: int, mask: int = 4) -> None:
    """One bit, behind everyone's back."""
    byte = world.sim.peek(file=file, offset_bytes=at, length_bytes=1)[0]
    world.sim.poke(file=file, offset_bytes=at, data=bytes([byte ^ mask]))


def superblock(world: World) -> Any:
    """The first copy, as the disk has it."""
    found = ffi.new("struct mp_store_super *")
    ffi.memmove(found, world.sim.peek(offset_bytes=0, length_bytes=BLOCK), BLOCK)
    return found


def files(world: World) -> dict[int, int]:
    """Files of the disk, each with its length."""
    found = {}
    for file in range(FILES_MAX):
        low = 0
        step = 1 << 24
        while step >= BLOCK:  # the longest prefix that can be read
            with contextlib.suppress(OSError):
                world.sim.peek(file=file, offset_bytes=low + step - 1, length_bytes=1)
                low += step
                continue
            step >>= 1
        with contextlib.suppress(OSError):
            world.sim.peek(file=file, offset_bytes=0, length_bytes=0)
            found[file] = low
    return found


@dataclass(frozen=True)
class Placed:
    """A record, and where it is."""

    file: int
    offset: int
    group_offset: int
    record: codec.Record

    def payload_at(self, index: int) -> int:
        """Where the stored bytes of an extent are in the file."""
        before = self.record.extents[:index]
        head = self.offset + self.record.header_length_bytes
        return head + sum(extent.stored_length_bytes for extent in before)


def records(world: World) -> Iterator[Placed]:
    """Every record of every group of every segment, in order."""
    for file, length in files(world).items():
        at = 0
        while file and at < length:
            data = world.sim.peek(file=file, offset_bytes=at, length_bytes=length - at)
            group = ffi.cast("struct mp_group *", ffi.from_buffer(data))
            if group.segment != file or group.offset_bytes != at or not group.length_bytes:
                break
            inside = lib.MP_GROUP_HEADER_BYTES
            for _ in range(group.record_count):
                record = codec.decode_record(data[inside:])
                assert record is not None
                yield Placed(file, at + inside, at, record)
                inside += -(-record.length_bytes // 8) * 8
            at += group.length_bytes


def records_of(world: World, kind: int) -> list[Placed]:
    """Those of one type."""
    return [placed for placed in records(world) if placed.record.type == kind]


def forge(world: World, placed: Placed, change: Callable[[Any, bytearray], None]) -> None:
    """Change a record's header (or, behind it, table and payload) and seal it again."""
    whole = placed.record.length_bytes
    data = bytearray(
        world.sim.peek(file=placed.file, offset_bytes=placed.offset, length_bytes=whole)
    )
    header = ffi.cast("struct mp_record *", ffi.from_buffer(data))
    change(header, data)
    head = placed.record.header_length_bytes
    if header.payload_checksum:
        header.payload_checksum = codec.xxh3(bytes(data[head:]))
    header.checksum = codec.xxh3(bytes(data[16:head]))
    world.sim.poke(file=placed.file, offset_bytes=placed.offset, data=bytes(data))


def remove_file(world: World, file: int) -> None:
    """A segment goes that nobody was to take."""
    harness = Harness(world.sim.driver())
    assert harness.do(Op.REMOVE, file=file) == 0
    harness.close()
