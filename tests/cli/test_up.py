"""`millpond up` as a process: what it makes, keeps, refuses and survives."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nbdclient
from millpond.nbd.wire import TransmissionFlag
from millpondprocess import Millpond

MIB = 1024 * 1024
SIZE_BYTES = 64 * MIB
CACHE_BYTES = 256 * MIB
COMMAND = [sys.executable, "-c", "import sys; from millpond.cli.main import main; sys.exit(main())"]


def millpond(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=os.environ, timeout=60
    )


def up(directory: Path, *arguments: str) -> Millpond:
    return Millpond(directory, size_bytes=SIZE_BYTES, cache_bytes=CACHE_BYTES, arguments=arguments)


def fails(result: "subprocess.CompletedProcess[str]", code: int, words: str) -> None:
    errors = [line for line in result.stderr.splitlines() if not line.startswith("level=")]
    assert result.returncode == code, result.stderr
    assert len(errors) == 1 and errors[0].startswith("millpond: error: "), result.stderr
    assert words in errors[0]
    assert result.stdout == ""


def status(directory: Path) -> dict[str, Any]:
    answer = millpond("status", "--dir", str(directory), "--json")
    assert answer.returncode == 0, answer.stderr
    decoded: dict[str, Any] = json.loads(answer.stdout)
    return decoded


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """Where `up` may live; its log is shown when the test fails."""
    yield tmp_path / "pond"
    log = tmp_path / "pond.stderr"
    if log.exists():
        print(log.read_text())
        assert "Traceback" not in log.read_text()


def test_what_was_written_is_there_after_stop_and_start(directory: Path) -> None:
    noise = random.Random(1).randbytes(MIB)
    with up(directory) as running:
        assert running.uri == f"nbd+unix:///?socket={directory}/nbd.sock"
        with nbdclient.connect(running.uri) as client:
            assert client.size_bytes == SIZE_BYTES
            client.write(12345, noise)
            client.flush()
        running.stop()
        names = sorted(os.listdir(directory))
        assert names == ["cache", "store"], names  # sockets are gone
        running.start()
        with nbdclient.connect(running.uri) as client:
            assert client.read(12345, MIB) == noise


def test_writes_that_were_acknowledged_survive_kill_9(directory: Path) -> None:
    noise = random.Random(2).randbytes(4 * MIB)
    with up(directory, "--average-rate", "64KiB", "--peak-rate", "128KiB") as running:
        for round_number in range(3):
            with nbdclient.connect(running.uri) as client:
                client.write(round_number * 4 * MIB, noise)
                running.kill()
            running.start()
        with nbdclient.connect(running.uri) as client:
            for round_number in range(3):
                assert client.read(round_number * 4 * MIB, 4 * MIB) == noise
        shown = status(directory)
        assert shown["dirty_bytes"] > 0


def test_a_second_process_on_the_same_directory_is_refused_in_one_line(directory: Path) -> None:
    with up(directory) as running:
        fails(millpond("up", str(directory)), 5, "is served by another process")
        with nbdclient.connect(running.uri) as client:
            client.write(0, b"x" * 4096)


def test_other_sizes_than_at_first_are_refused_and_none_are_needed(directory: Path) -> None:
    with up(directory) as running:
        running.stop()
        fails(millpond("up", str(directory), "--size", "128MiB"), 2, "--size says 128M")
        fails(millpond("up", str(directory), "--cache-size", "1GiB"), 2, "--cache-size says 1G")
        running.start()
    again = Millpond(directory, size_bytes=SIZE_BYTES, cache_bytes=CACHE_BYTES)
    again._command = again._command[: again._command.index("--size")]
    with again, nbdclient.connect(again.uri) as client:
        assert client.size_bytes == SIZE_BYTES


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cache-size", "128MiB"], "at least 256MiB"),
        (["--average-rate", "2MiB", "--peak-rate", "1MiB"], "at least the average"),
        (["--average-rate", "1KiB"], "at least 65536 bytes/s"),
    ],
)
def test_arguments_that_cannot_work_are_refused_before_anything_is_made(
    directory: Path, arguments: list[str], words: str
) -> None:
    fails(millpond("up", str(directory), *arguments), 2, words)
    assert not directory.exists()


def test_a_cache_without_its_store_is_an_error_and_never_an_empty_disk(directory: Path) -> None:
    with up(directory) as running:
        running.stop()
    shutil.move(directory / "store", directory / "store.away")
    fails(millpond("up", str(directory)), 3, "has a cache but no store")
    (directory / "store").mkdir()
    fails(millpond("up", str(directory)), 3, "holds no store")


def test_a_cache_whose_store_lost_the_volume_is_an_error(directory: Path, tmp_path: Path) -> None:
    with up(directory) as running:
        running.stop()
        with up(tmp_path / "other") as other:
            deleted = millpond("volume", "delete", "disk", "--dir", str(other.directory), "--force")
            assert deleted.returncode == 0, deleted.stderr
            other.stop()
        shutil.rmtree(directory / "store")
        shutil.move(tmp_path / "other" / "store", directory / "store")
        fails(millpond("up", str(directory)), 3, "has no volume 'disk'")


def test_a_directory_that_was_left_half_made_is_finished(directory: Path) -> None:
    with up(directory) as running:
        running.stop()
        os.rename(directory / "cache", directory / "cache.new")
        os.truncate(directory / "cache.new", 1000)
        running.start()
        assert not (directory / "cache.new").exists()
        with nbdclient.connect(running.uri) as client:
            assert client.read(0, 4096) == bytes(4096)


def test_a_lost_cache_that_held_writes_is_replaced_only_when_told(directory: Path) -> None:
    with up(directory, "--average-rate", "64KiB", "--peak-rate", "64KiB") as running:
        with nbdclient.connect(running.uri) as client:
            client.write(0, random.Random(3).randbytes(4 * MIB))
        running.kill()
        os.unlink(directory / "cache")
        cache_size = ("--cache-size", str(CACHE_BYTES))
        fails(millpond("up", str(directory), *cache_size), 5, "--accept-loss")
        assert not (directory / "cache").exists()
    with up(directory, "--accept-loss") as running, nbdclient.connect(running.uri) as client:
        client.write(0, b"y" * 4096)
        assert client.read(0, 4096) == b"y" * 4096


def test_status_tells_what_the_cache_does(directory: Path) -> None:
    with up(directory, "--average-rate", "1MiB") as running:
        with nbdclient.connect(running.uri) as client:
            client.write(0, b"x" * MIB)
            assert client.read(0, MIB) == b"x" * MIB
            time.sleep(0.1)
            shown = status(directory)
            (volume,) = shown["volumes"]
            assert (volume["name"], volume["state"], volume["connections"]) == ("disk", "open", 1)
            assert volume["hit_rate"] == 1.0 and volume["epoch"] == 1
            assert shown["checksum_errors"] == {
                "slots": 0,
                "log": 0,
                "fetch": 0,
                "store_segments": 0,
            }
        table = millpond("status", "--dir", str(directory))
        assert table.returncode == 0 and "disk" in table.stdout and "average 1M/s" in table.stdout
    fails(millpond("status", "--dir", str(directory)), 6, "no cache answers")


def test_the_volume_is_listed_by_the_store_in_the_same_directory(directory: Path) -> None:
    with up(directory):
        listed = millpond("volume", "list", "--dir", str(directory), "--json")
        assert listed.returncode == 0, listed.stderr
        assert [volume["name"] for volume in json.loads(listed.stdout)] == ["disk"]


def test_a_size_that_is_no_whole_number_of_blocks_is_refused(directory: Path) -> None:
    fails(millpond("up", str(directory), "--size", "1000"), 1, "multiple of 4096")
    assert not directory.exists()


def test_read_only_guests_may_not_write(directory: Path) -> None:
    with up(directory) as running, nbdclient.connect(running.uri) as client:
        client.write(0, b"x" * 4096)
    with up(directory, "--read-only") as running, nbdclient.connect(running.uri) as client:
        assert client.flags & TransmissionFlag.READ_ONLY
        assert client.read(0, 4096) == b"x" * 4096
        with pytest.raises(nbdclient.NbdReplyError):
            client.write(0, b"y" * 4096)
