"""make bench: the same work, in the same run, in turns, over Millpond and its peers.

Per job, every server runs it once, then every server again, five times over, so that the two
sides of a ratio are seconds apart and a slow minute of the machine hits both; the ratio is the
median over these pairs. Bounds are printed beside the figures. See bench/README.md.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import fio
import report
import servers
from jobs import MIB, Bench, benches, chosen, takes_part
from report import Measured, Runs

WORK = report.ROOT / ".run" / "bench"
SECTOR_BYTES = 512  # of /sys/dev/block/*/stat, whatever the device's own sector is


def device_written_bytes(directory: Path) -> int | None:
    """Bytes written so far to the block device below directory."""
    device = os.stat(directory).st_dev
    stat = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    return int(stat.read_text().split()[6]) * SECTOR_BYTES if stat.exists() else None


def measure(target: servers.Target, job: fio.Job, runtime_s: float) -> Measured:
    """Run one job; device bytes include what it left behind: dirty pages, destage."""
    target.settle()
    written_before = device_written_bytes(target.directory)
    snapshot = target.snapshot()
    cpu_before = sum(map(servers.cpu_s, target.pids()))
    figures = fio.run(job, target.reach(), runtime_s=runtime_s)
    cpu = sum(map(servers.cpu_s, target.pids())) - cpu_before
    note = "" if job.writes else target.note(snapshot, target.snapshot())
    target.settle()
    written_after = device_written_bytes(target.directory)
    written = None
    if written_before is not None and written_after is not None:
        written = written_after - written_before
    per_million = cpu / figures.requests * 1e6 if target.pids() else None
    return Measured(figures, per_million, written, note)


def play(bench: Bench, targets: Sequence[servers.Target], turns: int, runtime_s: float) -> Runs:
    """One job over every target that takes part, in turns; every second turn backwards."""
    runs: Runs = {}
    part = [target for target in targets if takes_part(target.name, bench)]
    for target in part:
        runs[bench.job.name, target.name] = []
    for turn in range(turns):
        for target in part if turn % 2 == 0 else reversed(part):
            if bench.temperature == "cold":
                target.make_cold()
            elif bench.temperature == "warm":
                target.make_warm(bench.job)
            measured = measure(target, bench.job, runtime_s)
            runs[bench.job.name, target.name].append(measured)
            rate = report.rate_text(bench.job, measured.figures.rate_per_s)
            print(f"  {bench.job.name:24} {target.name:14} {rate:>14} {measured.note}", flush=True)
    return runs


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make bench ARGS=")
    parser.add_argument("--quick", action="store_true", help="one short turn on a small disk")
    parser.add_argument("--only", default="", help="jobs whose name holds one of these: hit,1M")
    parser.add_argument("--servers", default="", help="only these, by name: raw,qemu-nbd,millpond")
    parser.add_argument("--turns", type=int, help="how often each server runs each job (5)")
    parser.add_argument("--runtime", type=float, help="seconds per run (2)")
    parser.add_argument("--disk", type=int, help="disk size in MiB (2048)")
    parser.add_argument("--record", action="store_true", help="append to bench/results.jsonl")
    parser.add_argument("--list", action="store_true", help="print the names of jobs and servers")
    options = parser.parse_args()
    defaults = (1, 1.0, 512) if options.quick else (5, 2.0, 2048)
    for name, value in zip(("turns", "runtime", "disk"), defaults, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.only = [part for part in options.only.split(",") if part]
    known = {kind.name.replace(" ", "-"): kind.name for kind in servers.TARGETS}
    options.servers = [part for part in options.servers.split(",") if part] or [*known]
    if unknown := set(options.servers) - set(known):
        parser.error(f"no server {', '.join(sorted(unknown))}; servers: {', '.join(known)}")
    options.servers = [known[part] for part in options.servers]
    if not chosen(options.disk * MIB, options.only):
        names = ", ".join(bench.job.name for bench in benches(options.disk * MIB))
        parser.error(f"no job holds any of {', '.join(options.only)}; jobs: {names}")
    return options


def start(stack: ExitStack, names: Sequence[str], disk_bytes: int) -> list[servers.Target]:
    """Start and fill the servers."""
    targets = []
    for kind in servers.TARGETS:
        if kind.name in names:
            target = stack.enter_context(closing(kind(WORK, disk_bytes)))
            print(f"start and fill {target.name}", flush=True)
            target.start()
            targets.append(target)
    return targets


def main() -> int:
    """Start and fill all servers, play every job, print the table and the verdicts."""
    options = parse()
    disk_bytes = options.disk * MIB
    jobs = chosen(disk_bytes, options.only)
    if options.list:
        print("jobs:    " + ", ".join(bench.job.name for bench in jobs))
        print("servers: " + ", ".join(options.servers))
        return 0
    needed = [name for name in options.servers if any(takes_part(name, bench) for bench in jobs)]
    shutil.rmtree(WORK, ignore_errors=True)
    runs: Runs = {}
    with ExitStack() as stack:
        targets = start(stack, needed, disk_bytes)
        for bench in jobs:
            runs |= play(bench, targets, options.turns, options.runtime)
    shutil.rmtree(WORK)
    report.show(jobs, runs)
    report.verdicts(jobs, runs)
    if options.record:
        facts = {"turns": options.turns, "runtime_s": options.runtime, "disk_mib": options.disk}
        report.record(report.lines(jobs, runs), bench="peers", **facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
