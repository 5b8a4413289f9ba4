"""What the real process must refuse, in one line that says what to do, and changing nothing.

A second process on the same directory, store or device; formats of another version; a disk that
should be there and is not; other sizes than asked for; formatting what is in use or holds anything.
"""

import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nbdclient
from millpond.native import ffi, lib
from millpondprocess import Millpond
from torture.cachefile import SUPER_COPIES
from torture.commands import millpond, refused
from torture.storefiles import BLOCK, checksum_of, struct_at

MIB = 1 << 20
SIZE_BYTES = 32 * MIB
CACHE_BYTES = 256 * MIB
SIZES = ("--size", str(SIZE_BYTES), "--cache-size", str(CACHE_BYTES))
DATA = bytes(range(256)) * 64


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An `up` with some data, stopped; not to be touched."""
    directory = tmp_path_factory.mktemp("made") / "up"
    server = Millpond(directory, size_bytes=SIZE_BYTES, cache_bytes=CACHE_BYTES)
    with server, nbdclient.connect(server.uri, timeout_s=120) as client:
        client.write(0, DATA)
        client.flush()
    return directory


@pytest.fixture
def directory(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to spoil."""
    subprocess.run(["cp", "-a", "--sparse=always", made, tmp_path / "up"], check=True)
    return tmp_path / "up"


