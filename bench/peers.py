"""make bench: the same work, in the same run, in turns, over Millpond and its peers.

Every round runs every job over every target before the next round starts, so that a slow
minute of the machine hits all alike; the table shows the median round. One JSON line per
job and target goes to bench/results.jsonl. See bench/README.md for what each job means.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

import fio
import servers

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results.jsonl"
KIB, MIB = 1 << 10, 1 << 20
SECTOR_BYTES = 512  # of /sys/dev/block/*/stat, whatever the device's own sector is


@dataclass(frozen=True)
class Measured:
    """One run of one job over one target."""

    figures: fio.Figures
    cpu_s_per_million: float | None  # None: no server process
    device_bytes: int | None  # None: the file system has no block device of its own
    note: str


def jobs(disk_bytes: int) -> list[tuple[str, fio.Job]]:
    """(temperature, job) in the order of a round; the first half is read, the second written."""
    half = disk_bytes // 2
    return [
        ("cold", fio.Job("miss 4K depth 1", "randread", 4 * KIB, 1, 0, half)),
        ("cold", fio.Job("miss 4K depth 32", "randread", 4 * KIB, 32, 0, half)),
        ("warm", fio.Job("hit 4K depth 1", "randread", 4 * KIB, 1, 0, half)),
        ("warm", fio.Job("hit 4K depth 32", "randread", 4 * KIB, 32, 0, half)),
        ("warm", fio.Job("read 1M depth 4", "read", MIB, 4, 0, half)),
        ("any", fio.Job("write+flush 4K depth 1", "randwrite", 4 * KIB, 1, half, half, flush=True)),
        ("any", fio.Job("write 4K depth 32", "randwrite", 4 * KIB, 32, half, half)),
        ("any", fio.Job("write 1M depth 4", "write", MIB, 4, half, half)),
    ]


def takes_part(target: servers.Target, temperature: str) -> bool:
    """The proxy is the peer of a miss, what has no second hop the peer of everything else."""
    if target.name in ("raw", "qemu-nbd", "millpond"):
        return True
    return (target.name == "nbdkit proxy") == (temperature == "cold")


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


def play_round(
    targets: Sequence[servers.Target], disk_bytes: int, runtime_s: float
) -> dict[tuple[str, str], Measured]:
    """Every job over every target, once."""
    results = {}
    before = ""
    for temperature, job in jobs(disk_bytes):
        for target in targets:
            if not takes_part(target, temperature):
                continue
            if temperature == "cold":
                target.make_cold()
            elif temperature == "warm" and before != "warm":
                target.make_warm(job)
            measured = measure(target, job, runtime_s)
            results[job.name, target.name] = measured
            rate = measured.figures.rate_per_s
            print(f"  {job.name:24} {target.name:14} {rate:10.0f}/s {measured.note}", flush=True)
        before = temperature
    return results


def median_round(runs: Sequence[Measured]) -> Measured:
    """The run whose rate is the (lower) median."""
    middle = statistics.median_low([run.figures.rate_per_s for run in runs])
    return next(run for run in runs if run.figures.rate_per_s == middle)


def rate_text(job: fio.Job, rate_per_s: float) -> str:
    """Requests per second, or MiB/s where a request is large."""
    if job.block_bytes >= MIB:
        return f"{rate_per_s * job.block_bytes / MIB:,.0f} MiB/s"
    return f"{rate_per_s:,.0f}/s"


def ratio(table_of: dict[tuple[str, str], Measured], job: str, name: str, to: str) -> str:
    """One server's rate as a multiple of another's in the same job."""
    if (job, to) not in table_of:
        return "-"
    rates = [table_of[job, server].figures.rate_per_s for server in (name, to)]
    return f"{rates[0] / rates[1]:.2f}"


def show(table_of: dict[tuple[str, str], Measured], disk_bytes: int) -> None:
    """One table, a row per job and target, with the ratios to qemu-nbd and to the raw file."""
    table = Table(title="the same work over Millpond and peers, median round")
    for column in ("job", "server", "rate", "x qemu-nbd", "x raw", "p50 us", "p99 us"):
        table.add_column(column, justify="left" if column in ("job", "server") else "right")
    for column in ("p99.9 us", "CPU s/M", "device MiB", "x guest", "server says"):
        table.add_column(column, justify="left" if column == "server says" else "right")
    for _, job in jobs(disk_bytes):
        names = [target for name, target in table_of if name == job.name]
        for name in names:
            run = table_of[job.name, name]
            figures = run.figures
            ratios = [ratio(table_of, job.name, name, to) for to in ("qemu-nbd", "raw")]
            written = amplification = "-"
            if run.device_bytes is not None:
                written = f"{run.device_bytes / MIB:,.0f}"
                if job.writes:
                    amplification = f"{run.device_bytes / figures.data_bytes:.2f}"
            cpu = "-" if run.cpu_s_per_million is None else f"{run.cpu_s_per_million:.1f}"
            latencies = [f"{v:,.0f}" for v in (figures.p50_us, figures.p99_us, figures.p999_us)]
            row = [job.name, name, rate_text(job, figures.rate_per_s), *ratios, *latencies]
            table.add_row(
                *row, cpu, written, amplification, run.note, end_section=name == names[-1]
            )
    Console(width=190, markup=False).print(table)


def record(table_of: dict[tuple[str, str], Measured], **facts: object) -> None:
    """Append one JSON line per job and target."""
    commit = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    facts |= {
        "bench": "peers",
        "commit": subprocess.run(
            commit, capture_output=True, text=True, check=False
        ).stdout.strip(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "kernel": platform.release().partition("-")[0],
        "processors": os.cpu_count(),
    }
    with RESULTS.open("a") as file:
        for (job, target), run in table_of.items():
            values = asdict(run)
            line = facts | {"job": job, "server": target} | values.pop("figures") | values
            file.write(json.dumps(line) + "\n")


def main() -> None:
    """Start and fill all targets, play the rounds, print and record the table."""
    parser = argparse.ArgumentParser(prog="make bench ARGS=")
    parser.add_argument("--quick", action="store_true", help="one short round on a small disk")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runtime", type=float, default=3.0, help="seconds per job")
    parser.add_argument("--disk", type=int, default=2048, help="disk size in MiB")
    parser.add_argument("--without", action="append", default=[], help="leave out a server")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.runtime, options.disk = 1, 1.0, 512
    disk_bytes = options.disk * MIB
    work = ROOT / ".run" / "bench"
    shutil.rmtree(work, ignore_errors=True)
    runs: dict[tuple[str, str], list[Measured]] = defaultdict(list)
    with ExitStack() as stack:
        targets = []
        for kind in servers.TARGETS:
            if kind.name in options.without:
                continue
            target = stack.enter_context(closing(kind(work, disk_bytes)))
            print(f"start and fill {target.name}", flush=True)
            target.start()
            targets.append(target)
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", flush=True)
            # Each round starts with another target, so that none is always first.
            turn = targets[number:] + targets[:number]
            for key, measured in play_round(turn, disk_bytes, options.runtime).items():
                runs[key].append(measured)
    shutil.rmtree(work)
    table_of = {key: median_round(values) for key, values in runs.items()}
    show(table_of, disk_bytes)
    record(table_of, rounds=options.rounds, runtime_s=options.runtime, disk_mib=options.disk)


if __name__ == "__main__":
    main()
