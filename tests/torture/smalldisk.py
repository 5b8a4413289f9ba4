"""A small file system of its own for a store: ext4 on a loop device, and a neighbour that fills it.

Happy path: with small_disk(folder, size_bytes) as disk: the store lives in disk.path;
disk.take(leave_bytes) allocates all but so much, disk.give() gives it back.  Failure modes:
mounting needs root (or sudo without a password): CalledProcessError names the command.
"""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20


@dataclass(frozen=True)
class SmallDisk:
    """Mounted."""

    path: Path

    @property
    def free_bytes(self) -> int:
        """What anybody may still write."""
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize

    def take(self, *, leave_bytes: int = 0) -> None:
        """The neighbour's file takes all that is free now, but so much."""
        with (self.path / "neighbour").open("ab") as file:
            piece_bytes = 16 * MIB
            while piece_bytes >= 4096:
                end = os.fstat(file.fileno()).st_size
                if self.free_bytes - leave_bytes < piece_bytes:
                    piece_bytes //= 2
                    continue
                try:
                    os.posix_fallocate(file.fileno(), end, piece_bytes)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    piece_bytes //= 2  # the store was faster

    def give(self) -> None:
        """The neighbour deletes its file."""
        (self.path / "neighbour").unlink(missing_ok=True)


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[SmallDisk]:
    """Made, mounted, unmounted."""
    image, path = folder / "small.ext4", folder / "small"
    with image.open("wb") as file:
        file.truncate(size_bytes)
    path.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    as_root("mount", "-o", "loop", image, path)
    try:
        if os.geteuid():
            as_root("chown", str(os.geteuid()), path)
        yield SmallDisk(path)
    finally:
        as_root("umount", path)
        image.unlink()


def as_root(*command: str | Path) -> None:
    """Run it."""
    subprocess.run([*(("sudo", "-n") if os.geteuid() else ()), *command], check=True)
