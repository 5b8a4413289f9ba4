"""What a run of make bench shows and keeps: one table, a verdict per bound, JSON lines.

A ratio is the median of the ratios of pairs: in every turn each server did the same job within
a few seconds of the others, and only such neighbours are compared.
"""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

import fio
from jobs import MIB, RAW_AIM, Bench

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results.jsonl"
VERDICT = "{result:5} {job}: {figure:.2f} x {peer}, at least {at_least:.2f}"


@dataclass(frozen=True)
class Measured:
    """One run of one job over one server."""

    figures: fio.Figures
    cpu_s_per_million: float | None  # None: no server process
    device_bytes: int | None  # None: the file system has no block device of its own
    note: str


Runs = dict[tuple[str, str], list[Measured]]  # (job, server) -> one per turn


def median_run(runs: Sequence[Measured]) -> Measured:
    """The run whose rate is the (lower) median."""
    middle = statistics.median_low([run.figures.rate_per_s for run in runs])
    return next(run for run in runs if run.figures.rate_per_s == middle)


def ratio(runs: Runs, job: str, server: str, to: str) -> float | None:
    """Median over the turns of one server's rate as a multiple of another's."""
    if (job, server) not in runs or (job, to) not in runs:
        return None
    pairs = zip(runs[job, server], runs[job, to], strict=True)
    return statistics.median(
        one.figures.rate_per_s / other.figures.rate_per_s for one, other in pairs
    )


def rate_text(job: fio.Job, rate_per_s: float) -> str:
    """Requests per second, or MiB/s where a request is large."""
    if job.block_bytes >= MIB:
        return f"{rate_per_s * job.block_bytes / MIB:,.0f} MiB/s"
    return f"{rate_per_s:,.0f}/s"


def ratio_text(value: float | None) -> str:
    """A ratio in the table."""
    return "-" if value is None else f"{value:.2f}"


def row(bench: Bench, server: str, runs: Runs) -> list[str]:
    """One line of the table."""
    run = median_run(runs[bench.job.name, server])
    figures = run.figures
    ratios = [
        ratio_text(ratio(runs, bench.job.name, server, to))
        for to in (bench.peer, "qemu-nbd", "raw")
    ]
    written = amplification = "-"
    if run.device_bytes is not None:
        written = f"{run.device_bytes / MIB:,.0f}"
        if bench.job.writes:
            amplification = f"{run.device_bytes / figures.data_bytes:.2f}"
    cpu = "-" if run.cpu_s_per_million is None else f"{run.cpu_s_per_million:.1f}"
    latencies = [f"{value:,.0f}" for value in (figures.p50_us, figures.p99_us, figures.p999_us)]
    rate = rate_text(bench.job, figures.rate_per_s)
    return [
        bench.job.name,
        server,
        rate,
        *ratios,
        *latencies,
        cpu,
        written,
        amplification,
        run.note,
    ]


def show(benches: Sequence[Bench], runs: Runs) -> None:
    """One table, a row per job and server."""
    table = Table(title="the same work over Millpond and peers: median run, median pair")
    for column in ("job", "server", "rate", "x peer", "x qemu-nbd", "x raw", "p50 us", "p99 us"):
        table.add_column(column, justify="left" if column in ("job", "server") else "right")
    for column in ("p99.9 us", "CPU s/M", "device MiB", "x guest", "server says"):
        table.add_column(column, justify="left" if column == "server says" else "right")
    for bench in benches:
        names = [server for job, server in runs if job == bench.job.name]
        for name in names:
            table.add_row(*row(bench, name, runs), end_section=name == names[-1])
    Console(width=190, markup=False).print(table)


def verdicts(benches: Sequence[Bench], runs: Runs) -> list[dict[str, object]]:
    """Each bound with its figure; the aim beyond it is shown, not judged."""
    found: list[dict[str, object]] = []
    for bench in benches:
        figure = ratio(runs, bench.job.name, "millpond", bench.peer)
        if figure is None:
            continue
        values: dict[str, object] = {"job": bench.job.name, "peer": bench.peer}
        values |= {"figure": figure, "at_least": bench.at_least}
        values["result"] = "pass" if figure >= bench.at_least else "short"
        found.append(values)
        to_raw = ratio(runs, bench.job.name, "millpond", "raw")
        aim = "" if to_raw is None else f"; {to_raw:.2f} x raw, the aim is {RAW_AIM:.2f}"
        print(VERDICT.format(**values) + aim, flush=True)
    return found


def record(lines: Sequence[dict[str, object]], **facts: object) -> None:
    """Append JSON lines, each with the facts of the run."""
    commit = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    described = subprocess.run(commit, capture_output=True, text=True, check=False)
    facts |= {
        "commit": described.stdout.strip(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "kernel": platform.release().partition("-")[0],
        "processors": os.cpu_count(),
    }
    with RESULTS.open("a") as file:
        for line in lines:
            file.write(json.dumps(facts | line) + "\n")


def lines(benches: Sequence[Bench], runs: Runs) -> list[dict[str, object]]:
    """One JSON line per job and server: the median run, every turn's rate, the ratios."""
    found: list[dict[str, object]] = []
    for bench in benches:
        for job, server in runs:
            if job != bench.job.name:
                continue
            values = asdict(median_run(runs[job, server]))
            line: dict[str, object] = {"job": job, "server": server}
            line |= values.pop("figures") | values
            line["rates_per_s"] = [round(run.figures.rate_per_s) for run in runs[job, server]]
            for to in ("qemu-nbd", "nbdkit proxy", "raw"):
                value = ratio(runs, job, server, to)
                if value is not None and to != server:
                    line[f"x_{to.replace(' ', '_')}"] = round(value, 3)
            if server == "millpond":
                line |= {"bound_peer": bench.peer, "bound_at_least": bench.at_least}
            found.append(line)
    return found
