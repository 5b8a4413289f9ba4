"""A real ext4 image made of real files of this machine.

The files are picked in sorted order from a fixed list of roots, each up to its share of the
asked size, so two runs on one machine give the same files. A SHA256SUMS manifest lies beside
them inside the image; the guest checks every line of it with busybox.

Failure modes: too few files (refused with the size found), mke2fs missing or failing (its
own message is passed on).
"""

import hashlib
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "SHA256SUMS"
MAX_FILE_BYTES = 8 << 20  # one huge binary should not be the whole image


@dataclass(frozen=True)
class Image:
    """One built image: where it is and what it promises."""

    path: Path
    size_bytes: int
    file_count: int
    data_bytes: int


def roots() -> list[Path]:
    """Where the files come from: Python's library first, then what a Debian machine carries."""
    places = [sysconfig.get_path("stdlib"), "/usr/share/doc", "/usr/share/perl", "/usr/bin"]
    return [Path(place) for place in places if Path(place).is_dir()]


def pick(root: Path, limit_bytes: int) -> Iterator[Path]:
    """Regular, plainly named files below root in sorted order, up to limit_bytes in all."""
    for path in sorted(root.rglob("*")):
        if path.is_symlink() or not path.is_file() or "__pycache__" in path.parts:
            continue
        size_bytes = path.stat().st_size
        # sha256sum -c escapes these two characters, busybox does not read the escape
        if not 0 < size_bytes <= MAX_FILE_BYTES or set("\n\\") & set(str(path)):
            continue
        limit_bytes -= size_bytes
        if limit_bytes < 0:
            return
        yield path


def stage(tree: Path, limit_bytes: int) -> tuple[int, int]:
    """Copy the picked files below tree and write the manifest. Returns (files, bytes)."""
    lines = []
    total_bytes = 0
    places = roots()
    picked = [path for root in places for path in pick(root, limit_bytes // len(places))]
    for path in picked:
        relative = Path("files") / path.relative_to("/")
        target = tree / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes()
        target.write_bytes(data)
        lines.append(f"{hashlib.sha256(data).hexdigest()}  {relative}\n")
        total_bytes += len(data)
    (tree / MANIFEST).write_text("".join(lines))
    return len(lines), total_bytes


def build(directory: Path, *, size_bytes: int, data_bytes: int) -> Image:
    """Make directory/disk.raw: an ext4 file system of size_bytes, a sparse file."""
    tree, path = directory / "tree", directory / "disk.raw"
    shutil.rmtree(tree, ignore_errors=True)
    path.unlink(missing_ok=True)  # mke2fs would keep what an old file holds
    file_count, staged_bytes = stage(tree, data_bytes)
    if staged_bytes < data_bytes // 2:
        raise SystemExit(f"demo: found only {staged_bytes >> 20} MiB of files for the image")
    command = ["mke2fs", "-q", "-t", "ext4", "-L", "millpond", "-E", "lazy_itable_init=0"]
    command += ["-d", str(tree), str(path), f"{size_bytes >> 10}k"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(tree)
    return Image(path, size_bytes, file_count, staged_bytes)
