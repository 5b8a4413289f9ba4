"""make bench-density: how many guests does one slow store disk serve, with the cache and without?

The store's disk does 200 random reads per second at 10 ms (bench/slowstore.py). Each guest is a
fio client that asks for ten 4 KiB blocks per second at random moments, without waiting for the
last. With: nine of ten reads go to what the cache holds, one to what it does not. Without: the same
guests over the same path, but nothing of what they read is in the cache. The figure is the
largest number of guests at which p99 is within the limit and nobody falls behind. See README.md.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import fio
import report
from farm import Farm, millpond

MIB = 1 << 20
ARMS, LATENCY_MS = 2, 10  # 200 reads per second
READS_PER_S = 10  # of one guest
P99_LIMIT_MS = 50
AT_LEAST = 8
VOLUMES = ("one", "two", "three", "four")
VOLUME_BYTES = 512 * MIB
HOT_PERCENT = 10  # of a volume: gets 90 % of the reads
KEEPS_UP = 0.95
SLOW_STORE = Path(__file__).with_name("slowstore.py")


@dataclass(frozen=True)
class Trial:
    """So many guests for some seconds."""

    guests: int
    rate_per_s: float
    p50_ms: float
    p99_ms: float

    @property
    def served(self) -> bool:
        """p99 within the limit, and every guest got what it asked for."""
        wanted = self.guests * READS_PER_S
        return self.p99_ms <= P99_LIMIT_MS and self.rate_per_s >= KEEPS_UP * wanted

    def __str__(self) -> str:
        verdict = "served" if self.served else "not served"
        return (
            f"{self.guests:4} guests: {self.rate_per_s:6.0f} reads/s, p50 {self.p50_ms:6.2f} ms, "
            f"p99 {self.p99_ms:7.2f} ms, {verdict}"
        )


def guests_command(farm: Farm, guests: int, runtime_s: float, *, cached: bool) -> list[str]:
    """One fio process with a thread and a connection per guest, over the volumes in turns."""
    command = ["fio", "--thread", "--group_reporting", "--output-format=json", "--rw=randread"]
    command += ["--bs=4k", "--iodepth=16", f"--rate_iops={READS_PER_S}", "--rate_process=poisson"]
    command += ["--norandommap", "--randrepeat=0", "--lat_percentiles=1", "--percentile_list=50:99"]
    command += ["--time_based", f"--runtime={runtime_s}"]
    hot = VOLUME_BYTES // 100 * HOT_PERCENT // 4096 * 4096
    if cached:
        rest = 100 - HOT_PERCENT
        command += [f"--random_distribution=zoned:90/{HOT_PERCENT}:10/{rest}"]
        command += [f"--size={VOLUME_BYTES}"]
    else:
        command += [f"--offset={hot}", f"--size={VOLUME_BYTES - hot}"]
    for number, name in enumerate(VOLUMES):
        jobs = len(range(number, guests, len(VOLUMES)))
        if jobs:
            command += [f"--name={name}", f"--numjobs={jobs}", *farm.reach(name)]
    return command


def trial(farm: Farm, guests: int, runtime_s: float, *, cached: bool) -> Trial:
    """Run so many guests."""
    command = guests_command(farm, guests, runtime_s, cached=cached)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    start = done.stdout.find("{")
    if done.returncode or start < 0:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-1000:]}")
    (result,) = json.loads(done.stdout[start:])["jobs"]
    latencies = result["read"]["lat_ns"]["percentile"]
    made = Trial(
        guests,
        result["read"]["iops"],
        latencies["50.000000"] / 1e6,
        latencies["99.000000"] / 1e6,
    )
    print(f"  {'with' if cached else 'without':8}{made}", flush=True)
    return made


def most(try_it: Callable[[int], Trial], low: int, high: int) -> Trial | None:
    """The served trial with the most guests between low and high, by halving; None: not even low.

    Near the limit chance decides; what is not served gets a second try.
    """
    best = None
    while low <= high:
        middle = (low + high) // 2
        made = try_it(middle)
        if not made.served:
            made = try_it(middle)
        if made.served:
            best, low = made, middle + 1
        else:
            high = middle - 1
    return best


def prepare(farm: Farm) -> None:
    """Fill the volumes, empty the cache, warm the hot tenths; then the disk becomes slow.

    The export reads everything once, so that the store has maps and tables in memory in both cases.
    """
    arguments = [sys.executable, str(SLOW_STORE), str(ARMS), str(LATENCY_MS)]
    farm.stores[0].arguments = [*arguments, *farm.stores[0].arguments[1:]]
    farm.start()
    farm.create(VOLUMES, VOLUME_BYTES)
    for name in VOLUMES:
        fio.run(fio.Job("fill", "write", MIB, 4, 0, VOLUME_BYTES), farm.reach(name))
    farm.wait_destaged()
    farm.cache.stop()
    millpond("cache", "format", farm.device, "--log-size", "256MiB", "--force")
    farm.cache.start()
    for name in VOLUMES:
        hot = fio.Job("warm", "read", 16 << 10, 16, 0, VOLUME_BYTES // 100 * HOT_PERCENT)
        for _ in range(2):  # the admission test may want to see a block twice
            fio.run(hot, farm.reach(name))
    for name in VOLUMES:
        image = farm.device.with_name("image")
        millpond("volume", "export", name, image, "--no-progress", "--store", farm.address())
        image.unlink()
    os.kill(farm.stores[0].pid, signal.SIGUSR1)


def main() -> int:
    """Search both numbers, print the verdict."""
    parser = argparse.ArgumentParser(prog="make bench-density ARGS=")
    parser.add_argument("--quick", action="store_true", help="shorter trials")
    parser.add_argument("--runtime", type=float, help="seconds per trial (15)")
    parser.add_argument("--record", action="store_true", help="append to bench/results.jsonl")
    options = parser.parse_args()
    runtime_s = options.runtime or (6 if options.quick else 15)
    work = report.ROOT / ".run" / "density"
    shutil.rmtree(work, ignore_errors=True)
    with closing(Farm(work, cache_size="1280MiB", log_size="256MiB", slot_size="16K")) as farm:
        print("fill the store, warm the cache", flush=True)
        prepare(farm)
        limit = ARMS * 1000 // LATENCY_MS // READS_PER_S
        without = most(lambda n: trial(farm, n, runtime_s, cached=False), 1, limit)
        cached = most(lambda n: trial(farm, n, runtime_s, cached=True), limit // 2, 12 * limit)
    shutil.rmtree(work)
    if without is None or cached is None:
        raise SystemExit("not even the fewest guests are served")
    figure = cached.guests / without.guests
    result = "pass" if figure >= AT_LEAST else "short"
    print(f"without the cache: {without}")
    print(f"with the cache:    {cached}")
    print(
        f"{result:5} guests at p99 <= {P99_LIMIT_MS} ms: {figure:.1f} x without the cache, "
        f"at least {AT_LEAST}"
    )
    if options.record:
        lines: list[dict[str, object]] = [
            {"with_cache": cached is made, **asdict(made)} for made in (without, cached)
        ]
        report.record(lines, bench="density", ratio=round(figure, 2), runtime_s=runtime_s)
    return 0


if __name__ == "__main__":
    sys.exit(main())
