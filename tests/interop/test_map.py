"""Sparseness as clients see it: maps, sparse copies, metadata from the log and from the store."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import nbdclient
from interop.conftest import SIZE_BYTES, Run
from millpondprocess import Millpond

MIB = 1 << 20
NBDSH_PYTHON = "/usr/bin/python3"  # the system's, which has libnbd's binding


def data_of(run: Run, uri: str) -> list[tuple[int, int]]:
    """Start and end of what nbdinfo --map calls data; the rest must be holes of zeroes."""
    extents = json.loads(run("nbdinfo", "--map", "--json", uri).stdout)
    assert sum(extent["length"] for extent in extents) == SIZE_BYTES
    assert {(extent["type"], extent["description"]) for extent in extents} <= {
        (0, "data"),
        (3, "hole,zero"),
    }
    return [
        (extent["offset"], extent["offset"] + extent["length"])
        for extent in extents
        if extent["type"] == 0
    ]


def qemu_data_of(run: Run, uri: str) -> list[tuple[int, int]]:
    """The same as qemu-img map says."""
    extents = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", uri).stdout)
    assert sum(extent["length"] for extent in extents) == SIZE_BYTES
    return [
        (extent["start"], extent["start"] + extent["length"])
        for extent in extents
        if extent["data"] and not extent["zero"]
    ]


def test_map_is_right_from_the_first_write_on(millpond: Millpond, run: Run) -> None:
    with nbdclient.connect(millpond.uri) as client:
        client.trim(0, SIZE_BYTES)
        assert data_of(run, millpond.uri) == []
        client.write(5 * MIB, b"x" * MIB)
        client.write(500 * MIB + 1, b"y")
        client.trim(5 * MIB + 8192, 4096)
        expected = [
            (5 * MIB, 5 * MIB + 8192),
            (5 * MIB + 12288, 6 * MIB),
            (500 * MIB, 500 * MIB + 4096),
        ]
        for _ in range(3):  # in the log, on its way, at the store: always the same
            assert data_of(run, millpond.uri) == expected
            assert qemu_data_of(run, millpond.uri) == expected
            client.flush()


def test_copies_of_a_sparse_volume_are_sparse_and_right(
    millpond: Millpond, run: Run, image: Path, tmp_path: Path
) -> None:
    with nbdclient.connect(millpond.uri) as client:
        client.trim(0, SIZE_BYTES)
    run("nbdcopy", "--destination-is-zero", str(image), millpond.uri)
    for number, copy in enumerate((("nbdcopy",), ("qemu-img", "convert", "-O", "raw"))):
        out = tmp_path / f"{number}.raw"
        run(*copy, millpond.uri, str(out))
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), str(out))
        stored_bytes = os.stat(out).st_blocks * 512
        assert stored_bytes < 1.1 * os.stat(image).st_blocks * 512, "holes were copied as zeroes"
        out.unlink()


def nbdsh(run: Run, uri: str, *lines: str) -> str:
    """Lines of Python with a connected libnbd handle h; base:allocation is asked for."""
    if shutil.which("nbdsh") is None:
        raise AssertionError("nbdsh is missing: install the package python3-libnbd")
    prelude = [
        "import nbd",
        "h = nbd.NBD()",
        "h.add_meta_context('base:allocation')",
        f"h.connect_uri({uri!r})",
    ]
    done = subprocess.run(
        [NBDSH_PYTHON, "-c", "\n".join([*prelude, *lines])],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_command_and_flag_of_libnbd(millpond: Millpond, run: Run) -> None:
    said = nbdsh(
        run,
        millpond.uri,
        "h.pwrite(b'x' * 65536, 0, nbd.CMD_FLAG_FUA)",
        "h.cache(65536, 0)",
        "h.zero(8192, 4096, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)",
        "h.zero(4096, 16384, nbd.CMD_FLAG_FAST_ZERO)",
        "h.trim(4096, 32768, nbd.CMD_FLAG_FUA)",
        "h.flush()",
        "chunks = []",
        "def chunk(data, offset, status, error): chunks.append((offset, len(data), status))",
        "h.pread_structured(65536, 0, chunk, nbd.CMD_FLAG_DF)",
        "assert chunks == [(0, 65536, nbd.READ_DATA)], chunks",
        "found = []",
        "def extent(context, offset, entries, error): found.append((context, entries))",
        "h.block_status(65536, 0, extent)",
        "h.block_status(65536, 1024, extent, nbd.CMD_FLAG_REQ_ONE)",
        "print(found)",
        "h.shutdown()",
    )
    whole = [4096, 0, 8192, 3, 4096, 0, 4096, 3, 12288, 0, 4096, 3, 28672, 0]
    assert said.strip() == repr([("base:allocation", whole), ("base:allocation", [3072, 0])])


def test_flush_on_one_connection_covers_the_other(millpond: Millpond, run: Run) -> None:
    nbdsh(
        run,
        millpond.uri,
        "assert h.can_multi_conn()",
        "other = nbd.NBD()",
        f"other.connect_uri({millpond.uri!r})",
        "for n in range(100):",
        "    h.pwrite(bytes([n]) * 4096, n * 4096)",
        "    assert other.pread(4096, n * 4096) == bytes([n]) * 4096",
        "    other.pwrite(bytes([n + 1]) * 512, n * 4096 + 512)",
        "    assert h.pread(513, n * 4096 + 511) == bytes([n]) + bytes([n + 1]) * 512",
        "other.flush()",
    )
