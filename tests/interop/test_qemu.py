"""qemu's NBD client, as a guest's disk uses it: qemu-img and qemu-io."""

import json
import re
from pathlib import Path

from interop.conftest import SIZE_BYTES, Run
from millpondprocess import Millpond


def qemu_io(run: Run, millpond: Millpond, *commands: str) -> str:
    """Run qemu-io's commands over one connection; a failed pattern is printed, not an exit code."""
    arguments = [word for command in commands for word in ("-c", command)]
    done = run("qemu-io", "-f", "raw", *arguments, millpond.uri)
    said = done.stdout + done.stderr
    assert not re.search("failed|error", said, re.IGNORECASE), said
    return said


def test_info(millpond: Millpond, run: Run) -> None:
    info = json.loads(run("qemu-img", "info", "--output=json", millpond.uri).stdout)
    assert info["virtual-size"] == SIZE_BYTES


def test_convert_in_and_out_compares_equal(
    millpond: Millpond, run: Run, image: Path, tmp_path: Path
) -> None:
    raw = ("-f", "raw", "-O", "raw")
    run("qemu-img", "convert", "-n", *raw, "-W", "-m", "16", str(image), millpond.uri)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), millpond.uri)
    out = tmp_path / "out.raw"
    run("qemu-img", "convert", *raw, millpond.uri, str(out))
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), str(out))
    out.unlink()


def test_compare_sees_one_changed_byte(millpond: Millpond, run: Run, image: Path) -> None:
    raw = ("-f", "raw", "-F", "raw")
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(image), millpond.uri)
    qemu_io(run, millpond, f"write -P 0x22 {SIZE_BYTES - 1} 1")
    run("qemu-img", "compare", *raw, str(image), millpond.uri, code=1)
    qemu_io(run, millpond, f"write -P 0x21 {SIZE_BYTES - 1} 1")
    run("qemu-img", "compare", *raw, str(image), millpond.uri)


def test_patterns_at_any_alignment(millpond: Millpond, run: Run) -> None:
    qemu_io(
        run,
        millpond,
        "write -P 0xa5 0 64k",
        "write -P 0x11 1 1",
        "write -P 0x22 4095 2",
        "write -P 0x33 8191 4098",
        "write -P 0x44 16383 1",
        "write -P 0x55 20481 12287",
        "read -P 0xa5 0 1",
        "read -P 0x11 1 1",
        "read -P 0xa5 2 4093",
        "read -P 0x22 4095 2",
        "read -P 0xa5 4097 4094",
        "read -P 0x33 8191 4098",
        "read -P 0xa5 12289 4094",
        "read -P 0x44 16383 1",
        "read -P 0xa5 16384 4097",
        "read -P 0x55 20481 12287",
        "read -P 0xa5 32768 32768",
    )


def test_patterns_survive_a_new_connection(millpond: Millpond, run: Run) -> None:
    qemu_io(run, millpond, "write -P 0x77 3M 1M", "write -P 0x78 3145733 100000")
    qemu_io(
        run,
        millpond,
        "read -P 0x77 3M 5",
        "read -P 0x78 3145733 100000",
        "read -P 0x77 3245733 948571",
    )


def test_write_zeroes(millpond: Millpond, run: Run) -> None:
    qemu_io(
        run,
        millpond,
        "write -P 0xee 1M 1M",
        "write -z 1052673 200001",  # neither end on a block
        "read -P 0xee 1M 4097",
        "read -P 0 1052673 200001",
        "read -P 0xee 1252674 844478",
        "write -z -u 1M 1M",  # may punch a hole
        "read -P 0 1M 1M",
    )


def test_discard_reads_back_as_zeroes(millpond: Millpond, run: Run) -> None:
    qemu_io(
        run,
        millpond,
        "write -P 0xdd 4M 4M",
        "discard 5M 1M",
        "read -P 0xdd 4M 1M",
        "read -P 0 5M 1M",
        "read -P 0xdd 6M 2M",
        "discard 6291457 8193",
        "read -P 0xdd 6M 1",
        "read -P 0 6291457 8193",
        "read -P 0xdd 6299650 4096",
    )


def test_forced_unit_access_and_flush(millpond: Millpond, run: Run) -> None:
    qemu_io(
        run,
        millpond,
        "write -f -P 0x01 4k 4k",
        "write -f -P 0x02 6k 100",
        "write -z -f 7k 1k",
        "flush",
        "read -P 0x01 4k 2k",
        "read -P 0x02 6k 100",
        "read -P 0 7k 1k",
    )


def test_requests_in_flight_together(millpond: Millpond, run: Run) -> None:
    offsets = [number * 131 * 512 for number in range(16)]
    said = qemu_io(
        run,
        millpond,
        *[f"aio_write -P {number + 1} {offset} 64k" for number, offset in enumerate(offsets)],
        "aio_flush",
        *[f"aio_read -P {number + 1} {offset} 64k" for number, offset in enumerate(offsets)],
        "aio_flush",
    )
    assert said.count("wrote 65536/65536") == 16
    assert said.count("read 65536/65536") == 16


def test_vectored_and_large_requests(millpond: Millpond, run: Run) -> None:
    qemu_io(
        run,
        millpond,
        "writev -P 0x61 100M 512 4096 8192 1536",
        "readv -P 0x61 100M 4096 8192 2048",
        "write -P 0x62 200M 32M",
        "read -P 0x62 200M 32M",
        f"write -P 0x63 {SIZE_BYTES - 4097} 4097",
        f"read -P 0x63 {SIZE_BYTES - 4097} 4097",
    )
