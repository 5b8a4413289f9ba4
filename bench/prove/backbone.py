"""make prove WHAT=backbone: many volumes, the whole protocol, at full speed.

The paths of tests named here are agreed: a test that moves takes its line with it.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import fio
import soak
from client import Client, connect_soon
from farm import Farm
from prove.runner import WORK, Outcome, Registry, main, run, tests
from servers import cpu_s

registry = Registry("backbone")
MAKE = "make prove WHAT=backbone ARGS="
GIB, MIB = 1 << 30, 1 << 20
BLOCK_BYTES = 4096
INDEX_BYTES_PER_BLOCK = 32
SLOT_BYTES, SLOT_BYTES_PER_BLOCK = 16, 4
RECOVERY_LIMIT_S, DIRTY_BYTES, KILLS = 10, 10 * GIB, 3
REPLAYED_BYTES = 480 * MIB  # of the 512 MiB between two checkpoints (native/README-engine.md)
IDLE_LIMIT_PERCENT = 1.0
IDLE_S = 20
OTHERS_KEEP = 0.8
GUEST_TIMEOUT_S = 90


@contextmanager
def farm(name: str, **sizes: object) -> Iterator[Farm]:
    """Processes and files of one line; nothing of them stays."""
    directory = WORK / name
    shutil.rmtree(directory, ignore_errors=True)
    try:
        with closing(Farm(directory, **sizes)) as made:  # type: ignore[arg-type]
            yield made
    finally:
        shutil.rmtree(directory, ignore_errors=True)


# ---- speed ----


def judged(command: list[str], log_name: str, shown: str) -> Outcome:
    """A benchmark that prints a line `pass ...` or `short ...` per bound."""
    code, text = run(command, log_name)
    verdicts = re.findall(r"^(pass|short) +(.*)$", text, re.MULTILINE)
    if code or not verdicts:
        return Outcome(shown, f"exit code {code}: .run/prove/{log_name}.log", passed=False)
    figure = "\n".join(f"{result} {line}" for result, line in verdicts)
    return Outcome(shown, figure, passed=all(result == "pass" for result, _ in verdicts))


@registry.line("bench", "make bench: hits, writes, flushes, large requests, misses, ingest")
def bench() -> Outcome:
    """Medians of five interleaved pairs against the named peers."""
    return judged(["make", "bench", "ARGS="], "bench", "make bench")


@registry.line(
    "density", "make bench-density: guests served at equal p99, at least 8 times as many"
)
def density() -> Outcome:
    """The store's disk does 200 random reads per second at 10 ms."""
    return judged(["make", "bench-density", "ARGS="], "density", "make bench-density")


# ---- four volumes, one store stopped ----


def write_job(size_bytes: int) -> fio.Job:
    """Random 64 KiB writes, each place once."""
    return fio.Job("write", "randwrite", 64 << 10, 8, 0, size_bytes)


def spawn(made: Farm, name: str, size_bytes: int) -> subprocess.Popen[bytes]:
    """fio in the background."""
    command = fio.arguments(write_job(size_bytes), runtime_s=None) + made.reach(name)
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(guests: list[subprocess.Popen[bytes]]) -> None:
    """Until all have written what they had to; a guest that hangs is killed and told of."""
    end = time.perf_counter() + GUEST_TIMEOUT_S
    try:
        for guest in guests:
            if guest.wait(max(end - time.perf_counter(), 0)):
                raise SystemExit("a guest whose store is there got an error")
    except subprocess.TimeoutExpired:
        raise SystemExit(
            f"a guest whose store is there did not end in {GUEST_TIMEOUT_S} s"
        ) from None
    finally:
        for guest in guests:
            guest.kill()


def others_rate(made: Farm, names: list[str], each_bytes: int) -> float:
    """Bytes per second that these volumes write together, until all are done."""
    begin = time.perf_counter()
    wait_for([spawn(made, name, each_bytes) for name in names])
    return len(names) * each_bytes / (time.perf_counter() - begin)


def samples_until_stalled(made: Farm, name: str, timeout_s: float) -> list[int]:
    """Written by the guest per tenth of a second, until nothing was for two seconds."""
    end = time.perf_counter() + timeout_s
    rates: list[int] = []
    before = made.volume(name)["last_sequence"]
    while time.perf_counter() < end and (len(rates) < 20 or any(rates[-20:])):
        time.sleep(0.1)
        now = made.volume(name)["last_sequence"]
        rates.append(now - before)
        before = now
    return rates


