"""Mixed load for a long time: do memory, descriptors and threads stay level?

Four guests come and go, a round of about twenty seconds each: reads and writes of 4 to 64 KiB with
flushes, trims, at a rate that the store keeps up with. Every few seconds the processes are looked
at. Level means: the mean of the last fifth lies within 5 % of the mean of the second fifth.

The first fifth is the time to fill what has a fixed size, so the sizes are such that it does, in a
short run too. Log and slots are smaller than what is written in that time, and so are the store's
page cache (PAGE_CACHE; the default of 64 MiB takes a quarter of an hour) and what the store holds:
it keeps a descriptor per segment file, and a segment file until all of it is overwritten. So each
round writes another quarter of the disk, all of it, and no segment file lives longer than five.
The first round is at full speed, so that every queue was once as long as it gets on this machine
and the heap as large: later a neighbour's disk load would make it grow, to no more than that.
Data is random: what fio writes otherwise is mostly the zeroes that it has just read.
Failure modes: a guest's error or a process that ends: SystemExit.
"""

import itertools
import os
import statistics
import subprocess
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from farm import Farm

DEFAULT_S = 8 * 3600 / 50
ROUND_S = 20
PARTS = 4
PART_MIB = 32  # of the disk; at 2 MiB/s all of it is written in a round
VOLUME_MIB = PARTS * PART_MIB
PAGE_CACHE = "4MiB"
LOOK_S = 2
TOLERANCE = 0.05
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
VOLUMES = ("one", "two", "three", "four")


@dataclass(frozen=True)
class Level:
    """One quantity of one process: early and late."""

    what: str
    early: float
    late: float

    def __bool__(self) -> bool:
        return abs(self.late - self.early) <= TOLERANCE * self.early

    def __str__(self) -> str:
        change = (self.late / self.early - 1) * 100
        return f"{self.what} {self.early:.1f} to {self.late:.1f} ({change:+.1f} %)"


def duration_s() -> float:
    """How long."""
    return float(os.environ.get("MILLPOND_SOAK_S", DEFAULT_S))


def look(pid: int) -> dict[str, float]:
    """Resident MiB, descriptors, threads of a process."""
    process = Path(f"/proc/{pid}")
    pages = int((process / "statm").read_text().split()[1])
    return {
        "MiB": pages * PAGE_BYTES / (1 << 20),
        "descriptors": len(os.listdir(process / "fd")),
        "threads": len(os.listdir(process / "task")),
    }


def load(farm: Farm, name: str, number: int) -> subprocess.Popen[bytes]:
    """One guest for one round, the number-th."""
    timed = ["--time_based", f"--runtime={ROUND_S}", "--randrepeat=0", *farm.reach(name)]
    sizes = ["--bssplit=4k/70:16k/20:64k/10", "--iodepth=8"]
    part = [f"--offset={number % PARTS * PART_MIB}MiB", f"--size={PART_MIB}MiB"]
    whole = f"--size={VOLUME_MIB}MiB"
    read_rate, write_rate = ("--rate=8m", "--rate=2m") if number else ("--rate=0", "--rate=0")
    command = ["fio", f"--name={name}-write", "--rw=randwrite", write_rate, "--fsync=64"]
    command += ["--refill_buffers", *sizes, *part, *timed]
    command += [f"--name={name}-read", "--rw=randread", read_rate, whole, *sizes, *timed]
    command += [f"--name={name}-trim", "--rw=randtrim", "--rate_iops=2", "--bs=64k", "--iodepth=1"]
    command += [whole, *timed]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def run(farm: Farm) -> list[Level]:
    """Make volumes, load them, look; the levels of cache and store."""
    farm.stores[0].start()
    farm.create(VOLUMES, VOLUME_MIB << 20)
    farm.cache.start()
    seen: dict[str, list[float]] = defaultdict(list)
    end = time.perf_counter() + duration_s()
    for number in itertools.count():
        if time.perf_counter() >= end:
            break
        guests = [load(farm, name, number) for name in VOLUMES]
        while any(guest.poll() is None for guest in guests):
            time.sleep(LOOK_S)
            for role, process in (("cache", farm.cache), ("store", farm.stores[0])):
                for what, value in look(process.pid).items():
                    seen[f"{role} {what}"].append(value)
        if any(guest.returncode for guest in guests):
            raise SystemExit("a guest got an error")
    levels = []
    for what, values in seen.items():
        fifth = len(values) // 5
        early, late = values[fifth : 2 * fifth], values[-fifth:]
        levels.append(Level(what, statistics.mean(early), statistics.mean(late)))
    return levels
