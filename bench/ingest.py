"""make bench: durable ingest of incompressible batches against plain append on the same disk.

A pair is the store's core taking BATCHES batches, IN_FLIGHT at a time, each answered when durable;
then the same bytes appended to a file of the same directory, O_DIRECT, into allocated space, with
as many syncs as the store made. The ratio is the median of the pairs'; every second pair is
turned round. Failure modes: a batch is refused or not answered: the exception says which.
"""

import argparse
import mmap
import os
import random
import shutil
import statistics
import sys
import time
from pathlib import Path

import report
from micro.core import Core

MIB = 1 << 20
BATCHES, BATCH_BYTES, IN_FLIGHT = 128, 2 * MIB, 4
AT_LEAST = 0.85
WORK = report.ROOT / ".run" / "ingest"


def store_s(directory: Path, batches: list[bytes]) -> tuple[float, int]:
    """Seconds that a fresh store takes for all batches, and its syncs meanwhile."""
    directory.mkdir()
    core = Core(directory)
    try:
        frames = [core.batch(data) for data in batches]
        syncs = core.counters().syncs
        begin = time.perf_counter()
        core.exchange(frames, in_flight=IN_FLIGHT)
        return time.perf_counter() - begin, core.counters().syncs - syncs
    finally:
        core.close()
        shutil.rmtree(directory)


def plain_s(path: Path, batches: list[bytes], syncs: int) -> float:
    """Seconds of appending the same bytes with as many syncs."""
    buffer = mmap.mmap(-1, BATCH_BYTES)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
    os.posix_fallocate(fd, 0, len(batches) * BATCH_BYTES)
    os.fsync(fd)
    taken_s = 0.0
    for number, data in enumerate(batches):
        buffer.seek(0)
        buffer.write(data)
        begin = time.perf_counter()
        os.pwrite(fd, buffer, number * BATCH_BYTES)
        if (number + 1) * syncs // len(batches) > number * syncs // len(batches):
            os.fdatasync(fd)
        taken_s += time.perf_counter() - begin
    os.close(fd)
    path.unlink()
    return taken_s


def main() -> int:
    """Play the pairs, print the verdict."""
    parser = argparse.ArgumentParser(prog="python -m ingest")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="append to bench/results.jsonl")
    options = parser.parse_args()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    dice = random.Random(20261127)
    batches = [dice.randbytes(BATCH_BYTES) for _ in range(BATCHES)]
    syncs = BATCHES // IN_FLIGHT
    store, plain = [], []
    for number in range(options.pairs):
        if number % 2:
            plain.append(plain_s(WORK / "plain", batches, syncs))
        taken_s, syncs = store_s(WORK / "store", batches)
        store.append(taken_s)
        if not number % 2:
            plain.append(plain_s(WORK / "plain", batches, syncs))
        rates = (BATCHES * BATCH_BYTES / MIB / each[-1] for each in (store, plain))
        print("  ingest: store {:.0f} MiB/s, plain append {:.0f} MiB/s".format(*rates), flush=True)
    shutil.rmtree(WORK)
    figure = statistics.median(b / a for a, b in zip(store, plain, strict=True))
    verdict: dict[str, object] = {
        "result": "pass" if figure >= AT_LEAST else "short",
        "job": "ingest of incompressible batches",
        "figure": figure,
        "peer": f"plain append with the same {syncs} syncs",
        "at_least": AT_LEAST,
    }
    print(report.VERDICT.format(**verdict))
    if options.record:
        rates_mib_per_s = [round(BATCHES * BATCH_BYTES / MIB / taken_s) for taken_s in store]
        facts = {"bench": "ingest", "pairs": options.pairs, "rates_mib_per_s": rates_mib_per_s}
        report.record([verdict], **facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
