"""One bit flips on the real device: in a read slot, in a log block, in a store segment.

The slot is fetched again and the guest sees nothing.  The log block and the store's block are I/O
errors, never data; the log's volume stops: nothing behind the damage reaches the store.  Each is
counted in `status`.
"""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nbdclient
from millpond.nbd.wire import Error
from millpondprocess import Millpond
from nbdclient import NbdClient, NbdReplyError
from torture.amounts import seed_for
from torture.cachefile import find_in_log, find_in_slots, log_records
from torture.commands import disk_of, export, millpond, status, wait_drained, wait_until
from torture.storefiles import find_in_store, flip

MIB = 1 << 20
BLOCK = 4096
SIZE_BYTES = 32 * MIB
CACHE_BYTES = 256 * MIB
IMAGE_BYTES = 4 * MIB  # at the store, and nowhere else
DIRTY_BYTES = 6 * MIB  # at the slowest rate: a minute and a half of destage
SLOWEST = str(64 << 10)
QUIET_S = 1.5  # long enough for many batches
PUBLISHED_S = 0.1


class Disk:
    """An `up` that is down, with an image at its store and nothing in its cache."""

    def __init__(self, directory: Path, chance: random.Random) -> None:
        self.directory = directory
        self.cache = directory / "cache"
        self.store = directory / "store"
        self.image = chance.randbytes(IMAGE_BYTES)
        self.server = self.make()
        file = directory.parent / "image"
        file.write_bytes(self.image)
        with self.server:
            done = millpond(
                *("volume", "import", file, "disk", "--overwrite"),
                *("--store", f"unix:{directory}/store.sock"),
            )
            assert done.code == 0, done.errors

    def make(self, *arguments: str) -> Millpond:
        """The process, not started, with these arguments."""
        return Millpond(
            self.directory, size_bytes=SIZE_BYTES, cache_bytes=CACHE_BYTES, arguments=arguments
        )

    def block(self, number: int) -> bytes:
        """Of the image."""
        return self.image[number * BLOCK : (number + 1) * BLOCK]

    def status(self) -> dict[str, Any]:
        """Of the running process."""
        return status(self.directory)

    def errors(self) -> dict[str, int]:
        """Checksum errors in status; of slots, the background verification may be the first."""
        now = self.status()
        found: dict[str, int] = now["checksum_errors"]
        return {**found, "slots": found["slots"] + now["scrub"]["slot_errors"]}


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    """One that nothing has happened to."""
    return Disk(tmp_path / "up", random.Random(seed_for("tests/torture/test_bitflip.py", 3)))


def connect(server: Millpond) -> NbdClient:
    return nbdclient.connect(server.uri, timeout_s=120)


def wait_counted(disk: Disk, where: str, count: int) -> None:
    """Counters are published a few milliseconds later."""
    wait_until(
        f"{count} checksum errors of {where} are counted",
        lambda: disk.errors()[where] >= count,
        timeout_s=30,
    )


def read_error(client: NbdClient, block: int) -> int:
    """The error that a read of a block gets; data is not allowed."""
    with pytest.raises(NbdReplyError) as caught:
        client.read(block * BLOCK, BLOCK)
    return caught.value.error


# Read slots.


def fill_slots(disk: Disk) -> None:
    """The whole image into slots, then a clean stop: the checkpoint says where."""
    with disk.server, connect(disk.server) as client:
        for _ in range(2):
            assert client.read(0, IMAGE_BYTES) == disk.image
        assert disk.status()["engine"]["slots_used"] > 0


def check_refetched(disk: Disk, client: NbdClient, blocks: tuple[int, ...]) -> None:
    """The data is right, the damage is counted, and the slot is repaired."""
    before = disk.status()
    assert not any(before["checksum_errors"].values())
    for block in blocks:
        assert client.read(block * BLOCK, BLOCK) == disk.block(block)
    wait_counted(disk, "slots", len(blocks))
    assert disk.status()["engine"]["fetches"] > before["engine"]["fetches"]
    for block in blocks:
        assert client.read(block * BLOCK, BLOCK) == disk.block(block)
    assert client.read(0, IMAGE_BYTES) == disk.image
    time.sleep(PUBLISHED_S)
    assert disk.errors()["slots"] == len(blocks), "the slot was not repaired"


def test_flipped_bit_in_a_slot_while_stopped_is_refetched(disk: Disk) -> None:
    fill_slots(disk)
    for block in (5, 100):
        flip(disk.cache, find_in_slots(disk.cache, block) + 1000)
    with disk.server, connect(disk.server) as client:
        check_refetched(disk, client, (5, 100))


def test_flipped_bit_in_a_slot_while_running_is_refetched(disk: Disk) -> None:
    fill_slots(disk)
    places = [find_in_slots(disk.cache, block) for block in (7, 200)]
    with disk.server, connect(disk.server) as client:
        assert client.read(0, IMAGE_BYTES) == disk.image
        for place in places:
            flip(disk.cache, place + 4095, bit=7)
        check_refetched(disk, client, (7, 200))


# The write log.


@pytest.fixture
def dirty(disk: Disk) -> Iterator[tuple[Disk, bytes]]:
    """Running, with dirty blocks behind the image that take long to leave; synced."""
    data = random.Random(4).randbytes(DIRTY_BYTES)
    disk.server = disk.make("--average-rate", SLOWEST, "--peak-rate", SLOWEST)
    disk.server.start()
    with connect(disk.server) as client:
        for offset in range(0, DIRTY_BYTES, 64 * 1024):
            client.write(IMAGE_BYTES + offset, data[offset : offset + 64 * 1024])
        client.flush()
    yield disk, data
    if disk.server.alive():
        disk.server.kill()


