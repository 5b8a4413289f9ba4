"""qemu-storage-daemon with the arguments of our unit: what a guest syncs over vhost-user arrives.

The unit's own ExecStart is what runs here; only paths and the volume's name are of the test.
"""

import contextlib
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

import nbdclient
from millpond.nbd.limits import DEAD_TIMEOUT_S
from millpond.nbd.wire import Command
from millpondprocess import Millpond
from nbdrelay import NbdRelay

UNIT = Path(__file__).resolve().parents[2] / "cli" / "system" / "millpond-vhost-user@.service"
MIB = 1 << 20
START_S = 30


def recipe(nbd_socket: Path, vhost_socket: Path) -> list[str]:
    """The unit's command line with places of a test."""
    text = re.sub(r"\\\n\s*", "", UNIT.read_text())
    found = re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)
    assert found is not None
    command = found[1].replace("/run/millpond/nbd.sock", str(nbd_socket))
    command = command.replace("/run/millpond-vhost-user/%i/disk.sock", str(vhost_socket))
    return shlex.split(command.replace("%i", "disk"))


@contextlib.contextmanager
def running(command: list[str], socket: Path) -> Iterator[None]:
    """The daemon, from when it listens at socket."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        limit = time.perf_counter() + START_S
        while not socket.exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.perf_counter() < limit, "it does not listen"
            time.sleep(0.05)
        yield
        assert process.poll() is None, "it ended by itself"
    finally:
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=30)
    assert said == "", said


def with_nbd(command: list[str], socket: Path) -> list[str]:
    """The same daemon and disk with one more export, which this test can talk to."""
    server = ["--nbd-server", f"addr.type=unix,addr.path={socket}"]
    export = ["--export", "type=nbd,id=test,node-name=disk,name=disk,writable=on"]
    return [*command[:3], *server, *command[3:], *export]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[tuple[Path, Millpond]]:
    directory = tmp_path / "millpond"
    with Millpond(directory, size_bytes=64 * MIB, cache_bytes=256 * MIB) as millpond:
        yield Path(unquote(millpond.uri.partition("socket=")[2])), millpond


def test_unit_leaves_no_way_to_ignore_a_flush() -> None:
    command = " ".join(recipe(Path("/nbd"), Path("/vhost")))
    for word in ("cache.no-flush=off", "writethrough=on", "discard=unmap"):
        assert word in command


def test_guest_waits_for_the_cache_as_long_as_one_on_a_kernel_device() -> None:
    command = " ".join(recipe(Path("/nbd"), Path("/vhost")))
    assert f"reconnect-delay={DEAD_TIMEOUT_S}," in command


def test_flush_and_trim_reach_the_cache(place: tuple[Path, Millpond], tmp_path: Path) -> None:
    nbd, vhost, test = (tmp_path / name for name in ("relay", "vhost", "test"))
    with NbdRelay(nbd, place[0]) as relay:
        command = with_nbd(recipe(nbd, vhost), test)
        with (
            running(command, test),
            nbdclient.connect(f"nbd+unix:///disk?socket={test}") as client,
        ):
            assert vhost.is_socket()
            client.write(0, b"w" * 4096)
            flushes = relay.count(Command.FLUSH)
            client.flush()
            assert relay.count(Command.FLUSH) == flushes + 1
            client.write(4096, b"w" * 4096, fua=True)
            assert relay.count(Command.WRITE, fua=True) == 1
            client.trim(0, 4096)
            assert relay.count(Command.TRIM) == 1
            assert client.read(0, 4096) == bytes(4096)


def test_writethrough_is_what_makes_a_write_of_a_guest_durable(
    place: tuple[Path, Millpond], tmp_path: Path
) -> None:
    """A guest that was told "write through" sends no flush: the option has to turn writes to FUA.

    What a guest was told: tests/boot/test_vhost_user.py.
    """
    for word, durable in (("off", 0), ("on", 1)):
        nbd, vhost, test = (tmp_path / f"{name}-{word}" for name in ("relay", "vhost", "test"))
        with NbdRelay(nbd, place[0]) as relay:
            command = with_nbd(recipe(nbd, vhost), test)
            command[-1] += f",writethrough={word}"
            with (
                running(command, test),
                nbdclient.connect(f"nbd+unix:///disk?socket={test}") as client,
            ):
                client.write(0, b"w" * 4096)
                assert relay.count(Command.WRITE, fua=True) == durable
                assert relay.count(Command.WRITE) == 1 - durable


def test_cache_that_is_killed_is_a_pause(place: tuple[Path, Millpond], tmp_path: Path) -> None:
    nbd, millpond = place
    vhost, test = tmp_path / "vhost", tmp_path / "test"
    with (
        running(with_nbd(recipe(nbd, vhost), test), test),
        nbdclient.connect(f"nbd+unix:///disk?socket={test}") as client,
    ):
        for number in range(2):
            client.write(number * 4096, bytes([number + 1]) * 4096)
            client.flush()
            millpond.kill()
            millpond.start()
            assert client.read(number * 4096, 4096) == bytes([number + 1]) * 4096
