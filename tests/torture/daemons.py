"""A store and a cache as processes of their own, each to be killed, frozen, restarted, or failed.

    with Pair(tmp_path, {"disk": 64 * MIB}) as pair:
        with nbdclient.connect(pair.uri, export="disk") as client: ...
        pair.store.kill(); pair.store.start()        # kill -9 and again, over the same directory
        pair.cache.pause(); pair.cache.resume()
        pair.cache.fail(Op.SYNC)                      # the next sync of its device is EIO

The disks of both can fail on demand (failing.py); told nothing, they are what they are.
"""

import asyncio
import errno
import json
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from millpond.cache.chance import Chance
from millpond.cache.device import format_cache
from millpond.native.drivers import Op, destroy, open_directory
from millpond.native.store import format_store
from millpond.store.client import StoreClient
from millpondprocess import environment
from torture.commands import control_call, millpond, wait_until

MIB = 1 << 20
START_TIMEOUT_S = 120.0  # against hanging for ever, as all of these
STOP_TIMEOUT_S = 120.0
DRAIN_TIMEOUT_S = 300.0
SEGMENT_BYTES = 8 * MIB
EVERYWHERE = (0, (1 << 64) - 1)
FOR_EVER = 1 << 62
LAUNCHER = Path(__file__).with_name("failing.py")


