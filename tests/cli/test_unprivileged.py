"""Store, cache and NBD on a unix socket need no root: each runs as another user, without a right.

Run as root, the daemons become nobody before they read their command line (what they import was
imported before: a developer's Python may lie where nobody else can read).  Run as anybody else,
they stay who they are, and the proof is the same.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import nbdclient

MIB = 1 << 20
NOBODY = 65534
COMMAND = f"""
import contextlib, io, os, sys
from millpond.cli.main import main
with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
    main(["version"])
    main(["volume", "list", "--store", "nonsense"])  # imports what is imported late
    main(["flush", "disk", "--control", "/nowhere", "--timeout", "1s"])
"name".encode("idna")
if os.getuid() == 0:
    os.setgroups([])
    os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
    os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
sys.exit(main())
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder of that user; pytest's own cannot be entered by others."""
    path = Path(tempfile.mkdtemp(prefix="millpond-unprivileged-"))
    path.chmod(0o755)
    user = NOBODY if os.getuid() == 0 else os.getuid()
    (path / "store").mkdir()
    for each in (path, path / "store"):
        os.chown(each, user, -1)
    yield path
    shutil.rmtree(path)


@contextmanager
def serving(place: Path, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    with (place / f"{arguments[0]}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=place,
        )
    try:
        assert process.stdout is not None
        assert process.stdout.readline(), (place / f"{arguments[0]}.log").read_text()
        yield process
        process.terminate()
        assert process.wait(60) == 0, (place / f"{arguments[0]}.log").read_text()
    finally:
        process.kill()
        process.communicate()


def run(place: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-c", COMMAND, *arguments], check=True, cwd=place, timeout=60)


def rights(process: "subprocess.Popen[str]") -> tuple[int, int]:
    """The effective user and capabilities of a process."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields["Uid"].split()[1]), int(fields["CapEff"], 16)


def test_a_guest_is_served_by_processes_without_any_right(place: Path) -> None:
    noise = random.Random(5).randbytes(MIB)
    with serving(place, "store", "serve", "store", "--format", "--listen", "127.0.0.1:0") as store:
        address = f"unix:{place}/store/store.sock"
        run(place, "volume", "create", "disk", "64MiB", "--store", address)
        run(place, "cache", "format", "cache", "--size", "256MiB")
        with (
            serving(
                *(place, "cache", "serve", "cache", "--store", address),
                *("--nbd", "nbd.sock", "--control", "control.sock"),
            ) as cache,
            nbdclient.connect(f"nbd+unix:///disk?socket={place}/nbd.sock") as guest,
        ):
            guest.write(0, noise)
            guest.flush()
            run(place, "flush", "disk", "--control", "control.sock")
            assert guest.read(0, MIB) == noise
            for process in (store, cache):
                user, capabilities = rights(process)
                assert user != 0 and (capabilities == 0 or os.getuid() != 0)
            assert os.stat(place / "cache").st_uid == user
