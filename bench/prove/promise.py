"""make prove WHAT=promise: what guests may rely on, while things go wrong or are being looked for.

The paths of tests named here are agreed: a test that moves takes its line with it.
"""

import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import fio
from farm import Farm
from prove.runner import ROOT, WORK, Outcome, Registry, main, run, tests

registry = Registry("promise")
TORTURE_SEEDS, TORTURE_LIMIT_S = 1000, 20 * 60
MAKE = "make prove WHAT=promise ARGS="
GIB, MIB = 1 << 30, 1 << 20


@registry.line("torture", "1000 simulated sites in which everything goes wrong: under 20 minutes")
def torture() -> Outcome:
    """MILLPOND_TORTURE_SEEDS for another number."""
    seeds = int(os.environ.get("MILLPOND_TORTURE_SEEDS", TORTURE_SEEDS))
    begin = time.perf_counter()
    code, text = run(["make", "-C", str(ROOT), "torture", f"SEEDS={seeds}"], "torture")
    seconds = time.perf_counter() - begin
    figure = f"{seconds:.0f} s: {text.strip().splitlines()[-1 if code == 0 else -2]}"
    in_time = seconds < TORTURE_LIMIT_S * seeds / TORTURE_SEEDS
    return Outcome(f"make torture SEEDS={seeds}", figure, passed=code == 0 and in_time)


@registry.line("faults", "at least 24 deliberate faults in the code, each caught; one table")
def faults() -> Outcome:
    """And those of the store that need a hand-made batch or a damaged log."""
    code, text = run(["make", "-C", str(ROOT), "faults"], "faults")
    found = re.search(r"^(\d+) of (\d+) caught$", text, re.MULTILINE)
    by_hand = tests(
        "faults-by-hand",
        "tests/sim/test_fault_scenarios.py",
        "tests/sim/test_reconnect.py",
        "tests/sim/test_rescue.py",
        "tests/store/test_core_faults.py",
        "tests/cache/test_volumes.py",
    )
    figure = f"{found[0] if found else 'no table'}; by hand: {by_hand.figure}"
    enough = found is not None and int(found[1]) >= 24
    return Outcome("make faults", figure, passed=code == 0 and enough and by_hand.passed)


@registry.line("crash", "histories cut after every Nth I/O, in recovery and checkpoints, twice")
def crash() -> Outcome:
    """Of cache and store; with verification between everything in half of the worlds."""
    return tests(
        "crash",
        "tests/sim/test_crash_sweep.py",
        "tests/sim/test_send_sweep.py",
        "tests/sim/test_rescue.py",
        "tests/sim/test_regressions.py",
        "tests/store/test_core_crash.py",
    )


@registry.line("processes", "real processes: any mixture of troubles, full disks, EIO, restarts")
def processes() -> Outcome:
    """MILLPOND_TORTURE_S=3600 for an hour of the mixture."""
    return tests("processes", "tests/torture")


@registry.line("failures", "each failure that a guest can see: its outcome in README, its test")
def failures() -> Outcome:
    """The tests that the table names run in other lines, and in make test."""
    return tests("failures", "tests/test_failures.py", "tests/cli/test_status.py")


@registry.line("fsck", "offline check of a store against its log; verification finds every damage")
def fsck() -> Outcome:
    """Of stores and of caches."""
    return tests(
        "fsck",
        "tests/store/test_fsck.py",
        "tests/store/test_fsck_clean.py",
        "tests/store/test_fsck_refused.py",
        "tests/store/test_scrub.py",
        "tests/sim/test_scrub.py",
        "tests/sim/test_scrub_worlds.py",
        "tests/cache/test_scrub.py",
        "tests/torture/test_fsck.py",
    )


@registry.line(
    "fuzz", "what is parsed in C, behind its checksums: no crash, hang or endless memory"
)
def fuzz() -> Outcome:
    """The regressions, then each harness for a minute."""
    shown = tests("fuzz", "tests/fuzz")
    code, text = run(["make", "-C", str(ROOT), "fuzz", "SECONDS=60"], "fuzz-long")
    lines = [line for line in text.splitlines() if " inputs in " in line]
    figure = "; ".join([shown.figure, *lines])
    return Outcome("make fuzz SECONDS=60", figure, passed=shown.passed and code == 0)


@registry.line("sanitize", "the suite under address, undefined and thread sanitizers: no report")
def sanitize() -> Outcome:
    """MILLPOND_SANITIZE_ARGS chooses tests; all of them take hours."""
    arguments = os.environ.get("MILLPOND_SANITIZE_ARGS", "tests/native tests/store tests/nbd")
    code, text = run(["make", "-C", str(ROOT), "sanitize", f"ARGS={arguments}"], "sanitize")
    ends = [line for line in text.splitlines() if line.startswith("make sanitize WHAT=")]
    return Outcome(f'make sanitize ARGS="{arguments}"', "; ".join(ends), passed=code == 0)


