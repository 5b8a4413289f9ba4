"""What a guest syncs over vhost-user: the trap, and that our unit's arguments close it."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from boot.machine import said
from demo import initramfs, kernel
from demo.guest import QEMU, parse
from interop.test_storage_daemon import recipe, running
from millpond.nbd.wire import Command
from millpondprocess import Millpond
from nbdrelay import NbdRelay

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("virtio_pci", "virtio_blk")
MIB = 1 << 20
MEMORY = "memory-backend-memfd,id=memory,size=256M,share=on"


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """qemu's command line but for console and disk."""
    used = kernel.ensure(ROOT / ".run" / "kernel")
    files = tmp_path_factory.mktemp("guest") / "initramfs"
    init = Path(__file__).with_name("sync.sh")
    initramfs.write(files, used, wanted=MODULES, init=init)
    return [
        *(QEMU, "-accel", "tcg", "-m", "256", "-nodefaults", "-no-user-config", "-no-reboot"),
        *("-object", MEMORY, "-numa", "node,memdev=memory", "-display", "none"),
        *("-kernel", str(used.image), "-initrd", str(files)),
        *("-append", "console=ttyS0 quiet panic=-1"),
    ]


@pytest.fixture
def millpond(tmp_path: Path) -> Iterator[Millpond]:
    directory = tmp_path / "millpond"
    with Millpond(directory, size_bytes=64 * MIB, cache_bytes=256 * MIB) as made:
        yield made


def sync(guest: list[str], millpond: Millpond, place: Path, *, writethrough: bool) -> str:
    """Let a guest write and fsync; what it was told of its cache, and what reached us of it."""
    relay_socket, vhost = place / f"relay-{writethrough}", place / f"vhost-{writethrough}"
    log = place / f"console-{writethrough}"
    server = Path(unquote(millpond.uri.partition("socket=")[2]))
    command = recipe(relay_socket, vhost)
    if not writethrough:
        command = [word.replace(",writethrough=on", "") for word in command]
    disk = ["-chardev", f"socket,id=vhost,path={vhost}"]
    disk += ["-device", "vhost-user-blk-pci,chardev=vhost", "-serial", f"file:{log}"]
    with NbdRelay(relay_socket, server) as relay, running(command, vhost):
        process = subprocess.Popen([*guest, *disk], stderr=subprocess.PIPE, text=True)
        try:
            limit = time.perf_counter() + 300
            while not said(log, "synced"):
                assert process.poll() is None and time.perf_counter() < limit, log.read_text()
                time.sleep(0.1)
            flushes, durable = relay.count(Command.FLUSH), relay.count(Command.WRITE, fua=True)
            plain = relay.count(Command.WRITE)
        finally:
            process.kill()
            process.communicate()
    (told,) = (values["cache"] for word, values in parse(log.read_text()).lines if word == "disk")
    return f"told {told}; {flushes} FLUSH, {durable > 0} FUA, {plain > 0} plain"


@pytest.mark.long
def test_what_a_guest_syncs_reaches_us_with_the_unit_and_without_writethrough_it_does_not(
    guest: list[str], millpond: Millpond, tmp_path: Path
) -> None:
    """A newer qemu may close the trap by itself: then the first line changes, and the unit can."""
    trap = sync(guest, millpond, tmp_path, writethrough=False)
    assert trap == "told write-through; 0 FLUSH, False FUA, True plain"
    unit = sync(guest, millpond, tmp_path, writethrough=True)
    assert unit == "told write-through; 0 FLUSH, True FUA, False plain"
