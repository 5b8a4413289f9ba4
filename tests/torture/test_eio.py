"""Reads, writes and syncs fail at a running daemon: what its guest sees, and what status says.

The disk is the real one behind native's driver_failing.c: half of the writes that fail have
happened all the same, and what a failed sync covered is zeroes after the next one that succeeds.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbdclient
from millpond.native.drivers import Op
from millpond.nbd.wire import Error
from nbdclient import ConnectionLost, NbdClient, NbdReplyError
from torture.amounts import seed_for
from torture.cachefile import superblock
from torture.commands import millpond, wait_until
from torture.daemons import FOR_EVER, MIB, Pair
from torture.guests import Guest
from torture.stamping import Stamper

BLOCK = 4096
SIZE_BYTES = 32 * MIB
DEPTH = 8
PATIENCE_S = 120.0
SOME_REPLIES = 400
DATA = bytes(range(256)) * 16


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """Running, on disks that do not fail yet."""
    with Pair(tmp_path, {"disk": SIZE_BYTES}, cache_bytes=256 * MIB, log_bytes=64 * MIB) as pair:
        yield pair


@pytest.fixture
def stamper(pair: Pair) -> Stamper:
    """Has the whole disk, is connected, and has written some of it."""
    chance = random.Random(seed_for("tests/torture/test_eio.py", 11))
    stamper = Stamper(chance, 0, SIZE_BYTES, DEPTH)
    connect(pair, stamper)
    load(stamper)
    return stamper


def connect(pair: Pair, stamper: Stamper) -> None:
    """And look at everything."""
    stamper.attach(nbdclient.connect(pair.uri, export="disk", timeout_s=PATIENCE_S))
    stamper.verify()


def load(stamper: Stamper, replies: int = SOME_REPLIES) -> None:
    """So many replies."""
    while replies > 0:
        replies -= stamper.step()


def log_area(pair: Pair) -> tuple[int, int]:
    """Where the device has the write log."""
    found = superblock(pair.device)
    return found.log_offset_bytes, found.slots_offset_bytes


def slots_area(pair: Pair) -> tuple[int, int]:
    """Where it has the read slots."""
    found = superblock(pair.device)
    return found.slots_offset_bytes, found.device_bytes


def open_guest(pair: Pair) -> NbdClient:
    return nbdclient.connect(pair.uri, export="disk", timeout_s=PATIENCE_S)


def error_of_read(client: NbdClient, offset: int) -> int:
    """The error that a read of a block gets; data is not allowed."""
    with pytest.raises(NbdReplyError) as caught:
        client.read(offset, BLOCK)
    return caught.value.error


def wait_counted(pair: Pair, counter: str, least: int) -> None:
    """Counters of the engine are published a few milliseconds later."""
    wait_until(
        f"{least} {counter} are counted",
        lambda: pair.status()["engine"][counter] >= least,
        timeout_s=PATIENCE_S,
    )


def check_end(pair: Pair, stamper: Stamper) -> None:
    """After kill -9 of the cache everything acknowledged is there; then it arrives at the store."""
    pair.cache.kill()
    stamper.lost()
    pair.cache.start()
    connect(pair, stamper)
    load(stamper)
    stamper.finish()
    stamper.close()
    pair.wait_drained()
    assert pair.image("disk") == bytes(stamper.image), "the store's image is not the disk"


# The cache's device.


@pytest.mark.parametrize("op", [Op.WRITE, Op.SYNC])
def test_failed_io_of_the_log_is_rescued_and_the_guest_sees_nothing(
    pair: Pair, stamper: Stamper, op: Op
) -> None:
    for count in (1, 2):
        pair.cache.fail(op, area=log_area(pair), skip=stamper.chance.randrange(8))
        while not pair.cache.failed():
            load(stamper, 20)
        load(stamper)
        wait_counted(pair, "log_rescues", count)
    engine = pair.status()["engine"]
    assert engine["device_errors"] >= 2 and not engine["failed"]
    assert "log rescued 2" in pair.words()
    check_end(pair, stamper)


@pytest.mark.parametrize("op", [Op.WRITE, Op.SYNC])
def test_device_that_fails_for_good_ends_the_cache_and_acknowledges_nothing_more(
    pair: Pair, stamper: Stamper, op: Op
) -> None:
    stamper.finish()
    with open_guest(pair) as client:
        client.flush()
        pair.cache.fail(op, count=FOR_EVER)
        with pytest.raises(NbdReplyError) as caught:
            client.write(0, bytes(stamper.image[:BLOCK]), fua=True)
        assert caught.value.error == Error.EIO
    stamper.endures_errors = True
    with pytest.raises(ConnectionLost):
        load(stamper, FOR_EVER)
    stamper.endures_errors = False
    assert pair.cache.wait_end() == 1
    assert "writes get I/O errors from now on" in pair.cache.complaint()
    stamper.lost()
    pair.cache.start()
    connect(pair, stamper)
    load(stamper)
    check_end(pair, stamper)


def test_checkpoint_that_cannot_be_written_is_begun_again_and_ends_the_cache_at_last(
    pair: Pair, stamper: Stamper
) -> None:
    before_log = (0, log_area(pair)[0])
    stamper.finish()
    stamper.close()
    pair.cache.fail(Op.WRITE, area=before_log)
    wait_until("one has failed", lambda: pair.cache.failed() > 0, timeout_s=PATIENCE_S)
    connect(pair, stamper)
    load(stamper)
    stamper.finish()
    stamper.close()
    pair.cache.fail(Op.WRITE, area=before_log, count=FOR_EVER)
    assert pair.cache.wait_end() == 1
    assert "checkpoints cannot be written" in pair.cache.complaint()
    pair.cache.start()
    connect(pair, stamper)
    check_end(pair, stamper)


def test_slot_that_cannot_be_read_is_a_miss(pair: Pair, tmp_path: Path) -> None:
    image = random.Random(5).randbytes(4 * MIB)
    (tmp_path / "raw").write_bytes(image)
    done = millpond(
        *("volume", "import", tmp_path / "raw", "disk", "--overwrite", "--store", pair.address)
    )
    assert done.code == 0, done.errors
    with open_guest(pair) as client:
        for _ in range(2):
            assert client.read(0, len(image)) == image
        wait_counted(pair, "slots_used", 1)
        before = pair.status()["engine"]
        pair.cache.fail(Op.READ, area=slots_area(pair), count=10)
        for offset in range(0, len(image), 64 * 1024):
            assert client.read(offset, 64 * 1024) == image[offset : offset + 64 * 1024]
        assert pair.cache.heal() == 10
        assert client.read(0, len(image)) == image
        wait_counted(pair, "device_errors", before["device_errors"] + 10)
        assert pair.status()["engine"]["fetches"] > before["fetches"]
        assert "device errors" in pair.words()


def test_dirty_block_that_cannot_be_read_now_is_an_error_of_that_read(pair: Pair) -> None:
    with open_guest(pair) as client:
        client.write(0, DATA)
        pair.store.pause()
        client.write(BLOCK, DATA)
        wait_counted(pair, "batches", 1)  # under way, so that no other one is cut
        client.write(2 * BLOCK, DATA[::-1], fua=True)
        pair.cache.fail(Op.READ, area=log_area(pair), count=FOR_EVER)
        assert error_of_read(client, 2 * BLOCK) == Error.EIO
        pair.cache.heal()
        assert client.read(2 * BLOCK, BLOCK) == DATA[::-1]
        disk = pair.disk("disk")
        assert disk["state"] == "open" and not disk["problem"]
        pair.store.resume()
        pair.wait_drained()
    assert pair.image("disk")[: 3 * BLOCK] == DATA + DATA + DATA[::-1]


def test_dirty_block_that_destage_cannot_read_stops_the_volume_until_a_restart(pair: Pair) -> None:
    with open_guest(pair) as client:
        pair.cache.fail(Op.READ, area=log_area(pair), count=FOR_EVER)
        client.write(0, DATA, fua=True)
        wait_until(
            "the volume has failed",
            lambda: pair.disk("disk")["state"] == "failed",
            timeout_s=PATIENCE_S,
        )
        assert "destage stopped, nothing was dropped" in pair.words()
        with pytest.raises(ConnectionLost):
            while True:
                client.read(0, BLOCK)
    with pytest.raises(nbdclient.OptionRefused) as refusal:
        open_guest(pair)
    assert "nothing was dropped" in refusal.value.message
    pair.cache.stop()
    pair.cache.start()
    with open_guest(pair) as client:
        assert client.read(0, BLOCK) == DATA
        pair.wait_drained()
    assert pair.image("disk")[:BLOCK] == DATA


# The store's disk.


@pytest.mark.parametrize("op", [Op.WRITE, Op.SYNC])
def test_store_whose_disk_fails_acknowledges_nothing_more_and_ends(pair: Pair, op: Op) -> None:
    chance = random.Random(seed_for("tests/torture/test_eio.py", 12))
    guest = Guest(pair.uri, "disk", chance, share_bytes=SIZE_BYTES, depth=DEPTH)
    wait_counted(pair, "batches", 2)
    pair.store.fail(op, skip=chance.randrange(4))
    assert pair.store.wait_end() == 1
    assert "nothing is acknowledged any more: check the disk" in pair.store.complaint()
    wait_until("the cache has noticed", lambda: not pair.link_up(), timeout_s=PATIENCE_S)
    assert "DOWN" in pair.words()
    pair.store.start()
    wait_until("it is up again", pair.link_up, timeout_s=PATIENCE_S)
    wait_counted(pair, "batches", pair.status()["engine"]["batches"] + 2)
    guest.ask_to_stop()
    guest.join()
    pair.wait_drained()
    assert guest.reconnects == 0
    assert pair.image("disk") == bytes(guest.stamper.image), "the store's image is not the disk"


def test_store_whose_last_checkpoint_fails_loses_nothing(pair: Pair, stamper: Stamper) -> None:
    stamper.finish()
    stamper.close()
    pair.wait_drained()
    pair.store.fail(Op.SYNC, count=FOR_EVER)
    pair.store.process.terminate()
    assert pair.store.wait_end() == 1
    assert "nothing is acknowledged any more" in pair.store.complaint()
    pair.store.start()
    assert pair.image("disk") == bytes(stamper.image)


def test_block_that_the_store_cannot_read_is_an_error_of_that_read(pair: Pair) -> None:
    with open_guest(pair) as client:
        client.write(0, random.Random(6).randbytes(8 * BLOCK))
        expected = client.read(0, 8 * BLOCK)
        pair.wait_drained()
    pair.cache.stop()
    pair.format_device()
    pair.cache.start()
    with open_guest(pair) as client:
        pair.store.fail(Op.READ, count=FOR_EVER)
        assert error_of_read(client, 0) == Error.EIO
        assert "I/O errors" in pair.store_words()
        assert pair.store.heal() > 0
        assert client.read(0, 8 * BLOCK) == expected
        disk = pair.disk("disk")
        assert disk["state"] == "open" and not disk["problem"]
