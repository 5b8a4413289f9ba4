"""fio: one job against one way to reach the bytes, and the figures of it.

Happy path: run() returns the rate and the latencies of one job of a few seconds. Failure
modes: fio fails or reports an I/O error: SystemExit with its last lines, because a table
with a hole in it is no comparison.
"""

import json
import subprocess
from dataclasses import dataclass
from typing import Any

PERCENTILES = ("50.000000", "99.000000", "99.900000")


@dataclass(frozen=True)
class Job:
    """What the guest does: a pattern over a region of the disk."""

    name: str
    pattern: str  # fio's rw
    block_bytes: int
    depth: int
    offset_bytes: int
    region_bytes: int
    flush: bool = False  # a flush after every write

    @property
    def writes(self) -> bool:
        """Whether it changes the disk."""
        return "write" in self.pattern


@dataclass(frozen=True)
class Figures:
    """What one run of a job measured, on the client's side."""

    rate_per_s: float
    requests: int
    data_bytes: int
    p50_us: float
    p99_us: float
    p999_us: float


def percentiles_us(section: dict[str, Any]) -> list[float]:
    """p50, p99 and p99.9 of a latency section, in microseconds."""
    found = section.get("percentile", {})
    return [found.get(name, 0) / 1000 for name in PERCENTILES]


def arguments(job: Job, *, runtime_s: float | None) -> list[str]:
    """fio's options for a job; without a runtime the region is covered once."""
    command = ["fio", f"--name={job.name}", f"--rw={job.pattern}", f"--bs={job.block_bytes}"]
    command += [f"--iodepth={job.depth}", f"--offset={job.offset_bytes}"]
    command += [f"--size={job.region_bytes}", "--output-format=json", "--group_reporting"]
    command += ["--randrepeat=0", "--refill_buffers", "--norandommap=0"]
    if runtime_s is not None:
        command += ["--time_based", f"--runtime={runtime_s}"]
    if job.flush:
        command += ["--fsync=1"]
    return command


def _result(job: Job, reach: list[str], runtime_s: float | None) -> dict[str, Any]:
    command = arguments(job, runtime_s=runtime_s) + reach
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    start = done.stdout.find("{")
    if done.returncode or start < 0:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    (result,) = json.loads(done.stdout[start:])["jobs"]
    if result["error"]:
        raise SystemExit(f"{' '.join(command)}: I/O error {result['error']}")
    assert isinstance(result, dict)
    return result


def run_mixed(job: Job, reach: list[str], *, runtime_s: float) -> tuple[Figures, Figures]:
    """The same for a job that does both: its reads, its writes."""
    result = _result(job, reach, runtime_s)
    reads, writes = (
        Figures(side["iops"], side["total_ios"], side["io_bytes"], *percentiles_us(side["clat_ns"]))
        for side in (result["read"], result["write"])
    )
    return reads, writes


def run(job: Job, reach: list[str], *, runtime_s: float | None = None) -> Figures:
    """Run job over `reach` (engine and address) and read its figures."""
    result = _result(job, reach, runtime_s)
    side = result["write" if job.writes else "read"]
    latencies = percentiles_us(side["clat_ns"])
    if job.flush:
        # The guest waits for both: the write, then its flush.
        flushes = percentiles_us(result["sync"]["lat_ns"])
        latencies = [write + flush for write, flush in zip(latencies, flushes, strict=True)]
    return Figures(side["iops"], side["total_ios"], side["io_bytes"], *latencies)
