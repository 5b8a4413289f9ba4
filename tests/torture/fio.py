"""fio with verify, over and over, as a guest that knows nothing of restarts: qemu-nbd reconnects.

    fio (libnbd) -> unix socket -> qemu-nbd, reconnect-delay -> unix socket -> the cache

Happy path: each round writes all of the volume at random and reads it back, every block checked.
Failure modes: fio ends with an error, or finds other data: raised by check() and join().
"""

import subprocess
import threading
from pathlib import Path

import nbdclient
from nbdclient import parse_uri
from torture.commands import wait_until

PATIENCE_S = 600.0  # against hanging for ever
RECONNECT_S = 600
JOB = (
    *("--name=job", "--ioengine=nbd", "--rw=randwrite", "--iodepth=16"),
    *("--bssplit=4k/70:16k/20:64k/10", "--fsync=64"),
    *("--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0"),
)


class Fio:
    """One volume."""

    def __init__(self, uri: str, export: str, folder: Path, size_bytes: int, seed: int) -> None:
        self.rounds = 0
        self._export, self._size_bytes, self._seed = export, size_bytes, seed
        self._failure: BaseException | None = None
        self._enough = threading.Event()
        path = folder / "fio.socket"
        self._uri = f"nbd+unix:///?socket={path}"
        self._qemu = subprocess.Popen(
            [
                *("qemu-nbd", "--persistent", "--shared=2", "--socket", path, "--image-opts"),
                "driver=raw,file.driver=nbd,file.server.type=unix,"
                f"file.server.path={parse_uri(uri).address},file.export={export},"
                f"file.reconnect-delay={RECONNECT_S}",
            ],
            stderr=subprocess.DEVNULL,
        )
        wait_until("qemu-nbd serves", self._answers, timeout_s=60)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __str__(self) -> str:
        return f"{self.rounds} rounds of fio"

    def ask_to_stop(self) -> None:
        """After this round."""
        self._enough.set()

    def check(self) -> None:
        """Raise what is wrong."""
        if self._failure is not None:
            raise self._failure

    def join(self) -> None:
        """Wait for the end of the round."""
        self._thread.join(PATIENCE_S)
        self.check()
        assert not self._thread.is_alive(), "fio hangs"

    def close(self) -> None:
        """End qemu-nbd, and with it fio."""
        self._qemu.kill()
        self._qemu.wait()

    def read_all(self, uri: str) -> bytes:
        """The volume as the cache shows it."""
        with nbdclient.connect(uri, export=self._export, timeout_s=60) as client:
            return client.read(0, self._size_bytes)

    def _answers(self) -> bool:
        """Bound is not listening yet."""
        try:
            nbdclient.connect_socket(self._uri).close()
        except OSError:
            assert self._qemu.poll() is None, "qemu-nbd does not start"
            return False
        return True

    def _run(self) -> None:
        try:
            while not self._enough.is_set():
                self._round()
                self.rounds += 1
        except BaseException as error:
            self._failure = error

    def _round(self) -> None:
        done = subprocess.run(
            [
                *("fio", *JOB, f"--uri={self._uri}", f"--size={self._size_bytes}"),
                f"--randseed={self._seed + self.rounds}",
            ],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}{done.stderr}"
