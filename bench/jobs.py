"""What is measured: the jobs, who takes part in each, and what the issue asks of them.

A bound names a peer and the ratio that Millpond's rate must have to it. The first half of the
disk is read, the second half written.
"""

from dataclasses import dataclass

import fio

KIB, MIB = 1 << 10, 1 << 20
RAW_AIM = 0.9  # of the raw device: what lies beyond the bounds


@dataclass(frozen=True)
class Bench:
    """One job, how warm the caches are before it, and the bound on Millpond's figure."""

    job: fio.Job
    temperature: str  # cold, warm, any
    peer: str
    at_least: float


def benches(disk_bytes: int) -> list[Bench]:
    """Every job in the order of a run."""
    half = disk_bytes // 2

    def read(name: str, pattern: str, block_bytes: int, depth: int) -> fio.Job:
        return fio.Job(name, pattern, block_bytes, depth, 0, half)

    def write(name: str, pattern: str, block_bytes: int, depth: int, flush: bool) -> fio.Job:
        return fio.Job(name, pattern, block_bytes, depth, half, half, flush)

    proxy, qemu = "nbdkit proxy", "qemu-nbd"
    return [
        Bench(read("miss 4K depth 1", "randread", 4 * KIB, 1), "cold", proxy, 1.0),
        Bench(read("miss 4K depth 32", "randread", 4 * KIB, 32), "cold", proxy, 1.0),
        Bench(read("hit 4K depth 1", "randread", 4 * KIB, 1), "warm", qemu, 1.4),
        Bench(read("hit 4K depth 32", "randread", 4 * KIB, 32), "warm", qemu, 1.25),
        Bench(read("read 1M depth 4", "read", MIB, 4), "warm", qemu, 1.0),
        Bench(write("write+flush 4K depth 1", "randwrite", 4 * KIB, 1, True), "any", qemu, 1.3),
        Bench(write("write 4K depth 32", "randwrite", 4 * KIB, 32, False), "any", qemu, 2.0),
        Bench(write("write 1M depth 4", "write", MIB, 4, False), "any", qemu, 1.0),
    ]


def chosen(disk_bytes: int, only: list[str]) -> list[Bench]:
    """The jobs whose name holds any of `only`; all without one."""
    every = benches(disk_bytes)
    return [bench for bench in every if not only or any(part in bench.job.name for part in only)]


def takes_part(server: str, bench: Bench) -> bool:
    """The proxy is the peer of a miss, what has no second hop the peer of everything else."""
    if server in ("raw", "qemu-nbd", "millpond"):
        return True
    return (server == "nbdkit proxy") == (bench.temperature == "cold")
