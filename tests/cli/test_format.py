"""`millpond cache format` refuses what somebody may miss; `cache serve` serves what it made."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbdclient
from millpond.cache.device import DeviceError, refuse_when_used

MIB = 1024 * 1024
SIZE = "256MiB"
COMMAND = [sys.executable, "-c", "import sys; from millpond.cli.main import main; sys.exit(main())"]


def millpond(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=os.environ, timeout=60
    )


def succeeds(result: "subprocess.CompletedProcess[str]") -> None:
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def fails(result: "subprocess.CompletedProcess[str]", words: str, code: int = 1) -> None:
    assert result.returncode == code, result.stderr
    assert result.stderr.startswith("millpond: error: ") and result.stderr.count("\n") == 1
    assert words in result.stderr


@pytest.fixture
def empty_file(tmp_path: Path) -> Path:
    """A file of the right size that holds nothing."""
    path = tmp_path / "device"
    with open(path, "wb") as file:
        file.truncate(256 * MIB)
    return path


def test_a_new_file_is_made_and_formatted(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    made = millpond("cache", "format", str(path), "--size", SIZE, "--slot-size", "4K", "--json")
    succeeds(made)
    assert '"cache_id"' in made.stdout
    assert path.stat().st_size == 256 * MIB


def test_an_empty_file_is_formatted(empty_file: Path) -> None:
    succeeds(millpond("cache", "format", str(empty_file)))


def test_a_millpond_cache_is_destroyed_only_by_force(empty_file: Path) -> None:
    succeeds(millpond("cache", "format", str(empty_file)))
    before = empty_file.read_bytes()[:4096]
    fails(millpond("cache", "format", str(empty_file)), "holds a Millpond cache")
    assert empty_file.read_bytes()[:4096] == before
    succeeds(millpond("cache", "format", str(empty_file), "--force"))
    assert empty_file.read_bytes()[:4096] != before


@pytest.mark.skipif(shutil.which("mkfs.ext4") is None, reason="e2fsprogs is not installed")
def test_a_file_system_is_destroyed_only_by_force(empty_file: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", "-F", str(empty_file)], check=True)
    fails(millpond("cache", "format", str(empty_file)), "holds ext4")
    succeeds(millpond("cache", "format", str(empty_file), "--force"))


@pytest.mark.parametrize(
    ("offset", "bytes_there", "words"),
    [
        (510, b"\x55\xaa", "partition table"),
        (MIB - 1, b"x", "is not empty"),
        (256 * MIB - 1, b"x", "is not empty"),
        (256 * MIB - MIB, b"x", "is not empty"),
        (65536, b"MPNDSCP1", "holds a Millpond cache"),
    ],
)
def test_anything_at_the_edges_is_destroyed_only_by_force(
    empty_file: Path, offset: int, bytes_there: bytes, words: str
) -> None:
    with open(empty_file, "r+b") as file:
        file.seek(offset)
        file.write(bytes_there)
    fails(millpond("cache", "format", str(empty_file)), words)
    succeeds(millpond("cache", "format", str(empty_file), "--force"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--slot-size", "5000"], "choose 4, 8, 16, 32 or 64 KiB"),
        (["--slot-size", "128K"], "choose 4, 8, 16, 32 or 64 KiB"),
        (["--log-size", "8MiB"], "at least 64 MiB"),
        (["--log-size", "200MiB"], "at most half"),
        (["--size", "512MiB"], "exists with"),
    ],
)
def test_sizes_that_cannot_be_are_refused(
    empty_file: Path, arguments: list[str], words: str
) -> None:
    fails(millpond("cache", "format", str(empty_file), *arguments), words)


def test_a_device_that_is_too_small_or_not_there_is_refused(tmp_path: Path) -> None:
    fails(millpond("cache", "format", str(tmp_path / "x"), "--size", "64MiB"), "at least")
    assert not (tmp_path / "x").exists()
    fails(millpond("cache", "format", str(tmp_path / "nothing")), "No such file")
    fails(millpond("cache", "format", str(tmp_path)), "")


def fake_block_device(tmp_path: Path, number: str) -> tuple[Path, Path]:
    """What /proc and /sys say of a device, with nothing in use."""
    proc, sysfs = tmp_path / "proc", tmp_path / "sys"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "mountinfo").write_text("22 1 0:21 / / rw - overlay overlay rw\n")
    (proc / "swaps").write_text("Filename Type Size Used Priority\n")
    (sysfs / "dev" / "block" / number / "holders").mkdir(parents=True)
    return proc, sysfs


@pytest.fixture
def block_device() -> Iterator[str]:
    """Any block device node; it is only looked at."""
    for entry in sorted(Path("/dev").iterdir()):
        if entry.is_block_device():
            yield str(entry)
            return
    pytest.skip("no block device node here")


def test_a_device_that_is_mounted_held_or_swapped_on_is_never_formatted(
    block_device: str, tmp_path: Path
) -> None:
    found = os.stat(block_device).st_rdev
    number = f"{os.major(found)}:{os.minor(found)}"
    proc, sysfs = fake_block_device(tmp_path, number)
    refuse_when_used(block_device, proc=proc, sysfs=sysfs)
    mountinfo = proc / "self" / "mountinfo"
    mountinfo.write_text(f"30 22 {number} / /mnt/a\\040b rw - ext4 {block_device} rw\n")
    with pytest.raises(DeviceError, match="is mounted at"):
        refuse_when_used(block_device, proc=proc, sysfs=sysfs)
    mountinfo.write_text("30 22 259:77 / /data rw - ext4 /dev/part1 rw\n")
    part = sysfs / "dev" / "block" / number / "part1"
    part.mkdir()
    (part / "partition").write_text("1\n")
    (part / "dev").write_text("259:77\n")
    with pytest.raises(DeviceError, match="is mounted at /data"):
        refuse_when_used(block_device, proc=proc, sysfs=sysfs)
    mountinfo.write_text("")
    (sysfs / "dev" / "block" / number / "holders" / "dm-0").mkdir()
    with pytest.raises(DeviceError, match="is part of dm-0"):
        refuse_when_used(block_device, proc=proc, sysfs=sysfs)
    (proc / "swaps").write_text(f"Filename Type Size Used Priority\n{block_device} partition 1 0\n")
    with pytest.raises(DeviceError, match="swap"):
        refuse_when_used(block_device, proc=proc, sysfs=sysfs)


def test_a_formatted_file_serves_every_volume_of_a_store_until_stopped(tmp_path: Path) -> None:
    device, socket_path, control = tmp_path / "cache", tmp_path / "nbd.sock", tmp_path / "control"
    (tmp_path / "store").mkdir()
    store = subprocess.Popen(
        [*COMMAND, "store", "serve", str(tmp_path / "store"), "--format"], stdout=subprocess.PIPE
    )
    cache = None
    try:
        assert store.stdout is not None and store.stdout.readline()
        at = ("--dir", str(tmp_path / "store"))
        for name in ("one", "two"):
            succeeds(millpond("volume", "create", name, "64MiB", *at))
        succeeds(millpond("cache", "format", str(device), "--size", SIZE))
        serve = [*COMMAND, "cache", "serve", str(device), "--nbd", str(socket_path)]
        serve += ["--store", f"unix:{tmp_path}/store/store.sock", "--control", str(control)]
        cache = subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert cache.stdout is not None
        uri = cache.stdout.readline().decode().strip()
        for name in ("one", "two"):
            with nbdclient.connect(uri, export=name) as client:
                client.write(0, name.encode() * 1024)
                assert client.read(0, 3) == name.encode()
        fails(millpond("cache", "format", str(device), "--force"), "in use by another process")
        shown = millpond("status", "--control", str(control))
        assert shown.returncode == 0 and "one" in shown.stdout and "two" in shown.stdout
    finally:
        for process in (cache, store):
            if process is not None:
                process.send_signal(signal.SIGTERM)
                assert process.wait(30) == 0
                assert process.stdout is not None
                process.stdout.close()