# ---- background verification ----

# Full budget: the largest scrub_rate that cli/CONFIGURATION.md permits.
FULL_BUDGET, OFF = "64MiB", "0"
PAIRS, RUN_S, DEPTH = 5, 4, 16
REGION_BYTES = 768 * MIB
P99_AT_MOST, RATE_AT_LEAST = 1.5, 0.8


@dataclass(frozen=True)
class Mixed:
    """One run of the load: both sides, and what was verified beside it."""

    rate_per_s: float
    read_p99_us: float
    write_p99_us: float
    scrub_bytes_per_s: float


class Scrubbed:
    """A cache whose device is verified, or not: the same one, started anew."""

    def __init__(self, made: Farm) -> None:
        self.made = made

    def start(self, scrub_rate: str) -> None:
        """With this rate in its configuration file, which has what a command line has not."""
        self.made.cache.stop()
        settings = self.made.device.with_name("cache.toml")
        lines = ["[cache]", f'device = "{self.made.device}"', f'stores = ["{self.made.address()}"]']
        settings.write_text("\n".join([*lines, f'scrub_rate = "{scrub_rate}"', ""]))
        self.made.cache.start()

    def run(self, scrub_rate: str) -> Mixed:
        """Reads that hit and writes, 4 KiB each, half and half, over the same blocks."""
        self.start(scrub_rate)
        job = fio.Job("mixed", "randrw", 4096, DEPTH, 0, REGION_BYTES)
        before, begin = self._scrub_bytes(), time.perf_counter()
        reads, writes = fio.run_mixed(job, self.made.reach("disk"), runtime_s=RUN_S)
        elapsed_s = time.perf_counter() - begin
        verified = (self._scrub_bytes() - before) / elapsed_s
        self.made.wait_destaged()
        rate = reads.rate_per_s + writes.rate_per_s
        return Mixed(rate, reads.p99_us, writes.p99_us, verified)

    def _scrub_bytes(self) -> int:
        return int(self.made.status("volumes")["engine"]["scrub_read_bytes"])


@contextmanager
def scrubbed() -> Iterator[Scrubbed]:
    """A region of the disk that is in read slots, and a log that no run fills."""
    directory = WORK / "scrub"
    shutil.rmtree(directory, ignore_errors=True)
    try:
        # A fixed rate of destage: cache and store share the machine.
        arguments = ["--config", str(directory / "cache.toml"), "--average-rate", "64MiB"]
        farm = Farm(directory, cache_size="3GiB", log_size="1GiB", arguments=arguments)
        with closing(farm) as made:
            made.stores[0].start()
            made.create(["disk"], GIB)
            cache = Scrubbed(made)
            cache.start(OFF)
            for pattern in ("write", "read"):
                job = fio.Job(pattern, pattern, MIB, 4, 0, REGION_BYTES)
                fio.run(job, made.reach("disk"))
                made.wait_destaged()
            yield cache
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@registry.line(
    "scrub", "with verification at full budget: client p99 at most 1.5x, rate at least 0.8x"
)
def scrub() -> Outcome:
    """Interleaved pairs, every second one backwards; the medians of their ratios."""
    with scrubbed() as cache:
        pairs = []
        for turn in range(PAIRS):
            order = (OFF, FULL_BUDGET) if turn % 2 == 0 else (FULL_BUDGET, OFF)
            runs = {rate: cache.run(rate) for rate in order}
            pairs.append((runs[OFF], runs[FULL_BUDGET]))
    rate = statistics.median(on.rate_per_s / off.rate_per_s for off, on in pairs)
    read_p99 = statistics.median(on.read_p99_us / off.read_p99_us for off, on in pairs)
    write_p99 = statistics.median(on.write_p99_us / off.write_p99_us for off, on in pairs)
    verified = statistics.median(on.scrub_bytes_per_s for _, on in pairs)
    figure = (
        f"{FULL_BUDGET}/s is the most that scrub_rate may be; medians of {PAIRS} pairs: rate"
        f" {rate:.2f}x of {statistics.median(off.rate_per_s for off, _ in pairs):,.0f}/s, p99 of"
        f" reads {read_p99:.2f}x, of writes {write_p99:.2f}x; verification read"
        f" {verified / MIB:.1f} MiB/s from fio's start to its end"
    )
    passed = rate >= RATE_AT_LEAST and max(read_p99, write_p99) <= P99_AT_MOST and verified > 0
    return Outcome(f"{MAKE}scrub", figure, passed)


if __name__ == "__main__":
    sys.exit(main(registry))