class Daemon:
    """One `millpond ... serve`, over and over."""

    def __init__(self, log: Path, *arguments: str | Path) -> None:
        self.ready_line = ""
        self._arguments = [str(argument) for argument in arguments]
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self._orders: socket.socket | None = None

    @property
    def process(self) -> "subprocess.Popen[str]":
        """The child that was started last."""
        assert self._process is not None
        return self._process

    def spawn(self) -> None:
        """Start, wait for nothing."""
        assert self._process is None
        self._orders, theirs = socket.socketpair()
        self._orders.settimeout(START_TIMEOUT_S)
        with self._log.open("a") as log, theirs:
            self._process = subprocess.Popen(
                [sys.executable, LAUNCHER, str(theirs.fileno()), *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(),
                pass_fds=[theirs.fileno()],
            )

    def start(self) -> None:
        """Start and wait until it serves."""
        self.spawn()
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], START_TIMEOUT_S)
        self.ready_line = self.process.stdout.readline().strip() if ready else ""
        if not self.ready_line:
            self.kill()
            raise AssertionError(f"{' '.join(self._arguments)} does not serve:\n{self.log()}")

    def alive(self) -> bool:
        """Started, and not ended by itself."""
        return self._process is not None and self._process.poll() is None

    def pause(self) -> None:
        """SIGSTOP."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self._reap()

    def stop(self) -> None:
        """SIGTERM; it ends by itself, and well."""
        self.process.terminate()
        code = self.wait_end()
        assert code == 0, f"ended with {code}:\n{self.log()}"

    def wait_end(self) -> int:
        """Until it has ended by itself; its exit code."""
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"it does not end:\n{self.log()}") from None
        return self._reap()

    def log(self) -> str:
        """The end of what it said on stderr."""
        return self._log.read_text()[-6000:]

    def complaint(self) -> str:
        """The last line for the operator."""
        said = [line for line in self.log().splitlines() if line.startswith("millpond: error: ")]
        assert said, f"it ended without a word:\n{self.log()}"
        return said[-1]

    def fail(
        self,
        op: Op,
        *,
        count: int = 1,
        skip: int = 0,
        area: tuple[int, int] = EVERYWHERE,
        error: int = errno.EIO,
    ) -> None:
        """From now on: skip operations of this kind pass, then count fail."""
        rule = {"op": int(op), "error": error, "skip": skip, "count": count}
        self._order(json.dumps(rule | {"first_byte": area[0], "end_byte": area[1]}))

    def heal(self) -> int:
        """Nothing fails any more; how many have."""
        return self._order(json.dumps({"op": 0}))

    def failed(self) -> int:
        """How many have failed under the rule in force."""
        return self._order("")

    def _order(self, line: str) -> int:
        assert self._orders is not None
        self._orders.sendall(line.encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            piece = self._orders.recv(64)
            assert piece, f"it has ended:\n{self.log()}"
            answer += piece
        return int(answer)

    def _reap(self) -> int:
        code = self.process.wait()
        assert self.process.stdout is not None and self._orders is not None
        self.process.stdout.close()
        self._orders.close()
        self._process = None
        return code


class Pair:
    """One store with some volumes and one cache on it."""

    def __init__(
        self,
        folder: Path,
        volumes: Mapping[str, int],
        *,
        cache_bytes: int = 512 * MIB,
        log_bytes: int = 128 * MIB,
        store_directory: Path | None = None,
        reach: str = "",
    ) -> None:
        """reach: the cache's way to the store; its own socket unless given."""
        self.store_directory = store_directory or folder / "store"
        self.device = folder / "device"
        self.control = folder / "control"
        self.address = f"unix:{self.store_directory}/store.sock"
        self.folder = folder
        self.volumes = dict(volumes)
        self._device_bytes, self._log_bytes = cache_bytes, log_bytes
        self.store = Daemon(folder / "store.stderr", "store", "serve", self.store_directory)
        self.cache = Daemon(
            folder / "cache.stderr",
            *("cache", "serve", self.device, "--store", reach or self.address),
            *("--nbd", folder / "nbd", "--control", self.control),
        )

    def __enter__(self) -> "Pair":
        self.store_directory.mkdir(exist_ok=True)
        driver = open_directory(self.store_directory)
        format_store(driver, bytes(range(16)), segment_bytes=SEGMENT_BYTES)
        destroy(driver)
        self.format_device()
        try:
            self.store.start()
            asyncio.run(self._create_volumes())
            self.cache.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            print(f"the store said:\n{self.store.log()}\nthe cache said:\n{self.cache.log()}")
            self._end()
            return
        for daemon in (self.cache, self.store):
            if daemon.alive():
                daemon.stop()

    def format_device(self) -> None:
        """An empty one, whatever it was."""
        self.device.unlink(missing_ok=True)
        format_cache(
            str(self.device),
            size_bytes=self._device_bytes,
            slot_bytes=16 << 10,
            log_bytes=self._log_bytes,
            force=False,
            chance=Chance(),
        )

    async def _create_volumes(self) -> None:
        client = await StoreClient.connect(
            self.address, role="control", client_id=bytes(16), client_name="torture"
        )
        try:
            for name, size_bytes in self.volumes.items():
                await client.call("volume.create", name=name, size_bytes=size_bytes)
        finally:
            await client.close()

    def _end(self) -> None:
        for daemon in (self.cache, self.store):
            if daemon.alive():
                daemon.kill()

    @property
    def uri(self) -> str:
        """Of the cache's exports."""
        return f"nbd+unix:///?socket={self.folder}/nbd"

    def status(self) -> dict[str, Any]:
        """What `millpond status --json` prints of the cache, without a process for it."""
        return control_call(self.control, "status")

    def disk(self, name: str) -> dict[str, Any]:
        """One volume in it."""
        (found,) = (each for each in self.status()["volumes"] if each["name"] == name)
        return dict(found)

    def link_up(self) -> bool:
        """Is the cache connected to its store?"""
        return bool(self.status()["stores"][0]["up"])

    def words(self) -> str:
        """What `millpond status` prints for people."""
        done = millpond("status", "--control", self.control)
        assert done.code == 0, done.errors
        return done.output

    def store_words(self) -> str:
        """What `millpond store status` prints for people."""
        done = millpond("store", "status", "--store", self.address)
        assert done.code == 0, done.errors
        return done.output

    def wait_drained(self) -> None:
        """Until nothing is dirty, and it was not just published late."""
        wait_until(
            "everything is at the store",
            lambda: (
                all(
                    each["last_sequence"] == each["destaged_sequence"]
                    for each in self.status()["volumes"]
                    if each["state"] != "closed"
                )
                and self.status()["dirty_bytes"] == 0
            ),
            timeout_s=DRAIN_TIMEOUT_S,
        )

    def image(self, name: str) -> bytes:
        """The volume as the store has it."""
        path = self.folder / f"{name}.image"
        done = millpond(
            *("volume", "export", name, path, "--overwrite", "--no-progress"),
            *("--store", self.address),
        )
        assert done.code == 0, done.errors
        found = path.read_bytes()
        path.unlink()
        return found
