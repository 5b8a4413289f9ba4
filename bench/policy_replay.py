"""Replay block traces through the read cache's table and print hit ratios beside a plain LRU.

    python bench/policy_replay.py FOLDER [--slot-blocks 1] [--only OLTP] [--json results.jsonl]

Every trace of the folder that has a known format is expanded to 4 KiB accesses (absolute
alignment; reads and writes both count and both allocate; no warm-up is left out).  Sizes are
fractions of the trace's unique blocks.  The C table is driven through the same calls as the engine
makes: touch, find, and on a miss reserve, install, unpin.  writes: slot writes per access, what the
SSD pays for it.
"""

import argparse
import json
import subprocess
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from millpond.native import ffi, lib

FRACTIONS = (0.01, 0.05, 0.10, 0.20, 0.40)
ORIGIN = 1
REUSE_MIN = 0.05  # a trace whose blocks hardly come again says nothing about policies
MIN_BLOCKS = 2000  # nor does one that is only a parser's sample
Blocks = npt.NDArray[np.int64]

# Mean over the five traces of the tuning set that have reuse, at 1, 5, 10, 20 and 40 % (libCacheSim
# and a simulator of our own, 2026-11).  For other folders they mean nothing and are not printed.
YARDSTICK_TRACES = {"cloudPhysicsIO", "OLTP", "P2", "P3", "DTRS1K"}
YARDSTICK = {
    "CLOCK-TinyLFU 10%": (0.1661, 0.2861, 0.3747, 0.4797, 0.5980),
    "W-TinyLFU 1%": (0.1568, 0.2902, 0.3704, 0.4600, 0.5829),
    "S3-FIFO": (0.1779, 0.2942, 0.3707, 0.4684, 0.5617),
    "ARC": (0.1699, 0.2724, 0.3496, 0.4512, 0.5643),
    "LRU": (0.1616, 0.2418, 0.3100, 0.4341, 0.5586),
    "Belady": (0.2623, 0.4141, 0.5135, 0.6099, 0.6834),
}


@dataclass(frozen=True)
class Result:
    """One trace at one size."""

    trace: str
    slot_blocks: int
    fraction: float
    slots: int
    hits: float
    lru_hits: float
    writes: float


def expand(first: Blocks, last: Blocks) -> Blocks:
    """Requests [first, last] in blocks to one entry per block touched."""
    counts = last - first + 1
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    blocks: Blocks = np.repeat(first, counts) + np.arange(int(counts.sum())) - starts
    return blocks


def from_sectors(sectors: Blocks, counts: Blocks) -> Blocks:
    """512-byte sectors to 4 KiB blocks."""
    keep = counts > 0
    sectors, counts = sectors[keep], counts[keep]
    return expand(sectors // 8, (sectors + counts - 1) // 8)


def read_vscsi(path: Path) -> Blocks:
    """VMware records of 32 bytes."""
    fields = [("n", "<u4"), ("length", "<u4"), ("sg", "<u4"), ("cmd", "<u2"), ("v", "<u2")]
    records = np.fromfile(path, dtype=[*fields, ("sector", "<u8"), ("time", "<u8")])
    start_bytes = records["sector"].astype(np.int64) * 512
    length_bytes = records["length"].astype(np.int64)
    keep = length_bytes > 0
    last_bytes = start_bytes + length_bytes - 1
    return expand(start_bytes[keep] // 4096, last_bytes[keep] // 4096)


def read_lis(path: Path) -> Blocks:
    """ARC's traces: first, count, 0, number.  OLTP counts pages, the workstations count sectors."""
    text = path.read_bytes()
    if path.suffix == ".zst":
        text = subprocess.run(["zstd", "-dcq", path], capture_output=True, check=True).stdout
    table = np.array(text.split(), dtype=np.int64).reshape(-1, 4)
    if path.name.startswith("OLTP"):
        return expand(table[:, 0], table[:, 0] + table[:, 1] - 1)
    return from_sectors(table[:, 0], table[:, 1])


def read_columns(path: Path) -> Blocks:
    """Text: DiskSim (time, device, sector, count, op), FIU, or blkparse (queue events)."""
    pairs = []
    for line in path.read_text().splitlines():
        words = line.split()
        if len(words) == 5:
            pairs.append((int(words[2]), int(words[3])))
        elif len(words) >= 9 and words[1].isdigit() and words[5] in "RW":
            pairs.append((int(words[3]), int(words[4])))
        elif len(words) >= 10 and words[5] == "Q" and words[8] == "+":
            pairs.append((int(words[7]), int(words[9])))
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return from_sectors(table[:, 0], table[:, 1])


READERS = {
    ".vscsi": read_vscsi,
    ".lis": read_lis,
    ".lis.zst": read_lis,
    ".trace": read_columns,
    ".blkparse": read_columns,
}


def traces(folder: Path, only: str | None) -> Iterator[tuple[str, Blocks]]:
    """Name and accesses of every trace of the folder that is worth replaying."""
    for path in sorted(folder.iterdir()):
        reader = READERS.get("".join(path.suffixes))
        if reader is None or (only is not None and not path.name.startswith(only)):
            continue
        name, blocks = path.name.split(".")[0], reader(path)
        unique = len(np.unique(blocks))
        if unique < MIN_BLOCKS or 1 - unique / len(blocks) < REUSE_MIN:
            print(f"{name}: {len(blocks)} accesses, {unique} unique: too small, skipped")
            continue
        print(f"{name}: {len(blocks)} accesses, {unique} unique", flush=True)
        yield name, blocks


def replay(blocks: list[int], slots: int, slot_blocks: int) -> tuple[float, float]:
    """Hit ratio and slot writes per access of the C table."""
    table = ffi.gc(lib.mp_slots_new(slots, slot_blocks, 1), lib.mp_slots_free)
    checksum, restored = ffi.new("uint32_t *"), ffi.new("int *")
    touch, find, reserve = lib.mp_slots_touch, lib.mp_slots_find, lib.mp_slots_reserve
    hits = writes = 0
    for block in blocks:
        touch(table, ORIGIN, block)
        if find(table, ORIGIN, block, checksum, restored) >= 0:
            hits += 1
        elif (slot := reserve(table, ORIGIN, block)) >= 0:
            lib.mp_slots_install(table, slot, block, 1)
            lib.mp_slots_unpin(table, slot)
            writes += 1
    return hits / len(blocks), writes / len(blocks)


def replay_lru(blocks: list[int], capacity_blocks: int) -> float:
    """Hit ratio of a plain LRU of 4 KiB blocks."""
    order: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for block in blocks:
        if block in order:
            hits += 1
            order.move_to_end(block)
            continue
        if len(order) >= capacity_blocks:
            order.popitem(last=False)
        order[block] = None
    return hits / len(blocks)


def measure(name: str, accesses: Blocks, slot_blocks: int) -> Iterator[Result]:
    """One trace at every size."""
    unique = len(np.unique(accesses))
    blocks: list[int] = accesses.tolist()
    for fraction in FRACTIONS:
        capacity_blocks = int(unique * fraction)
        slots = max(1, capacity_blocks // slot_blocks)
        hits, writes = replay(blocks, slots, slot_blocks)
        lru_hits = replay_lru(blocks, capacity_blocks)
        yield Result(name, slot_blocks, fraction, slots, hits, lru_hits, writes)


def row(label: str, values: list[float] | tuple[float, ...]) -> str:
    """One line of the table."""
    return f"  {label:<20}" + "".join(f"{value:9.4f}" for value in values)


def report(label: str, results: list[list[Result]]) -> None:
    """Means over traces, per size (one trace: the trace itself)."""
    columns = list(zip(*results, strict=True))
    means = [
        [sum(getattr(r, f) for r in c) / len(c) for c in columns]
        for f in ("hits", "lru_hits", "writes")
    ]
    print(f"{label:<22}" + "".join(f"{fraction:>8.0%} " for fraction in FRACTIONS))
    print(row("millpond", means[0]))
    print(row("LRU", means[1]))
    gains = [ours - lru for ours, lru in zip(means[0], means[1], strict=True)]
    print(row("gain", gains))
    print(row("writes", means[2]), flush=True)
    print(f"  average gain over LRU {sum(gains) / len(gains):+.4f}")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--slot-blocks", type=int, default=1, choices=(1, 2, 4, 8, 16))
    parser.add_argument("--only", help="traces whose file name starts with this")
    parser.add_argument("--json", type=Path, help="append one JSON line per trace and size")
    arguments = parser.parse_args()
    results: dict[str, list[Result]] = {}
    for name, accesses in traces(arguments.folder, arguments.only):
        results[name] = list(measure(name, accesses, arguments.slot_blocks))
        report(name, [results[name]])
    if arguments.json is not None:
        with arguments.json.open("a") as out:
            for result in (r for group in results.values() for r in group):
                out.write(json.dumps(asdict(result)) + "\n")
    if not results:
        raise SystemExit(f"{arguments.folder}: no trace of a known format ({', '.join(READERS)})")
    report(f"MEAN OF {len(results)}", list(results.values()))
    if set(results) >= YARDSTICK_TRACES and arguments.slot_blocks == 1:
        report("MEAN OF THE YARDSTICK", [results[name] for name in sorted(YARDSTICK_TRACES)])
        for policy, values in YARDSTICK.items():
            print(row(policy, values))


if __name__ == "__main__":
    main()
