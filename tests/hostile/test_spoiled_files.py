"""Hostile bytes in the real files of a real `millpond up`: one line, an exit code, nothing changed.

Only what can have one outcome is here; the thousands of others are in test_formats.py.
"""

import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import nbdclient
from millpondprocess import Millpond
from torture.cachefile import SUPER_COPIES, superblock
from torture.commands import refused
from torture.storefiles import BLOCK, flip, segment_paths, struct_at

MIB = 1 << 20
SIZE_BYTES = 32 * MIB
CACHE_BYTES = 256 * MIB
SUPERBLOCKS = "0" * 16 + ".seg"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An `up` with data in cache and store, stopped; not to be touched."""
    directory = tmp_path_factory.mktemp("made") / "up"
    server = Millpond(directory, size_bytes=SIZE_BYTES, cache_bytes=CACHE_BYTES)
    with server, nbdclient.connect(server.uri, timeout_s=120) as client:
        client.write(0, random.Random(1).randbytes(4 * MIB))
        client.flush()
    return directory


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def zero_both_superblocks(directory: Path) -> None:
    for offset in SUPER_COPIES:
        overwrite(directory / "cache", offset, bytes(BLOCK))


def flip_both_superblocks(directory: Path) -> None:
    for offset in SUPER_COPIES:
        flip(directory / "cache", offset + 200)


def random_cache(directory: Path) -> None:
    overwrite(directory / "cache", 0, random.Random(2).randbytes(2 * MIB))


def flip_checkpoint(directory: Path) -> None:
    found = superblock(directory / "cache")
    flip(directory / "cache", found.checkpoint_offset_bytes[found.checkpoint_area] + BLOCK + 77)


def flip_checkpoint_header(directory: Path) -> None:
    found = superblock(directory / "cache")
    flip(directory / "cache", found.checkpoint_offset_bytes[found.checkpoint_area] + 24)


def empty_cache(directory: Path) -> None:
    (directory / "cache").write_bytes(b"")


def cache_is_a_directory(directory: Path) -> None:
    (directory / "cache").unlink()
    (directory / "cache").mkdir()


def flip_both_store_superblocks(directory: Path) -> None:
    for offset in (0, BLOCK):
        flip(directory / "store" / SUPERBLOCKS, offset + 100)


def empty_store_superblocks(directory: Path) -> None:
    (directory / "store" / SUPERBLOCKS).write_bytes(b"")


def flip_store_checkpoint(directory: Path) -> None:
    found = struct_at(directory / "store" / SUPERBLOCKS, "mp_store_super", 0)
    path = segment_paths(directory / "store")[found.checkpoint_segment]
    flip(path, found.checkpoint_offset_bytes + 300)


def lose_store_checkpoint(directory: Path) -> None:
    found = struct_at(directory / "store" / SUPERBLOCKS, "mp_store_super", 0)
    segment_paths(directory / "store")[found.checkpoint_segment].unlink()


def cut_store_segments(directory: Path) -> None:
    for path in segment_paths(directory / "store").values():
        with path.open("r+b") as file:
            file.truncate(BLOCK)


SPOILS: tuple[Callable[[Path], None], ...] = (
    zero_both_superblocks,
    flip_both_superblocks,
    random_cache,
    flip_checkpoint,
    flip_checkpoint_header,
    empty_cache,
    cache_is_a_directory,
    flip_both_store_superblocks,
    empty_store_superblocks,
    flip_store_checkpoint,
    lose_store_checkpoint,
    cut_store_segments,
)


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: str(spoil.__name__))
def test_spoiled_file_is_refused_in_one_line(
    made: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    directory = tmp_path / "up"
    subprocess.run(["cp", "-a", "--sparse=always", made, directory], check=True)
    spoil(directory)
    cache = directory / "cache"
    before = cache.read_bytes() if cache.is_file() else b""
    line = refused("up", directory)
    print(line)
    assert not cache.is_file() or cache.read_bytes() == before, "the cache was changed"
    assert refused("up", directory), "the second try is refused as well"
    shutil.rmtree(directory)
