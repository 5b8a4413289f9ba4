"""Stores and a cache as an operator runs them: separate processes, many volumes, one hypervisor.

Happy path: Farm(...) makes stores, volumes and a formatted cache device; start, freeze, kill and
look at them; close() leaves no process behind. Failure modes: a process that does not get ready
or ends: SystemExit with its last lines.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from client import connect_soon

MILLPOND = Path(sys.executable).with_name("millpond")
READY_TIMEOUT_S = 120.0


def millpond(*arguments: str | Path) -> str:
    """Run one command; its output."""
    command = [str(MILLPOND), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-1000:]}")
    return done.stdout


class Process:
    """One long-running process and its log."""

    def __init__(self, arguments: Sequence[str | Path], socket: Path, log: Path) -> None:
        self.arguments = [str(MILLPOND), *map(str, arguments)]
        self.socket = socket
        self.log = log
        self._popen: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """While it runs."""
        assert self._popen is not None
        return self._popen.pid

    @property
    def running(self) -> bool:
        """Was it started and not stopped?"""
        return self._popen is not None

    def spawn(self) -> None:
        """Start it and wait for nothing."""
        assert self._popen is None
        self.socket.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(self.arguments, stdout=log, stderr=log)

    def start(self) -> None:
        """Start it and wait for its socket."""
        self.spawn()
        end = time.perf_counter() + READY_TIMEOUT_S
        while not self.socket.exists():
            if self.ended() or time.perf_counter() > end:
                raise SystemExit(f"did not get ready:\n{self.log.read_text()[-1500:]}")
            time.sleep(0.01)

    def ended(self) -> bool:
        """Has it ended by itself?"""
        return self._popen is not None and self._popen.poll() is not None

    def freeze(self) -> None:
        """SIGSTOP: there, and silent."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        """SIGTERM and wait."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """kill -9."""
        self._end(signal.SIGKILL)

    def _end(self, number: int) -> None:
        if self._popen is None:
            return
        self._popen.send_signal(number)
        try:
            self._popen.wait(60)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._popen = None


class Farm:
    """Stores with volumes, and one cache in front of all of them."""

    def __init__(
        self,
        directory: Path,
        *,
        cache_size: str,
        log_size: str,
        stores: int = 1,
        slot_size: str = "16K",
        page_cache: str | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        directory.mkdir(parents=True)
        self.device = directory / "cache"
        self.nbd = directory / "nbd.sock"
        self.control = directory / "control.sock"
        self.stores = []
        for number in range(stores):
            path = directory / f"store{number}"
            path.mkdir()
            settings = directory / f"store{number}.toml"
            table = {"directory": str(path)} | ({"page_cache": page_cache} if page_cache else {})
            lines = [f"{name} = {json.dumps(value)}" for name, value in table.items()]
            settings.write_text("\n".join(["[store]", *lines, ""]))
            command: list[str | Path] = ["store", "serve", "--config", settings, "--format"]
            self.stores.append(
                Process(command, path / "store.sock", directory / f"store{number}.log")
            )
        sizes = ["--size", cache_size, "--log-size", log_size, "--slot-size", slot_size]
        millpond("cache", "format", self.device, *sizes)
        serve: list[str | Path]
        serve = ["cache", "serve", self.device, "--nbd", self.nbd]
        serve += ["--control", self.control, *arguments]
        for number in range(stores):
            serve += ["--store", self.address(number)]
        self.cache = Process(serve, self.nbd, directory / "cache.log")

    def address(self, number: int = 0) -> str:
        """Of a store."""
        return f"unix:{self.stores[number].socket}"

    def start(self) -> None:
        """All stores, then the cache."""
        for store in self.stores:
            store.start()
        self.cache.start()

    def create(self, names: Sequence[str], size_bytes: int, store: int = 0) -> None:
        """Volumes on a running store; as many at a time as there are processors."""

        def one(name: str) -> None:
            millpond("volume", "create", name, str(size_bytes), "--store", self.address(store))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(one, names))

    def reach(self, name: str) -> list[str]:
        """fio's options for a volume."""
        return ["--ioengine=nbd", f"--uri=nbd+unix:///{name}?socket={self.nbd}"]

    def status(self, op: str = "status") -> dict[str, Any]:
        """What `millpond status --json` prints, without a process; `volumes` asks no store."""
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(60)
            control.connect(str(self.control))
            control.sendall(json.dumps({"op": op}).encode() + b"\n")
            answer: dict[str, Any] = json.loads(control.makefile("rb").readline())
        return answer

    def volume(self, name: str) -> dict[str, Any]:
        """One volume of the status."""
        found: dict[str, Any] = next(
            v for v in self.status("volumes")["volumes"] if v["name"] == name
        )
        return found

    def wait_destaged(self, timeout_s: float = 600) -> None:
        """Until no acknowledged write is only in the cache."""
        end = time.perf_counter() + timeout_s
        time.sleep(0.1)  # status is a few milliseconds old
        while self.status()["dirty_bytes"]:
            if time.perf_counter() > end:
                raise SystemExit(f"not destaged after {timeout_s:.0f} s")
            time.sleep(0.1)

    def first_request(self, name: str, *, timeout_s: float = 120) -> tuple[float, float]:
        """Start the cache; seconds until its first read and its first write were answered."""
        begin = time.perf_counter()
        self.cache.spawn()
        guest = connect_soon(self.nbd, name, timeout_s=timeout_s)
        guest.read(0, 4096)
        read_s = time.perf_counter() - begin
        guest.write(0, bytes(4095) + b"1")
        write_s = time.perf_counter() - begin
        guest.close()
        return read_s, write_s

    def close(self) -> None:
        """Whatever happened, no process stays."""
        self.cache.kill()
        for store in self.stores:
            store.kill()
