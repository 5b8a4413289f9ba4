"""A guest whose disk is served by qemu's own NBD client, while our daemon is restarted under it.

The listening socket is the service manager's, so that it outlives the daemon: qemu connects again
at once (reconnect-delay) after a kill, and keeps its connection over a planned restart.
"""

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from kernel.guest import Console, Guests
from torture.daemons import MIB
from torture.managed import site

KILLS, RESTARTS = 10, 3
READY_S = 300.0


def disk(socket_path: str) -> list[str]:
    """Qemu's arguments; README has the same."""
    backend = f"driver=nbd,node-name=nbd,server.type=unix,server.path={socket_path},export=disk"
    backend += ",reconnect-delay=300,discard=unmap,cache.direct=on"
    return ["-blockdev", backend, "-device", "virtio-blk-pci,drive=nbd"]


def test_daemon_is_killed_and_restarted_under_qemus_nbd_client(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The guest sees pauses: no error, no wrong byte."""
    guests, consoles = Guests(tmp_path), []
    word = tmp_path / "word"
    devices = ["-chardev", f"socket,id=word,path={word},server=on,wait=off"]
    devices += ["-serial", "chardev:word"]
    with site(tmp_path, 64 * MIB) as made:
        devices += disk(f"{tmp_path}/nbd.sock")

        def run() -> None:
            consoles.append(guests.run("virtio.py", memory_mib=512, devices=devices))

        thread = threading.Thread(target=run)
        thread.start()
        try:
            wait_for_load(guests.log_of("virtio.py"), thread)
            for _ in range(KILLS):
                time.sleep(0.3)
                made.kill()
                made.start()
            for _ in range(RESTARTS):
                time.sleep(0.3)
                made.stop()
                assert len(made.manager.kept) == 2, "qemu's connection, and its description"
                made.start()
        finally:
            with socket.socket(socket.AF_UNIX) as host:
                host.connect(str(word))
                host.sendall(b"stop\n")
                thread.join()
    (console,) = consoles
    assert isinstance(console, Console) and not console.kernel_complaints()
    figure = f"{KILLS} kills, {RESTARTS} restarts; {'; '.join(console.figures)}"
    record_property("figure", figure)


def wait_for_load(log: Path, thread: threading.Thread) -> None:
    """Until the guest works."""
    end = time.perf_counter() + READY_S
    while not (log.exists() and "GUEST load" in log.read_text(errors="replace")):
        assert thread.is_alive() and time.perf_counter() < end, "the guest does not come up"
        time.sleep(0.1)