def snapshot(directory: Path) -> dict[str, str]:
    """What is in the files."""
    return {
        str(path): hashlib.blake2b(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


# A second process.


@pytest.fixture
def running(directory: Path) -> Iterator[Millpond]:
    """It runs; afterwards it still serves what it served."""
    server = Millpond(directory, size_bytes=SIZE_BYTES, cache_bytes=CACHE_BYTES)
    with server:
        yield server
        with nbdclient.connect(server.uri, timeout_s=120) as client:
            assert client.read(0, len(DATA)) == DATA


def test_second_process_is_refused(running: Millpond, tmp_path: Path) -> None:
    directory = running.directory
    assert "stop it first" in refused("up", directory)
    assert "stop it first" in refused("store", "serve", directory / "store")
    serve = ("cache", "serve", directory / "cache", "--nbd", tmp_path / "nbd.sock")
    line = refused(*serve, "--store", f"unix:{directory}/store.sock")
    assert "in use by another process" in line
    assert "in use by another process" in refused("cache", "format", directory / "cache")
    line = refused("cache", "format", directory / "cache", "--force")
    assert "in use by another process" in line


def test_second_process_by_another_name_is_refused(running: Millpond, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(running.directory)
    assert "stop it first" in refused("up", link)
    device = tmp_path / "device"
    device.hardlink_to(running.directory / "cache")
    assert "in use by another process" in refused("cache", "format", device, "--force")


# Versions.


def write_struct(path: Path, offset: int, value: Any) -> None:
    """Seal a struct and put it where it was."""
    value.checksum = checksum_of(value)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(ffi.buffer(value))


def test_cache_of_an_unknown_version_is_refused(directory: Path) -> None:
    for offset in SUPER_COPIES:
        found = struct_at(directory / "cache", "mp_cache_super", offset)
        found.version = 7
        write_struct(directory / "cache", offset, found)
    before = snapshot(directory)
    line = refused("up", directory)
    assert "version 7" in line and f"version {lib.MP_FORMAT_VERSION}" in line, line
    after = snapshot(directory)
    cache = str(directory / "cache")
    assert after[cache] == before[cache]


def test_cache_with_an_unknown_feature_is_refused(directory: Path) -> None:
    for offset in SUPER_COPIES:
        found = struct_at(directory / "cache", "mp_cache_super", offset)
        found.incompatible_features = 0x20
        write_struct(directory / "cache", offset, found)
    line = refused("up", directory)
    assert "0x20" in line, line


def test_store_of_an_unknown_version_is_refused(directory: Path) -> None:
    superblocks = directory / "store" / ("0" * 16 + ".seg")
    for offset in (0, BLOCK):
        found = struct_at(superblocks, "mp_store_super", offset)
        found.version = 9
        write_struct(superblocks, offset, found)
    before = snapshot(directory)
    line = refused("up", directory)
    assert "format 9" in line and f"format {lib.MP_FORMAT_VERSION}" in line, line
    assert refused("store", "serve", directory / "store") != ""
    assert snapshot(directory) == before


# A disk that should be there and is not.


def test_missing_store_is_an_error_not_an_empty_disk(directory: Path) -> None:
    shutil.rmtree(directory / "store")
    line = refused("up", directory, *SIZES)
    assert "store" in line and "lose data" in line, line
    assert not (directory / "store").exists()


def test_emptied_store_is_an_error_not_an_empty_disk(directory: Path) -> None:
    shutil.rmtree(directory / "store")
    (directory / "store").mkdir()
    refused("up", directory, *SIZES)
    assert not list((directory / "store").glob("*.seg"))


def test_store_without_superblocks_is_an_error_not_an_empty_disk(directory: Path) -> None:
    (directory / "store" / ("0" * 16 + ".seg")).unlink()
    before = snapshot(directory)
    refused("up", directory, *SIZES)
    assert snapshot(directory) == before


def test_store_without_the_volume_is_an_error_not_an_empty_disk(
    directory: Path, tmp_path: Path
) -> None:
    shutil.rmtree(directory / "store")
    other = Millpond(tmp_path / "other", size_bytes=SIZE_BYTES, cache_bytes=CACHE_BYTES)
    with other:
        done = millpond("volume", "delete", "disk", "--store", f"unix:{other.directory}/store.sock")
        assert done.code == 0, done.errors
    shutil.copytree(other.directory / "store", directory / "store", symlinks=True)
    line = refused("up", directory, *SIZES)
    assert "disk" in line and "lose data" in line, line


@pytest.mark.parametrize("dirty", [False, True])
def test_store_with_another_disk_is_an_error_not_an_empty_disk(
    directory: Path, tmp_path: Path, dirty: bool
) -> None:
    """Same name, another volume: what the cache holds is of a disk that is not there."""
    if dirty:
        server = Millpond(directory, size_bytes=SIZE_BYTES, cache_bytes=CACHE_BYTES)
        server.start()
        with nbdclient.connect(server.uri, timeout_s=120) as client:
            client.write(MIB, DATA)
            server.kill()
    other = Millpond(tmp_path / "other", size_bytes=SIZE_BYTES, cache_bytes=CACHE_BYTES)
    with other:
        pass
    shutil.rmtree(directory / "store")
    shutil.copytree(other.directory / "store", directory / "store", symlinks=True)
    before = snapshot(other.directory / "store")
    line = refused("up", directory)
    assert "lose data" in line, line
    assert len(before) == len(snapshot(directory / "store"))


def test_cache_that_is_gone_is_made_anew_only_when_nothing_was_dirty(directory: Path) -> None:
    (directory / "cache").unlink()
    server = Millpond(directory, size_bytes=SIZE_BYTES, cache_bytes=CACHE_BYTES)
    with server, nbdclient.connect(server.uri, timeout_s=120) as client:
        assert client.read(0, len(DATA)) == DATA


# Sizes.


def test_other_sizes_than_asked_for_are_refused(directory: Path) -> None:
    before = snapshot(directory)
    line = refused("up", directory, "--size", str(SIZE_BYTES * 2))
    assert "32M" in line and "64M" in line, line
    line = refused("up", directory, "--cache-size", str(CACHE_BYTES * 2))
    assert "256M" in line and "512M" in line, line
    refused("up", directory, "--size", "12345")
    refused("up", directory, "--size", "0")
    refused("up", directory, "--cache-size", "1MiB")
    refused("up", directory, "--size", "many")
    after = snapshot(directory)
    assert after[str(directory / "cache")] == before[str(directory / "cache")]


def test_cache_device_cut_short_is_refused(directory: Path) -> None:
    with (directory / "cache").open("r+b") as file:
        file.truncate(CACHE_BYTES // 2)
    line = refused("up", directory)
    assert str(CACHE_BYTES // 2) in line and str(CACHE_BYTES) in line, line
    refused("up", directory, *SIZES)


# Formatting.


def test_format_of_a_device_that_holds_a_signature_is_refused(tmp_path: Path) -> None:
    device = tmp_path / "device"
    device.touch()
    with device.open("r+b") as file:
        file.truncate(CACHE_BYTES)
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    line = refused("cache", "format", device)
    assert "ext4" in line and "--force" in line, line
    assert millpond("cache", "format", device, "--force").code == 0
    line = refused("cache", "format", device)
    assert "Millpond cache" in line and "--force" in line, line


def test_format_of_a_device_with_anything_on_it_is_refused(tmp_path: Path) -> None:
    for offset in (0, 4096, CACHE_BYTES - 1):
        device = tmp_path / f"device{offset}"
        with device.open("w+b") as file:
            file.truncate(CACHE_BYTES)
            file.seek(offset)
            file.write(b"x")
        assert "--force" in refused("cache", "format", device)


def test_format_of_what_is_no_device_is_refused(tmp_path: Path) -> None:
    refused("cache", "format", tmp_path)
    refused("cache", "format", "/dev/null")
    refused("cache", "format", tmp_path / "missing")
    small = tmp_path / "small"
    small.write_bytes(bytes(MIB))
    assert str(MIB) in refused("cache", "format", small)