@registry.line(
    "stopped", "four volumes, one store stopped: the others keep 0.8x, it goes on by itself"
)
def stopped() -> Outcome:
    """The others write three times the log while it slows, and again when it has stalled.

    The log is no larger so that the stopped one gets to the end of its share, half of the log, in
    three minutes: the last twelfth alone, at less than 128 KiB/s, is one of them. The others stay
    connected all the time: without a guest they would leave it their minimum, too.
    """
    shown = f"{MAKE}stopped"
    log_mib = 384
    others = ["one", "two", "three"]
    with farm("stopped", stores=2, cache_size="1GiB", log_size=f"{log_mib}MiB") as made:
        for store in made.stores:
            store.start()
        made.create(others, 4 * GIB, store=0)
        made.create(["stopped"], 4 * GIB, store=1)
        made.cache.start()
        connected = [connect_soon(made.nbd, name, timeout_s=60) for name in others]
        each = log_mib * MIB
        others_rate(made, others, each)  # a new log has no segment to be given back first
        background = spawn(made, "stopped", 4 * each)
        before = others_rate(made, others, each)
        if background.poll() is not None:
            raise SystemExit("the fourth guest ended while its store was there")
        made.stores[1].freeze()
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(others_rate, made, others, each)
            rates = samples_until_stalled(made, "stopped", timeout_s=300)
            slowing = writing.result()
        at_stall = made.volume("stopped")["last_sequence"]
        stuck = others_rate(made, others, each)
        stalled = made.volume("stopped")["last_sequence"] == at_stall and not any(rates[-20:])
        made.stores[1].thaw()
        wait_for([background])
        ended = background.returncode
        made.wait_destaged()
        for guest in connected:
            guest.close()
    peak = max(rates)
    between = sum(0.02 * peak < rate < 0.8 * peak for rate in rates)
    figure = (
        f"others {before / MIB:.0f} MiB/s before, {slowing / MIB:.0f} while it slows "
        f"({slowing / before:.2f}x), {stuck / MIB:.0f} when it has stalled "
        f"({stuck / before:.2f}x); the stopped one: {between} of {len(rates)} tenths of a second "
        f"between 2 and 80 % of its rate, {'stalled' if stalled else 'never stalled'}, then ended "
        f"with {ended}"
    )
    kept = min(slowing, stuck) >= OTHERS_KEEP * before
    return Outcome(shown, figure, kept and between >= 5 and stalled and ended == 0)


# ---- memory ----


def table_bytes(*arguments: object) -> int:
    """Resident bytes of one table with every entry in use."""
    command = [sys.executable, "bench/memory.py", *map(str, arguments)]
    code, text = run(command, "memory")
    if code:
        raise SystemExit(f"{' '.join(command)}: exit code {code}")
    return int(json.loads(text)["resident_bytes"])


@registry.line(
    "ram", "RAM: 16 bytes per slot and 4 per block in slots, at most 32 per block in the log"
)
def ram() -> Outcome:
    """Resident pages with every entry in use, several sizes, powers of two and others."""
    shown = f"{MAKE}ram"
    logs, slots = [], []
    passed = True
    for log_blocks in (1 << 20, 1_500_000, 2_621_440):
        per_block = table_bytes("index", log_blocks) / log_blocks
        passed &= per_block <= INDEX_BYTES_PER_BLOCK
        logs.append(f"{log_blocks * BLOCK_BYTES / GIB:.1f} GiB {per_block:.2f}")
    for slot_blocks, count in ((1, 1_000_000), (4, 262_145), (4, 700_000), (16, 100_000)):
        per_slot = table_bytes("slots", count, slot_blocks) / count
        budget = SLOT_BYTES + SLOT_BYTES_PER_BLOCK * slot_blocks
        passed &= per_slot <= budget
        slots.append(f"{4 * slot_blocks} KiB {per_slot:.1f} of {budget}")
    figure = f"log, bytes per block: {', '.join(logs)}; slots, bytes per slot with sketch, chain "
    return Outcome(shown, f"{figure}heads and window: {', '.join(slots)}", passed)


# ---- recovery ----


def write_until_ripe(made: Farm, guest: subprocess.Popen[bytes]) -> int:
    """Until 10 GiB are dirty and the next checkpoint is about due; the dirty bytes then.

    What a restart reads again is the log since the last checkpoint, so this is its worst moment.
    """
    checkpoints, since_bytes = -1, 0
    while True:
        if guest.poll() is not None:
            raise SystemExit(f"the guest ended with {guest.returncode} before {DIRTY_BYTES} bytes")
        status = made.status("volumes")
        engine, (volume,) = status["engine"], status["volumes"]
        if engine["checkpoints"] != checkpoints:
            checkpoints, since_bytes = engine["checkpoints"], engine["log_bytes"]
        replayed_bytes = engine["log_bytes"] - since_bytes
        if volume["dirty_bytes"] >= DIRTY_BYTES and replayed_bytes >= REPLAYED_BYTES:
            return int(volume["dirty_bytes"])
        time.sleep(0.02)


