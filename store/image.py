"""Raw disk images on the local file system: read what holds data, write what is not zero.

Rules: holes and zero blocks are never read into a batch nor written into a file, so a sparse image
stays sparse both ways. Everything here blocks: it is for transfers run by a command, never in the
daemon's loop.
Failure modes: OSError with the file's name; a file that shrinks while it is read is an error.
"""

import errno
import os
import stat
from collections.abc import Iterator
from typing import Any

from millpond.native import ffi, lib
from millpond.store.errors import Code, StoreError, one_line

BLOCK_BYTES: int = lib.MP_BLOCK_BYTES
GRAIN_BYTES: int = BLOCK_BYTES * lib.MP_EXTENT_BLOCKS  # compressed together: not worth cutting


def round_up(value: int, unit: int) -> int:
    """The next multiple of unit."""
    return -(-value // unit) * unit


class ImageReader:
    """A raw image to import: a regular file or a block device."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            mode = os.fstat(self._fd).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise StoreError(
                    Code.INVALID, f"{one_line(path)} is neither a file nor a block device"
                )
            self.file_bytes = os.lseek(self._fd, 0, os.SEEK_END)
        except BaseException:
            os.close(self._fd)
            raise
        self.size_bytes = round_up(self.file_bytes, BLOCK_BYTES)

    def close(self) -> None:
        """Give the file back."""
        os.close(self._fd)

    def runs(self, *, window_bytes: int, zeroes: bool = False) -> Iterator[tuple[int, bytes]]:
        """(offset, whole blocks) of what is not zero, ascending, each at most window_bytes long.

        zeroes: yield everything, for a target that is not known to be empty.
        """
        assert window_bytes % GRAIN_BYTES == 0
        offset = 0
        while offset < self.size_bytes:
            start, end = (offset, self.size_bytes) if zeroes else self._data_after(offset)
            while start < end:
                data = self._read(start, min(window_bytes, end - start))
                if zeroes:
                    yield start, data
                else:
                    yield from self._not_zero(start, data)
                start += len(data)
            offset = end

    def _data_after(self, offset: int) -> tuple[int, int]:
        """The next region that the file system does not call a hole, in whole grains."""
        try:
            start = os.lseek(self._fd, offset, os.SEEK_DATA)
            end = os.lseek(self._fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return self.size_bytes, self.size_bytes
            if error.errno == errno.EINVAL:  # no support: all of it may be data
                return offset, self.size_bytes
            raise
        start = max(offset, start // GRAIN_BYTES * GRAIN_BYTES)
        return start, min(round_up(end, GRAIN_BYTES), self.size_bytes)

    def _read(self, offset: int, length_bytes: int) -> bytes:
        """Exactly this; behind the file's end, which the last block may cross, zeroes."""
        parts = []
        position, end = offset, min(offset + length_bytes, self.file_bytes)
        while position < end:
            part = os.pread(self._fd, end - position, position)
            if not part:
                raise StoreError(Code.IO, f"{one_line(self.path)} shrank while it was read")
            parts.append(part)
            position += len(part)
        return b"".join(parts).ljust(length_bytes, b"\0")

    @staticmethod
    def _not_zero(offset: int, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Maximal runs of grains that are not all zero."""
        pointer = ffi.from_buffer(data)
        run_start: int | None = None
        for position in range(0, len(data), GRAIN_BYTES):
            grain_bytes = min(GRAIN_BYTES, len(data) - position)
            if not lib.mp_is_zero(pointer + position, grain_bytes):
                run_start = position if run_start is None else run_start
            elif run_start is not None:
                yield offset + run_start, data[run_start:position]
                run_start = None
        if run_start is not None:
            yield offset + run_start, data[run_start:]


class ImageWriter:
    """A raw image being exported: comes into being whole, or not at all."""

    def __init__(self, path: str, size_bytes: int, *, overwrite: bool) -> None:
        self.path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags | (0 if overwrite else os.O_EXCL), 0o600)
        except FileExistsError:
            raise StoreError(
                Code.EXISTS, f"{one_line(path)} exists already; remove it or use --overwrite"
            ) from None
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise StoreError(Code.INVALID, f"{one_line(path)} is not a regular file")
            os.ftruncate(self._fd, 0)
            os.ftruncate(self._fd, size_bytes)
        except BaseException:
            os.close(self._fd)
            raise

    def write(self, offset: int, data: Any, length_bytes: int) -> None:
        """Whole blocks from C memory at data; zero blocks stay holes."""
        run_start: int | None = None
        for position in range(0, length_bytes, BLOCK_BYTES):
            if not lib.mp_is_zero(data + position, BLOCK_BYTES):
                run_start = position if run_start is None else run_start
            elif run_start is not None:
                self._write(offset + run_start, data + run_start, position - run_start)
                run_start = None
        if run_start is not None:
            self._write(offset + run_start, data + run_start, length_bytes - run_start)

    def _write(self, offset: int, data: Any, length_bytes: int) -> None:
        view = memoryview(ffi.buffer(data, length_bytes))
        while view:
            written = os.pwrite(self._fd, view, offset)
            view, offset = view[written:], offset + written

    def finish(self) -> None:
        """Everything is written: make it durable."""
        os.fsync(self._fd)
        os.close(self._fd)

    def abandon(self) -> None:
        """The export failed: leave no half image behind."""
        os.close(self._fd)
        os.unlink(self.path)
