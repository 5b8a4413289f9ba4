"""The check of a store for Python: typed findings and a summary, over storefsck.h.

Happy path: StoreCheck(driver).findings() until all is read; then summary().
Failure modes: damage is a finding, never an exception; OSError: the simulated world ended.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from millpond.native import ffi, lib
from millpond.native.store import NO_ID, VolumeState

__all__ = ["MEMORY_BYTES", "Finding", "FsckKind", "StoreCheck", "Summary"]

MEMORY_BYTES = 256 << 20


class FsckKind(IntEnum):
    """enum mp_fsck_kind of storefsck.h: what a finding is about."""

    OPEN = lib.MP_FSCK_OPEN
    SUPER = lib.MP_FSCK_SUPER
    FILE = lib.MP_FSCK_FILE
    RECORD = lib.MP_FSCK_RECORD
    DATA = lib.MP_FSCK_DATA
    PAGE = lib.MP_FSCK_PAGE
    MAP = lib.MP_FSCK_MAP
    EXTENTS = lib.MP_FSCK_EXTENTS
    COUNT = lib.MP_FSCK_COUNT
    CATALOGUE = lib.MP_FSCK_CATALOGUE


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be. block_count 0: of no blocks in particular."""

    kind: FsckKind
    text: str
    volume: bytes | None
    first_block: int
    block_count: int
    segment: int
    offset_bytes: int


@dataclass(frozen=True, slots=True)
class Summary:
    """struct mp_fsck_summary: what was looked at."""

    segments: int
    groups: int
    records: int
    extents: int
    pages: int
    volumes: int
    mapped_blocks: int
    verified_bytes: int
    bad_bytes: int
    missing_commits: int
    unproven_blocks: int
    passes: int
    findings: int
    compared: int


class StoreCheck:
    """One check of the store behind driver, which stays the caller's; close() it before that."""

    def __init__(self, driver: Any, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self._check = lib.mp_fsck_new(driver, memory_bytes)

    def close(self) -> None:
        """Free what it holds."""
        if self._check != ffi.NULL:
            lib.mp_fsck_free(self._check)
            self._check = ffi.NULL

    def findings(self) -> Iterator[Finding]:
        """Do all the work; each finding when it is made. Between two of them, signals are heard."""
        found = ffi.new("struct mp_fsck_finding *")
        while (going_on := lib.mp_fsck_step(self._check)) >= 0:
            while lib.mp_fsck_take(self._check, found):
                yield _finding(found)
            if not going_on:
                return
        raise OSError(-going_on, "the check was cut off")

    def summary(self) -> Summary:
        """As of now."""
        out = ffi.new("struct mp_fsck_summary *")
        lib.mp_fsck_summary(self._check, out)
        return Summary(*(getattr(out, name) for name in Summary.__slots__))

    def volume(self, volume_id: bytes) -> VolumeState | None:
        """What the store, or at least its log, knows of a volume."""
        state = ffi.new("struct mp_volume_state *")
        if lib.mp_fsck_volume(self._check, volume_id, state):
            return None
        return VolumeState.decode(state)


def _finding(found: Any) -> Finding:
    volume = bytes(found.volume)
    return Finding(
        kind=FsckKind(found.kind),
        text=ffi.string(found.text).decode(errors="backslashreplace"),
        volume=volume if volume != NO_ID else None,
        first_block=found.first_block,
        block_count=found.block_count,
        segment=found.segment,
        offset_bytes=found.offset_bytes,
    )
