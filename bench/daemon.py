"""One `millpond up` process, driven only through its command line, for demo and benchmarks.

Happy path: started, prints its nbd+unix:// URI, answers `millpond status`, ends with 0 on
SIGTERM. Failure modes: it ends before it is ready or does not get ready in time: its last
lines are shown. Whatever happens to its user, close() leaves no process behind.
"""

import json
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

URI = re.compile(r"nbd\+unix://(?:/(?P<export>[^?\s]*))?\?socket=(?P<socket>\S+)")


def number(status: Any, key: str) -> int:
    """The sum of every value called key, at any depth of a status document."""
    total = 0
    waiting = [status]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if isinstance(value.get(key), int):
                total += value[key]
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return total


class Daemon:
    """One Millpond directory and the process that serves it."""

    def __init__(self, millpond: Path, directory: Path, arguments: list[str], log: Path) -> None:
        self.millpond = millpond
        self.directory = directory
        self.arguments = arguments
        self.log = log
        self.socket = Path()
        self.export = ""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id while it runs."""
        assert self._process is not None
        return self._process.pid

    def start(self, timeout_s: float = 60) -> float:
        """Start and wait for the URI; returns the seconds it took."""
        assert self._process is None
        begin = time.perf_counter()
        with self.log.open("wb") as log:
            command = [str(self.millpond), "up", str(self.directory), *self.arguments]
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while time.perf_counter() - begin < timeout_s:
            found = URI.search(self.log.read_text(errors="replace"))
            if found:
                self.socket = Path(found["socket"])
                self.export = found["export"] or self.only_volume()
                return time.perf_counter() - begin
            if self._process.poll() is not None:
                break
            time.sleep(0.02)
        raise SystemExit(f"millpond up did not get ready:\n{self.log.read_text()[-2000:]}")

    def run(self, *arguments: str) -> str:
        """A client command on this directory; its output."""
        command = [str(self.millpond), *arguments, "--dir", str(self.directory)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}")
        return done.stdout

    def only_volume(self) -> str:
        """The name of the one volume: the URI may leave it out, commands need it."""
        (volume,) = json.loads(self.run("volume", "list", "--json"))
        return str(volume["name"])

    def status(self) -> Any:
        """`millpond status --json`, parsed."""
        return json.loads(self.run("status", "--json"))

    def wait_destaged(self, timeout_s: float = 120) -> float:
        """Wait until no acknowledged write is only in the cache; returns the seconds it took."""
        begin = time.perf_counter()
        while number(self.status(), "dirty_bytes"):
            if time.perf_counter() - begin > timeout_s:
                raise SystemExit(f"not destaged after {timeout_s:.0f} s")
            time.sleep(0.1)
        return time.perf_counter() - begin

    def format_cache(self) -> None:
        """Make the stopped daemon's cache device empty; nothing on it may be dirty."""
        assert self._process is None
        device = self.directory / "cache"
        command = [str(self.millpond), "cache", "format", str(device), "--force"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def kill(self) -> None:
        """kill -9, as a crash would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def stop(self, timeout_s: float = 30) -> None:
        """SIGTERM; must end with exit code 0."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"millpond up still runs {timeout_s:.0f} s after SIGTERM") from None
        self._process = None
        if code:
            raise SystemExit(f"millpond up ended with {code}:\n{self.log.read_text()[-2000:]}")

    def close(self) -> None:
        """Make sure that no process is left, on every way out."""
        if self._process is not None:
            self.kill()