LAST_BLOCK = (IMAGE_BYTES + DIRTY_BYTES) // BLOCK - 1


def wait_failed(disk: Disk) -> None:
    """Until status says so."""
    wait_until(
        "the volume has failed",
        lambda: disk_of(disk.status())["state"] == "failed",
        timeout_s=120,
    )


def check_stopped_loudly(disk: Disk) -> None:
    """The volume is failed and says so; what it has not shipped stays unshipped."""
    wait_failed(disk)
    wait_counted(disk, "log", 1)
    before = disk.status()
    assert "does not verify" in disk_of(before)["problem"]
    table = millpond("status", "--dir", disk.directory)
    assert "does not verify" in table.output, table.output
    shown = disk_of(before)
    assert shown["dirty_bytes"] > 0
    time.sleep(QUIET_S)
    after = disk.status()
    assert disk_of(after)["destaged_sequence"] == shown["destaged_sequence"]
    assert after["stores"][0]["destage"] == before["stores"][0]["destage"]


def check_refused(disk: Disk) -> None:
    """A failed volume is not served: an error, not a disk."""
    with pytest.raises(nbdclient.OptionRefused) as caught:
        connect(disk.server)
    assert "verify" in caught.value.message or "damaged" in caught.value.message


def tells_of_sync(cache: Path) -> bool:
    """A record says that everything before it is synced."""
    newest = max(log_records(cache), key=lambda found: (found[1].last_sequence, found[1].type))[1]
    return bool(newest.synced_sequence == newest.last_sequence)


def check_never_shipped(disk: Disk, data: bytes) -> None:
    """The store has the image, and of what was dirty a beginning only."""
    shipped = export(disk.directory, disk.directory.parent / "shipped")
    assert shipped[:IMAGE_BYTES] == disk.image
    length = len(shipped[IMAGE_BYTES:].rstrip(b"\0"))
    length = -(-length // BLOCK) * BLOCK
    assert length < DIRTY_BYTES
    assert shipped[IMAGE_BYTES : IMAGE_BYTES + length] == data[:length]


def test_flipped_bit_in_a_log_block_is_an_error_and_stops_the_volume(
    dirty: tuple[Disk, bytes],
) -> None:
    disk, data = dirty
    place, _ = find_in_log(disk.cache, LAST_BLOCK)
    with connect(disk.server) as client:
        assert client.read(LAST_BLOCK * BLOCK, BLOCK) == data[-BLOCK:]
        flip(disk.cache, place + 17)
        assert read_error(client, LAST_BLOCK) == Error.EIO
    check_stopped_loudly(disk)
    check_refused(disk)
    check_never_shipped(disk, data)


def test_flipped_bit_in_a_log_block_is_found_by_destage(dirty: tuple[Disk, bytes]) -> None:
    disk, data = dirty
    disk.server.stop()
    place, _ = find_in_log(disk.cache, LAST_BLOCK)
    flip(disk.cache, place + 4000)
    disk.server = disk.make()  # unlimited: destage comes to it soon
    disk.server.start()
    check_stopped_loudly(disk)
    check_never_shipped(disk, data)


def test_flipped_bit_in_a_log_block_after_kill_9_is_no_end_of_the_log(
    dirty: tuple[Disk, bytes],
) -> None:
    disk, data = dirty
    # Until the log itself tells that it was synced, damage cannot be told from its end.
    wait_until("the log tells of the sync", lambda: tells_of_sync(disk.cache), timeout_s=60)
    disk.server.kill()
    middle = (IMAGE_BYTES + DIRTY_BYTES // 2) // BLOCK
    place, _ = find_in_log(disk.cache, middle)
    flip(disk.cache, place + 123)
    disk.server.start()
    wait_failed(disk)
    assert "damaged" in disk_of(disk.status())["problem"]
    check_refused(disk)
    check_never_shipped(disk, data)


# The store.


def check_store_error(disk: Disk, client: NbdClient, block: int) -> None:
    """EIO on a miss, counted at the store; its neighbours are read."""
    assert disk.errors()["store_segments"] == 0
    assert read_error(client, block) == Error.EIO
    wait_counted(disk, "store_segments", 1)
    for neighbour in (block - 1, block + 1):
        assert client.read(neighbour * BLOCK, BLOCK) == disk.block(neighbour)
    assert read_error(client, block) == Error.EIO


def test_flipped_bit_in_a_store_segment_while_running_is_an_error_on_a_miss(disk: Disk) -> None:
    with disk.server, connect(disk.server) as client:
        path, place = find_in_store(disk.store, 40)
        flip(path, place + 2048)
        check_store_error(disk, client, 40)
        # Written anew, it is good again, here and at the store.
        client.write(40 * BLOCK, b"\x55" * BLOCK)
        assert client.read(40 * BLOCK, BLOCK) == b"\x55" * BLOCK
        wait_drained(disk.directory)
        image = export(disk.directory, disk.directory.parent / "shipped")
        assert image[40 * BLOCK : 41 * BLOCK] == b"\x55" * BLOCK


def test_flipped_bit_in_a_store_segment_while_stopped_is_an_error_on_a_miss(disk: Disk) -> None:
    path, place = find_in_store(disk.store, 300)
    flip(path, place)
    with disk.server, connect(disk.server) as client:
        check_store_error(disk, client, 300)
