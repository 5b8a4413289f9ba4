"""The store's core on this disk: log append, map lookup, and ingest against a plain append.

`plain append` writes the same bytes to a file of the same directory with the same number of
syncs, O_DIRECT like the store: what is left between the two is the price of the store.
"""

import mmap
import os
import random
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from micro.core import Core
from millpond.native import lib

MIB = 1 << 20
BATCHES, BATCH_BYTES = 32, 2 * MIB
IN_FLIGHT = 4


def ingest(core: Core, frames: list[bytes]) -> None:
    """Send all frames, IN_FLIGHT at a time."""
    for start in range(0, len(frames), IN_FLIGHT):
        core.exchange(frames[start : start + IN_FLIGHT])


@pytest.mark.benchmark(group="store: one durable batch of 64 KiB")
def test_log_append(benchmark: BenchmarkFixture, core: Core, dice: random.Random) -> None:
    """One batch to its reply: verify, append, sync, apply."""
    data = dice.randbytes(16 * lib.MP_BLOCK_BYTES)

    def one_more() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ([core.batch(data)],), {}

    benchmark.pedantic(core.exchange, setup=one_more, rounds=200)


@pytest.mark.benchmark(group="store: 64 reads of 4 KiB at random")
def test_map_lookup_and_read(benchmark: BenchmarkFixture, core: Core, dice: random.Random) -> None:
    """Map lookup, extent table, read, reply; 64 requests in one call."""
    ingest(core, [core.batch(dice.randbytes(BATCH_BYTES)) for _ in range(BATCHES)])
    block_count = BATCHES * BATCH_BYTES // lib.MP_BLOCK_BYTES
    frames = [core.read(dice.randrange(block_count), 1) for _ in range(64)]
    benchmark(core.exchange, frames)


@pytest.mark.benchmark(group="store: 64 reads of holes")
def test_map_lookup_only(benchmark: BenchmarkFixture, core: Core) -> None:
    """Holes need the map and no disk: 64 requests in one call."""
    frames = [core.read(1 << 20 | number << 10, 1) for number in range(64)]
    benchmark(core.exchange, frames)


@pytest.mark.benchmark(group="store: ingest of 64 MiB")
def test_ingest(benchmark: BenchmarkFixture, core: Core, dice: random.Random) -> None:
    """Batches of 2 MiB, incompressible, four in flight, each answered when durable."""
    data = dice.randbytes(BATCH_BYTES)

    def fresh() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (core, [core.batch(data) for _ in range(BATCHES)]), {}

    before = core.counters().syncs
    benchmark.pedantic(ingest, setup=fresh, rounds=5)
    benchmark.extra_info["syncs per round"] = (core.counters().syncs - before) / 5


@pytest.mark.benchmark(group="store: ingest of 64 MiB")
def test_plain_append(benchmark: BenchmarkFixture, directory: Path, dice: random.Random) -> None:
    """The same bytes, O_DIRECT, one fdatasync per four batches, into allocated space."""
    buffer = mmap.mmap(-1, BATCH_BYTES)
    buffer.write(dice.randbytes(BATCH_BYTES))
    flags = os.O_WRONLY | os.O_CREAT | os.O_DIRECT
    fd = os.open(directory / "plain", flags, 0o600)

    def append() -> None:
        for number in range(BATCHES):
            os.pwrite(fd, buffer, number * BATCH_BYTES)
            if number % IN_FLIGHT == IN_FLIGHT - 1:
                os.fdatasync(fd)

    def fresh() -> None:
        os.ftruncate(fd, 0)
        os.posix_fallocate(fd, 0, BATCHES * BATCH_BYTES)

    benchmark.pedantic(append, setup=fresh, rounds=5)
    os.close(fd)
