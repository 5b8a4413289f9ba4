"""The store's file system fills while guests write: a real one, small, on a loop device.

A full store stalls its guests: never ENOSPC, never an error, never wrong data.  Status says so at
both ends, in words.  When there is room (a neighbour's file is deleted, another guest trims, what
was overwritten is punched) all goes on by itself, whatever was killed or restarted meanwhile.
"""

import random
import threading
import time
from pathlib import Path

import pytest

import nbdclient
from torture.amounts import seed_for
from torture.commands import wait_until
from torture.daemons import MIB, Pair
from torture.smalldisk import small_disk

CHUNK_BYTES = 1 << 16
LOG_BYTES = 64 * MIB
CACHE_BYTES = 256 * MIB
PATIENCE_S = 180.0  # against hanging for ever
QUIET_S = 1.0
KILLS = 4


class Writer:
    """A guest that writes its disk from the beginning to the end, so many times, in a thread."""

    def __init__(self, pair: Pair, name: str, seed: int, *, times: int = 1) -> None:
        self.chunks = 0  # acknowledged
        self.failure: BaseException | None = None
        self._seed = f"{seed} {name}"
        self._total = pair.volumes[name] // CHUNK_BYTES
        self._times = times
        self._client = nbdclient.connect(pair.uri, export=name, timeout_s=PATIENCE_S)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def chunk(self, turn: int, index: int) -> bytes:
        """What is written there in that turn: nothing that compresses."""
        return random.Random(f"{self._seed} {turn} {index}").randbytes(CHUNK_BYTES)

    def image(self) -> bytes:
        """The disk in the end."""
        return b"".join(self.chunk(self._times - 1, index) for index in range(self._total))

    def join(self) -> None:
        """It ends, and well."""
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), f"it hangs after {self.chunks} chunks"
        self.check()

    def check(self) -> None:
        """No error has reached it."""
        assert self.failure is None, self.failure

    @property
    def done(self) -> bool:
        """Has it written everything?"""
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            with self._client as client:
                for turn in range(self._times):
                    for index in range(self._total):
                        client.write(index * CHUNK_BYTES, self.chunk(turn, index))
                        self.chunks += 1
                        if self.chunks % 64 == 0:
                            client.flush()
                client.flush()
        except BaseException as error:
            self.failure = error


def wait_full(pair: Pair, writer: Writer) -> None:
    """Until both ends say so, in words; the guest hears of no error."""

    def both_say_so() -> bool:
        writer.check()
        return "FULL: no room" in pair.store_words() and "the store is full" in pair.words()

    wait_until("both say that the store is full", both_say_so, timeout_s=PATIENCE_S)


def wait_stalled(pair: Pair, writer: Writer) -> None:
    """Until the guest waits; it is not told anything else."""
    wait_until(
        "the guest is slowed",
        lambda: "guest slowed to" in pair.words() or "guest waits" in pair.words(),
        timeout_s=PATIENCE_S,
    )
    assert not writer.done
    writer.check()


def check_prefix(pair: Pair, name: str, writer: Writer) -> None:
    """What the store has is a state that the disk had: so many chunks, then zeroes."""
    image = pair.image(name)
    written = len(image.rstrip(b"\0"))
    for index in range(-(-written // CHUNK_BYTES)):
        begin = index * CHUNK_BYTES
        end = min(begin + CHUNK_BYTES, written)
        assert image[begin:end] == writer.chunk(0, index)[: end - begin], f"chunk {index}"
    assert written > 0


def check_end(pair: Pair, name: str, writer: Writer) -> None:
    """Everything was written, everything arrived."""
    writer.join()
    pair.wait_drained()
    assert pair.image(name) == writer.image(), "the store's image is not the disk"
    wait_until(
        "the store says that it has room",
        lambda: "FULL" not in pair.store_words(),
        timeout_s=PATIENCE_S,
    )
    assert "the store is full" not in pair.words()
    answer = pair.status()
    assert not any(answer["checksum_errors"].values()), answer["checksum_errors"]


def test_full_store_stalls_its_guest_until_there_is_room_though_killed_and_restarted(
    tmp_path: Path,
) -> None:
    seed = seed_for("tests/torture/test_full_disk.py", 7)
    with small_disk(tmp_path, 384 * MIB) as disk:
        disk.take(leave_bytes=96 * MIB)
        sizes = {"disk": 192 * MIB}
        with Pair(
            tmp_path,
            sizes,
            cache_bytes=CACHE_BYTES,
            log_bytes=LOG_BYTES,
            store_directory=disk.path,
        ) as pair:
            writer = Writer(pair, "disk", seed)
            wait_full(pair, writer)
            wait_stalled(pair, writer)

            pair.store.kill()
            pair.store.start()
            wait_full(pair, writer)

            pair.store.stop()
            disk.take()  # and not a byte is left for the next start
            pair.store.start()
            wait_full(pair, writer)
            check_prefix(pair, "disk", writer)

            pair.cache.pause()  # nobody asks for room when it comes
            disk.give()
            time.sleep(QUIET_S)
            pair.cache.resume()
            check_end(pair, "disk", writer)


@pytest.mark.long
def test_full_store_goes_on_when_another_guest_trims(tmp_path: Path) -> None:
    seed = seed_for("tests/torture/test_full_disk.py", 8)
    with small_disk(tmp_path, 192 * MIB) as disk:
        sizes = {"old": 80 * MIB, "new": 96 * MIB}
        with Pair(
            tmp_path,
            sizes,
            cache_bytes=CACHE_BYTES,
            log_bytes=LOG_BYTES,
            store_directory=disk.path,
        ) as pair:
            old = Writer(pair, "old", seed)
            old.join()
            pair.wait_drained()
            new = Writer(pair, "new", seed)
            wait_full(pair, new)
            with nbdclient.connect(pair.uri, export="old", timeout_s=PATIENCE_S) as client:
                client.trim(0, sizes["old"])
                client.flush()
                check_end(pair, "new", new)
                assert client.read(0, MIB) == bytes(MIB)
            assert not any(pair.image("old"))


@pytest.mark.long
@pytest.mark.long
def test_store_full_of_what_was_overwritten_empties_itself_though_killed_again_and_again(
    tmp_path: Path,
) -> None:
    seed = seed_for("tests/torture/test_full_disk.py", 9)
    chance = random.Random(seed)
    with small_disk(tmp_path, 96 * MIB) as disk:
        sizes = {"disk": 24 * MIB}
        with Pair(
            tmp_path,
            sizes,
            cache_bytes=CACHE_BYTES,
            log_bytes=LOG_BYTES,
            store_directory=disk.path,
        ) as pair:
            writer = Writer(pair, "disk", seed, times=8)
            for _ in range(KILLS):
                time.sleep(chance.uniform(0.5, 2.0))
                pair.store.kill()
                pair.store.start()
            check_end(pair, "disk", writer)
            assert "the store is full" in pair.cache.log(), "it was never full: nothing was tested"
