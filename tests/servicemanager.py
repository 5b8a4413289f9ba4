"""What systemd does for one service: hands descriptors over, keeps some, hears how it is.

    with ServiceManager(folder, {"nbd": listener}) as manager:
        process = manager.start(["cache", "serve", ...])   # waits for READY=1
        process.terminate(); process.wait()
        manager.start([...])                               # gets what the one before left

A thread takes messages; descriptors are closed when they are forgotten, and with the manager.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

READY_TIMEOUT_S = 120.0
# The environment that says whose descriptors they are needs the number of the process itself.
HANDED_OVER = """
import fcntl, os, sys
count, names, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
high = [fcntl.fcntl(int(number), fcntl.F_DUPFD_CLOEXEC, 3000) for number in command[:count]]
os.closerange(3, 3000)
for index, number in enumerate(high):
    os.dup2(number, 3 + index)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(count), "LISTEN_FDNAMES": names}
os.execv(command[count], command[count:])
"""


class ServiceManager:
    """See the module."""

    def __init__(self, folder: Path, sockets: dict[str, socket.socket]) -> None:
        self.address = str(folder / "notify")
        self.kept: list[tuple[str, int]] = []
        self._sockets = sockets
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._victim: subprocess.Popen[bytes] | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._thread = threading.Thread(target=self._hear_all, daemon=True)
        self._thread.start()

    def __enter__(self) -> "ServiceManager":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b"END=1", self.address)
        self._thread.join()
        self._socket.close()
        self._forget("")

    def start(self, arguments: list[str], log: Path) -> "subprocess.Popen[bytes]":
        """A process of ours, once it says that it is ready."""
        process = self._begin(arguments, log)
        end = time.perf_counter() + READY_TIMEOUT_S
        while not self._ready.wait(0.1):
            if process.poll() is None and time.perf_counter() < end:
                continue
            process.kill()
            process.wait()
            raise AssertionError(f"it is not ready:\n{log.read_text()[-4000:]}")
        return process

    def start_and_kill(self, arguments: list[str], log: Path) -> None:
        """A process of ours, killed when it has had its connections forgotten and used none."""
        process = self._begin(arguments, log, dies=True)
        process.wait(READY_TIMEOUT_S)
        assert not self._ready.is_set() and process.returncode == -signal.SIGKILL

    def _begin(
        self, arguments: list[str], log: Path, *, dies: bool = False
    ) -> "subprocess.Popen[bytes]":
        self._ready.clear()
        with self._lock:
            given = [(name, sock.fileno()) for name, sock in self._sockets.items()] + self.kept
        numbers = [number for _, number in given]
        command = [sys.executable, "-m", "millpond.cli.main", *arguments]
        head = [sys.executable, "-c", HANDED_OVER, str(len(given))]
        head += [":".join(name for name, _ in given), *map(str, numbers)]
        with self._lock, log.open("ab") as out:
            process = subprocess.Popen(
                head + command,
                pass_fds=numbers,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=out,
                env=os.environ | {"NOTIFY_SOCKET": self.address},
            )
            self._victim = process if dies else None
        return process

    def _hear_all(self) -> None:
        while True:
            data, descriptors, _, _ = socket.recv_fds(self._socket, 4096, 16)
            words = dict(line.split("=", 1) for line in data.decode().splitlines())
            if "FDSTORE" in words:
                with self._lock:
                    self.kept += [(words["FDNAME"], number) for number in descriptors]
                continue
            with self._lock:
                victim = self._victim if "BARRIER" in words else None
            if victim is not None:
                victim.kill()
                victim.wait()
            for number in descriptors:  # BARRIER=1: what came before is done
                os.close(number)
            if "FDSTOREREMOVE" in words:
                self._forget(words["FDNAME"])
            if "READY" in words:
                self._ready.set()
            if "END" in words:
                return

    def _forget(self, name: str) -> None:
        """All of a name; "": all."""
        with self._lock:
            for kept, number in self.kept:
                if not name or kept == name:
                    os.close(number)
            self.kept = [(kept, number) for kept, number in self.kept if name and kept != name]
