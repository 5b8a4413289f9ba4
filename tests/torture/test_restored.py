"""A device or a store that is not what it was: restored from an old copy, replaced, or empty.

Whoever has newer writes must never be taken for who has older ones.  Each is refused, in words that
say what parted and what to do, and nothing is shipped or dropped.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbdclient
from nbdclient import ConnectionLost, NbdClient, NbdReplyError, OptionRefused
from torture.commands import wait_until
from torture.daemons import MIB, Pair

BLOCK = 4096
SIZE_BYTES = 16 * MIB
PATIENCE_S = 120.0
FIRST, SECOND, THIRD = (bytes([letter]) * BLOCK for letter in b"ABC")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """Running; nobody has opened the volume yet."""
    with Pair(tmp_path, {"disk": SIZE_BYTES}, cache_bytes=256 * MIB, log_bytes=64 * MIB) as pair:
        yield pair


def guest(pair: Pair) -> NbdClient:
    return nbdclient.connect(pair.uri, export="disk", timeout_s=PATIENCE_S)


def write_and_leave(pair: Pair, *blocks: bytes) -> None:
    """Blocks from the first on; shipped, and the volume given back."""
    with guest(pair) as client:
        client.write(0, b"".join(blocks))
        client.flush()
    pair.wait_drained()
    wait_until("given back", lambda: pair.disk("disk")["state"] == "closed", timeout_s=PATIENCE_S)


def copy(source: Path, target: Path) -> None:
    """All of it, as a backup would."""
    subprocess.run(["cp", "-a", "--sparse=always", source, target], check=True)


def put_back(copied: Path, place: Path) -> None:
    """As an operator would."""
    if place.is_dir():
        shutil.rmtree(place)
    copied.rename(place)


def refusal(pair: Pair) -> str:
    """Why a guest is not let in."""
    with pytest.raises(OptionRefused) as refused:
        guest(pair)
    return refused.value.message


def test_store_restored_from_a_backup_is_not_taken_for_the_newest(
    pair: Pair, tmp_path: Path
) -> None:
    write_and_leave(pair, FIRST)
    pair.store.stop()
    copy(pair.store_directory, tmp_path / "backup")
    pair.store.start()
    write_and_leave(pair, SECOND, THIRD)
    pair.store.stop()
    put_back(tmp_path / "backup", pair.store_directory)
    pair.store.start()
    assert "it lost data or was restored" in refusal(pair)
    assert "it lost data or was restored" in pair.words()
    # The operator accepts the older state: an empty cache has nothing to say against it.
    pair.cache.stop()
    pair.format_device()
    pair.cache.start()
    with guest(pair) as client:
        assert client.read(0, 2 * BLOCK) == FIRST + bytes(BLOCK)


@pytest.mark.parametrize("by", ["read", "write"])
def test_store_restored_under_a_running_cache_stops_the_volume(
    pair: Pair, tmp_path: Path, by: str
) -> None:
    write_and_leave(pair, FIRST)
    pair.store.stop()
    copy(pair.store_directory, tmp_path / "backup")
    pair.store.start()
    with guest(pair) as client:
        client.write(0, SECOND)
        pair.wait_drained()
        pair.store.stop()
        put_back(tmp_path / "backup", pair.store_directory)
        pair.store.start()
        with pytest.raises((ConnectionLost, NbdReplyError)):
            while True:
                if by == "read":
                    client.read(SIZE_BYTES - BLOCK, BLOCK)
                else:
                    client.write(BLOCK, THIRD)
        wait_until(
            "the volume has failed",
            lambda: pair.disk("disk")["state"] == "failed",
            timeout_s=PATIENCE_S,
        )
    # Whoever asks first hears it: a miss, or destage.
    words = pair.words() if by == "read" else refusal(pair)
    assert "the store lost writes" in words or "the store refuses a batch" in words
    assert pair.image("disk")[: 2 * BLOCK] == FIRST + bytes(BLOCK), "nothing was shipped to it"


def kill_dirty(pair: Pair) -> None:
    """Kill the cache while a write is on its device alone."""
    with guest(pair) as client:
        client.write(0, FIRST)
        pair.store.pause()
        client.write(BLOCK, SECOND)
        client.flush()
        pair.cache.kill()
    pair.store.resume()


def test_device_restored_from_an_old_copy_is_not_taken_for_the_newest(
    pair: Pair, tmp_path: Path
) -> None:
    """What the copy takes for unshipped had arrived, and nothing newer was left on the original."""
    kill_dirty(pair)
    copy(pair.device, tmp_path / "copied")
    pair.cache.start()
    write_and_leave(pair, THIRD, THIRD, THIRD)
    pair.cache.stop()
    put_back(tmp_path / "copied", pair.device)
    pair.cache.start()
    with guest(pair) as client:
        assert client.read(0, 3 * BLOCK) == 3 * THIRD
    assert pair.image("disk")[: 3 * BLOCK] == 3 * THIRD, "nothing was shipped"


def test_device_that_does_not_know_what_it_had_is_refused(pair: Pair, tmp_path: Path) -> None:
    pair.cache.stop()
    copy(pair.device, tmp_path / "empty")
    pair.cache.start()
    kill_dirty(pair)
    put_back(tmp_path / "empty", pair.device)
    pair.cache.start()
    assert "was the device replaced?" in refusal(pair)
    assert "was the device replaced?" in pair.words()


def test_new_device_is_refused_what_the_old_one_had(pair: Pair, tmp_path: Path) -> None:
    kill_dirty(pair)
    pair.device.rename(tmp_path / "away")
    pair.format_device()
    pair.cache.start()
    assert "accept the loss" in refusal(pair)
    assert "accept the loss" in pair.words()
    # The old one comes back, and so does the write.
    pair.cache.stop()
    put_back(tmp_path / "away", pair.device)
    pair.cache.start()
    with guest(pair) as client:
        assert client.read(0, 2 * BLOCK) == FIRST + SECOND
