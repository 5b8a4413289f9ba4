"""Check a store's directory against its log; nothing is written.

Happy path: hold the directory's lock, as a daemon would; check; give the report.
Failure modes: the directory is served, holds no store, or may not be read: StoreError, one line.
What is found is no error: it is in the report, each with what to do about it.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from millpond.native import lib
from millpond.native.storefsck import MEMORY_BYTES, Finding, FsckKind, StoreCheck, Summary
from millpond.store.directory import SUPERBLOCK_NAME, lock_directory, make_driver
from millpond.store.errors import Code, StoreError, one_line

ADVICE = {
    FsckKind.OPEN: "it is not served until that is mended: keep the directory as it is",
    FsckKind.SUPER: "one whole copy is enough, and the next checkpoint writes both; check the disk",
    FsckKind.FILE: "restore the file, or the store from a replica or a backup",
    FsckKind.RECORD: "keep the directory as it is and check the disk; what the volumes lost is"
    " named by other lines",
    FsckKind.DATA: "restore these blocks from a backup or write them anew; check the disk",
    FsckKind.PAGE: "export what can be read of the volume, or restore it from a backup",
    FsckKind.MAP: "restore the volume from a backup, and report this: a map is wrong",
    FsckKind.EXTENTS: "restore the volume from a backup, and report this: a table is wrong",
    FsckKind.COUNT: "no data is at risk; report this: a count is wrong",
    FsckKind.CATALOGUE: "do not open the volume before you know which is right; report this",
}


@dataclass(frozen=True, slots=True)
class Trouble:
    """A finding as people and programs read it."""

    kind: str
    what: str
    advice: str
    volume: str | None
    volume_id: str | None
    first_block: int | None
    block_count: int | None
    segment: int | None
    offset_bytes: int | None

    def line(self) -> str:
        """What, which volume, where, what to do: one line."""
        parts = [self.kind]
        if self.volume is not None:
            parts.append(f"volume {self.volume!r}")
        if self.first_block is not None and self.block_count is not None:
            last = self.first_block + self.block_count - 1
            many = last > self.first_block
            parts.append(f"blocks {self.first_block} to {last}" if many else f"block {last}")
        if self.segment is not None:
            parts.append(f"segment {self.segment} at {self.offset_bytes}")
        words = [", ".join(parts), self.what]
        return one_line("; ".join([": ".join(words), self.advice]), limit=1000)


@dataclass(frozen=True, slots=True)
class Report:
    """How a check went."""

    directory: str
    summary: Summary

    @property
    def clean(self) -> bool:
        """Nothing was found."""
        return self.summary.findings == 0

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {"directory": self.directory, "clean": self.clean, "summary": asdict(self.summary)}


def fsck(
    directory: str,
    on_trouble: Callable[[Trouble], None],
    *,
    memory_bytes: int = MEMORY_BYTES,
) -> Report:
    """Check the store in directory; each trouble is told when it is found. StoreError.

    memory_bytes: of maps rebuilt at a time, see native/README-store.md for what comes on top.
    """
    lock_fd = lock_directory(directory)
    try:
        _check_may_open(directory)
        driver = make_driver(directory)
        try:
            check = StoreCheck(driver, memory_bytes=memory_bytes)
            try:
                for finding in check.findings():
                    on_trouble(_trouble(check, finding))
                return Report(directory, check.summary())
            finally:
                check.close()
        finally:
            lib.mp_driver_destroy(driver)
    finally:
        os.close(lock_fd)


def _check_may_open(directory: str) -> None:
    """Or every file would look damaged. The driver opens for writing, too, and does not write."""
    shown = one_line(directory)
    try:
        os.close(os.open(os.path.join(directory, SUPERBLOCK_NAME), os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise StoreError(Code.NOT_FOUND, f"directory {shown} holds no store") from None
    except PermissionError:
        raise StoreError(
            Code.PERMISSION, f"no permission to open the files of directory {shown}"
        ) from None
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise StoreError(Code.IO, f"the files of directory {shown} do not open: {reason}") from None


def _trouble(check: StoreCheck, finding: Finding) -> Trouble:
    state = check.volume(finding.volume) if finding.volume is not None else None
    volume_id = finding.volume.hex() if finding.volume is not None else None
    placed = finding.segment or finding.kind in (FsckKind.SUPER,)
    return Trouble(
        kind=finding.kind.name.lower(),
        what=finding.text,
        advice=ADVICE[finding.kind],
        volume=state.name if state is not None else volume_id,
        volume_id=volume_id,
        first_block=finding.first_block if finding.block_count else None,
        block_count=finding.block_count or None,
        segment=finding.segment if placed else None,
        offset_bytes=finding.offset_bytes if placed else None,
    )
