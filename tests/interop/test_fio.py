"""fio with its nbd engine: load at depth with every block verified."""

import json

import pytest

from interop.conftest import Run
from millpondprocess import Millpond

VERIFY = ("--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--randseed=7")


def fio(run: Run, millpond: Millpond, *arguments: str) -> "dict[str, float]":
    """Run one job; an error of any request or a failed verification is a failure."""
    common = ("--name=job", "--ioengine=nbd", f"--uri={millpond.uri}", "--output-format=json")
    done = run("fio", *common, *arguments)
    [job] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    assert job["error"] == 0, done.stdout + done.stderr
    return {kind: job[kind]["total_ios"] for kind in ("read", "write", "trim")}


def test_random_writes_of_4_kib_at_depth_32_verify(millpond: Millpond, run: Run) -> None:
    size = ("--size=64M", "--rw=randwrite", "--bs=4k", "--iodepth=32")
    count = fio(run, millpond, *size, *VERIFY)
    assert count["write"] == count["read"] == 64 << 20 >> 12


def test_mixed_sizes_reads_and_writes_verify(millpond: Millpond, run: Run) -> None:
    count = fio(
        run,
        millpond,
        *("--size=96M", "--offset=128M", "--rw=randrw", "--iodepth=32", "--fsync=64"),
        *("--bssplit=512/10:4k/50:12k/20:64k/15:1m/5",),
        *VERIFY,
    )
    assert count["write"] > 1000


def test_trim_then_write_at_random_verifies(millpond: Millpond, run: Run) -> None:
    count = fio(
        run,
        millpond,
        # No offset: with one, fio 3.33 trims and then writes nothing.
        *("--size=32M", "--rw=randtrimwrite", "--bs=16k", "--iodepth=32"),
        *VERIFY,
    )
    assert count["trim"] == count["write"] == count["read"] == 32 << 20 >> 14


@pytest.mark.parametrize("jobs", [4])
def test_several_connections_at_once_verify(millpond: Millpond, run: Run, jobs: int) -> None:
    fio(
        run,
        millpond,
        *("--size=16M", "--offset=512M", "--offset_increment=16M", "--rw=randwrite"),
        *("--bs=4k", "--iodepth=8", f"--numjobs={jobs}", "--group_reporting"),
        *VERIFY,
    )