@registry.line(
    "recovery", "10 GiB of dirty log: under 10 s from kill -9 to the first served request"
)
def recovery() -> Outcome:
    """The store is frozen while a guest writes random blocks; the worst of three kills.

    The log is twice as large, because from half of its share on a guest is slowed.
    """
    shown = f"{MAKE}recovery"
    kills: list[tuple[float, float, int, int]] = []
    with farm("recovery", cache_size="40GiB", log_size="20GiB") as made:
        made.stores[0].start()
        made.create(["disk"], 20 * GIB)
        made.cache.start()
        for _ in range(KILLS):
            with spawn(made, "disk", 20 * GIB) as guest:
                try:
                    time.sleep(0.5)  # connected; what is destaged by then is little
                    made.stores[0].freeze()
                    dirty = write_until_ripe(made, guest)
                    made.cache.kill()  # while the guest writes
                finally:
                    guest.kill()
            made.stores[0].thaw()
            read_s, write_s = made.first_request("disk")
            kills.append((read_s, write_s, dirty, made.status()["engine"]["recovered_bytes"]))
    reads, writes, dirties, replays = zip(*kills, strict=True)
    figure = (
        f"worst of {KILLS}, {min(dirties) / GIB:.1f} GiB dirty or more: first read after "
        f"{max(reads):.1f} s, first write after {max(writes):.1f} s; of the log, up to "
        f"{max(replays) / MIB:.0f} MiB replayed"
    )
    passed = max(reads + writes) < RECOVERY_LIMIT_S and min(dirties) >= DIRTY_BYTES
    return Outcome(shown, figure, passed)


# ---- idle ----


def percent_of_core(pid: int) -> float:
    """CPU of a process over IDLE_S."""
    before, begin = cpu_s(pid), time.perf_counter()
    time.sleep(IDLE_S)
    return (cpu_s(pid) - before) / (time.perf_counter() - begin) * 100


@registry.line("idle", "100 volumes: under 1 % of a core, with guests connected and without")
def idle() -> Outcome:
    """Each guest has written and read, then does nothing."""
    shown = f"{MAKE}idle"
    with farm("idle", cache_size="2GiB", log_size="1GiB") as made:
        made.stores[0].start()
        names = [f"disk{number}" for number in range(100)]
        made.create(names, 64 * MIB)
        made.cache.start()
        guests: list[Client] = []
        for name in names:
            guests.append(connect_soon(made.nbd, name, timeout_s=60))
            guests[-1].write(0, bytes(BLOCK_BYTES - 1) + b"1")
            guests[-1].read(0, BLOCK_BYTES)
        made.wait_destaged()
        time.sleep(10)  # "dirty" is cleared, checkpoints are written
        connected = percent_of_core(made.cache.pid)
        for guest in guests:
            guest.close()
        time.sleep(10)  # volumes are given back
        alone = percent_of_core(made.cache.pid)
    figure = f"{connected:.2f} % of a core with 100 guests connected, {alone:.2f} % without"
    return Outcome(shown, figure, max(connected, alone) < IDLE_LIMIT_PERCENT)


# ---- soak ----


@registry.line(
    "soak", "eight hours of mixed load, or a fiftieth: memory, descriptors, threads level"
)
def soaked() -> Outcome:
    """MILLPOND_SOAK_S=28800 for all of it."""
    sizes = {"cache_size": "512MiB", "log_size": "128MiB", "page_cache": soak.PAGE_CACHE}
    with farm("soak", **sizes) as made:
        levels = soak.run(made)
    figure = "; ".join(str(level) for level in levels)
    return Outcome(f"MILLPOND_SOAK_S={soak.duration_s():.0f} {MAKE}soak", figure, all(levels))


# ---- what tests prove ----


@registry.line("protocol", "the whole protocol: structured replies, block status, many connections")
def protocol() -> Outcome:
    """Real clients, and byte streams of our own."""
    return tests("protocol", "tests/nbd", "tests/interop", "tests/hostile/test_transmission.py")


@registry.line("operator", "configuration, commands, exit codes")
def operator() -> Outcome:
    """As an operator types them."""
    return tests("operator", "tests/cli")


@registry.line("skeleton", "everything that the skeleton had to show")
def skeleton() -> Outcome:
    """make prove WHAT=skeleton."""
    code, text = run([sys.executable, "-m", "prove.skeleton"], "skeleton")
    passed = len(re.findall(r"^    pass after", text, re.MULTILINE))
    figure = f"{passed} lines pass, {code} short: .run/prove/skeleton.log"
    return Outcome("make prove WHAT=skeleton", figure, code == 0 and passed > 0)


if __name__ == "__main__":
    sys.exit(main(registry))
