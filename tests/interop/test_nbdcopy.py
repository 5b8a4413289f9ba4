"""nbdcopy: a whole disk in and out over several connections, holes included."""

import subprocess
from pathlib import Path

import nbdclient
from interop.conftest import SIZE_BYTES, Run
from millpondprocess import Millpond


def differs(one: Path, other: Path) -> str:
    """Where two files differ; "" when they do not."""
    compared = subprocess.run(["cmp", str(one), str(other)], capture_output=True, text=True)
    return compared.stdout + compared.stderr


def test_image_in_and_out_is_identical(
    millpond: Millpond, run: Run, image: Path, tmp_path: Path
) -> None:
    with nbdclient.connect(millpond.uri) as client:
        for offset in range(0, SIZE_BYTES, 64 << 20):  # what holes of the image must overwrite
            client.write(offset + 12345, b"old data " * 1000)
    pipelined = ("--connections=4", "--requests=64", "--flush")
    run("nbdcopy", *pipelined, str(image), millpond.uri)
    out = tmp_path / "out.raw"
    run("nbdcopy", *pipelined, millpond.uri, str(out))
    assert differs(image, out) == ""
    out.unlink()


def test_one_connection_one_request_at_a_time(
    millpond: Millpond, run: Run, image: Path, tmp_path: Path
) -> None:
    run("nbdcopy", "--synchronous", "--flush", str(image), millpond.uri)
    out = tmp_path / "out.raw"
    run("nbdcopy", "--synchronous", "--request-size=4194304", millpond.uri, str(out))
    assert differs(image, out) == ""
    out.unlink()
