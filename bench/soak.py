"""Mixed load for a long time: do memory, descriptors and threads stay level?

Four guests come and go, a round of about twenty seconds each: reads and writes of 4 to 64 KiB with
flushes, trims, at a rate that the store keeps up with. Every few seconds the processes are looked
at. Level means: the mean of the last fifth lies within 5 % of the mean of the second fifth; the
first is the time to fill what has a fixed size.
Failure modes: a guest's error or a process that ends: SystemExit.
"""

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


def load(farm: Farm, name: str) -> subprocess.Popen[bytes]:
    """One guest for one round."""
    command = ["fio", f"--name={name}", "--size=256MiB", "--time_based", f"--runtime={ROUND_S}"]
    command += ["--rw=randrw", "--rwmixread=70", "--bssplit=4k/70:16k/20:64k/10", "--iodepth=8"]
    command += ["--fsync=64", "--rate=8m,2m", "--randrepeat=0", *farm.reach(name)]
    command += [f"--name={name}-trim", "--rw=randtrim", "--bs=64k", "--iodepth=1", "--rate_iops=2"]
    command += ["--size=256MiB", "--time_based", f"--runtime={ROUND_S}", *farm.reach(name)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def run(farm: Farm) -> list[Level]:
    """Make volumes, load them, look; the levels of cache and store."""
    farm.stores[0].start()
    farm.create(VOLUMES, 256 << 20)
    farm.cache.start()
    seen: dict[str, list[float]] = defaultdict(list)
    end = time.perf_counter() + duration_s()
    while time.perf_counter() < end:
        guests = [load(farm, name) for name in VOLUMES]
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
