"""A real `millpond up DIR` as a child process: store, cache and an NBD socket.

    with Millpond(directory, size_bytes=1 << 30, cache_bytes=1 << 30) as millpond:
        with nbdclient.connect(millpond.uri) as client: ...
        millpond.kill(); millpond.start()        # kill -9 and again, over the same directory

MILLPOND_COMMAND replaces the command, to run the same tests against an installed or another build.
"""

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import millpond

START_TIMEOUT_S = 120.0  # formatting writes the log area once; test machines are slow and shared
STOP_TIMEOUT_S = 60.0
URI_SCHEME = "nbd+unix://"


class Millpond:
    """One process, started, stopped and killed as often as a test likes."""

    def __init__(
        self,
        directory: Path,
        *,
        size_bytes: int,
        cache_bytes: int,
        arguments: Sequence[str] = (),
        command: Sequence[str] = (),
    ) -> None:
        self.directory = directory
        self.size_bytes = size_bytes
        self.uri = ""
        self._command = [
            *(command or command_line()),
            *("up", str(directory)),
            *("--size", str(size_bytes), "--cache-size", str(cache_bytes)),
            *arguments,
        ]
        self.log_path = directory.parent / f"{directory.name}.stderr"
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._ready = threading.Event()

    def __enter__(self) -> "Millpond":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is None:
            return
        if kind is None:
            self.stop()
        else:
            self.kill()

    def start(self) -> None:
        """Start and wait until it prints its URI."""
        self.spawn()
        if not self._ready.wait(START_TIMEOUT_S) or not self.uri:
            self.kill()
            raise AssertionError(f"{shlex.join(self._command)} printed no URI:\n{self.log()}")

    def spawn(self) -> None:
        """Start and wait for nothing."""
        assert self._process is None
        self.uri = ""
        self._ready.clear()
        with open(self.log_path, "a") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(),
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, args=[self._process], daemon=True)
        self._reader.start()

    @property
    def process_id(self) -> int:
        """Of the running process."""
        assert self._process is not None
        return self._process.pid

    def alive(self) -> bool:
        """Has it not ended?"""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """SIGTERM; it must end by itself, and well."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"SIGTERM did not end millpond up:\n{self.log()}") from None
        self._reap()
        assert code == 0, f"millpond up ended with {code}:\n{self.log()}"

    def kill(self) -> None:
        """kill -9, its children too: nothing gets the chance to tidy up."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reap()

    def log(self) -> str:
        """The end of what it said on stderr."""
        return self.log_path.read_text()[-4000:] if self.log_path.exists() else ""

    def resident_bytes(self) -> int:
        """Memory in use now."""
        for line in Path(f"/proc/{self.process_id}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmRSS")

    def _reap(self) -> None:
        assert self._process is not None and self._reader is not None
        self._reader.join(timeout=10)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process = None

    def _read(self, process: "subprocess.Popen[str]") -> None:
        """Read stdout to its end, so that the process never blocks on it."""
        assert process.stdout is not None
        for line in process.stdout:
            for word in line.split():
                if not self.uri and word.startswith(URI_SCHEME):
                    self.uri = word
                    self._ready.set()
        self._ready.set()


def command_line() -> list[str]:
    """How a test calls `millpond`."""
    if command := os.environ.get("MILLPOND_COMMAND"):
        return shlex.split(command)
    return [sys.executable, "-m", "millpond.cli.main"]


def environment() -> dict[str, str]:
    """The child imports millpond from where this process did, installed or in the tree."""
    roots = [str(Path(path).parent) for path in millpond.__path__ if Path(path).is_dir()]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(roots),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }
