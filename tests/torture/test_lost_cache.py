"""The cache device thrown away under load: the store has an exact earlier state of the disk.

A client writes one request at a time over a small hot area: request i stamps random blocks with i,
or trims some that were stamped.  So every prefix of the history is a state that nothing else looks
like.  The process is killed, the cache file deleted, and the store's image compared with the state
after every prefix: exactly one fits, the one at the store's own position, and it is not older than
what destage had acknowledged.
"""

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nbdclient
from millpondprocess import Millpond
from torture.amounts import amount, seed_for
from torture.commands import disk_of, export_from, millpond, refused, serving_store, status

BLOCK = 4096
MIB = 1 << 20
SIZE_BYTES = 64 * MIB
CACHE_BYTES = 256 * MIB
HOT_BLOCKS = 600
RUN_MAX = 32  # blocks of one request: 128 KiB
STAMP = struct.Struct("<QQ")


@dataclass(frozen=True)
class Request:
    """Stamp these blocks, or trim them."""

    first_block: int
    block_count: int
    trim: bool


@dataclass
class History:
    """What was sent, in order; request i is requests[i - 1]."""

    chance: random.Random
    requests: list[Request] = field(default_factory=list)
    _stamped: set[int] = field(default_factory=set)

    def next_request(self) -> Request:
        """A request that changes the disk: a trim hits at least one stamped block."""
        chance = self.chance
        count = chance.choice((1, 1, 1, 2, 5, RUN_MAX))
        first = chance.randrange(HOT_BLOCKS - count)
        blocks = range(first, first + count)
        trim = chance.randrange(8) == 0 and not self._stamped.isdisjoint(blocks)
        if trim:
            self._stamped.difference_update(blocks)
        else:
            self._stamped.update(blocks)
        self.requests.append(Request(first, count, trim))
        return self.requests[-1]

    def content(self, block: int, stamp: int) -> bytes:
        """A stamped block: its stamp, over and over, so that it compresses; or hardly at all."""
        stamped = STAMP.pack(stamp, block)
        if stamp % 2:
            return stamped * (BLOCK // STAMP.size)
        return stamped + random.Random(stamp << 20 | block).randbytes(BLOCK - STAMP.size)

    def fitting(self, image: bytes) -> Iterator[int]:
        """Every i such that the image is the disk after request i (0: empty)."""
        shown = [image[at : at + BLOCK] for at in range(0, HOT_BLOCKS * BLOCK, BLOCK)]
        assert not any(image[HOT_BLOCKS * BLOCK :]), "the image has blocks that nobody wrote"
        stamps = [STAMP.unpack_from(data)[0] for data in shown]
        for block, stamp in enumerate(stamps):
            expected = self.content(block, stamp) if stamp else bytes(BLOCK)
            assert shown[block] == expected, f"block {block} is no block that was written"
        expected_stamps = [0] * HOT_BLOCKS
        different = sum(stamp != 0 for stamp in stamps)
        if not different:
            yield 0
        for index, request in enumerate(self.requests, 1):
            for block in range(request.first_block, request.first_block + request.block_count):
                different -= expected_stamps[block] != stamps[block]
                expected_stamps[block] = 0 if request.trim else index
                different += expected_stamps[block] != stamps[block]
            if not different:
                yield index


def load(uri: str, history: History, count: int) -> None:
    """Send so many requests, one at a time; the last one is left unanswered."""
    with nbdclient.connect(uri, timeout_s=120) as client:
        for _ in range(count):
            request = history.next_request()
            stamp = len(history.requests)
            offset, length = request.first_block * BLOCK, request.block_count * BLOCK
            if request.trim:
                client.trim(offset, length)
            else:
                blocks = range(request.first_block, request.first_block + request.block_count)
                client.write(offset, b"".join(history.content(block, stamp) for block in blocks))
            if history.chance.randrange(50) == 0:
                client.flush()


def lose_cache(directory: Path, chance: random.Random) -> tuple[int, int, int]:
    """One try: (requests that were sent, position of the image, what destage had acknowledged)."""
    history = History(chance)
    server = Millpond(
        directory,
        size_bytes=SIZE_BYTES,
        cache_bytes=CACHE_BYTES,
        arguments=["--average-rate", str(chance.choice((1, 4, 64)) * MIB)],
    )
    server.start()
    try:
        load(server.uri, history, chance.randrange(200, 1500))
        while not (acknowledged := disk_of(status(directory))["destaged_sequence"]):
            load(server.uri, history, 20)
        load(server.uri, history, chance.randrange(1, 1000))
    finally:
        server.kill()
    (directory / "cache").unlink()
    with serving_store(directory) as address:
        image = export_from(address, directory.parent / f"{directory.name}.image")
        shown = millpond("volume", "show", "disk", "--store", address, "--json")
        assert shown.code == 0, shown.errors
    fitting = list(history.fitting(image))
    assert fitting, "the image is no state that the disk ever had"
    (position,) = fitting
    assert acknowledged <= position <= len(history.requests)
    assert f'"applied_sequence": {position},' in shown.output
    return len(history.requests), position, acknowledged


def test_lost_cache_leaves_an_exact_earlier_state(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    seed = seed_for("tests/torture/test_lost_cache.py", 42)
    tries = amount("LOSSES", usual=3, prove=20)
    lost = []
    for index in range(tries):
        chance = random.Random(f"{seed} {index}")
        sent, position, acknowledged = lose_cache(tmp_path / f"up{index}", chance)
        lost.append(sent - position)
        print(
            f"try {index + 1}: {sent} requests, the image is the disk after request {position},"
            f" destage had acknowledged {acknowledged}"
        )
        if index == 0:
            check_dirty_volume_is_not_opened_lightly(tmp_path / "up0")
    assert any(lost), "the cache never held anything that the store lacked: nothing was tested"
    record_property(
        "figure", f"{tries} of {tries} exact earlier states, {min(lost)} to {max(lost)} writes lost"
    )


def check_dirty_volume_is_not_opened_lightly(directory: Path) -> None:
    """Another cache may not open what the lost one held dirty: the loss has to be accepted."""
    line = refused("up", directory)
    assert "dirty" in line or "lost" in line, line
