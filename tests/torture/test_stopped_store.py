"""Four volumes of one cache, and the store of one is stopped (SIGSTOP): real processes and disks.

The others write three times the log's size and all of it is shipped; the one whose store hangs is
slowed, keeps what it was promised, and goes on by itself when its store does.
"""

import json
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import nbdclient
from millpondprocess import command_line, environment
from torture.amounts import seed_for
from torture.commands import millpond, wait_until

MIB = 1 << 20
CHUNK = MIB
LOG_BYTES = 128 * MIB
VOLUME_BYTES = 64 * MIB
HEALTHY, STUCK = ("one", "two", "three"), "stuck"
SLOWED_BYTES_PER_S = 8 * MIB
PATIENCE_S = 120.0  # against hanging for ever; nothing is judged by it


@contextmanager
def process(*arguments: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """A daemon and the first line that it prints; stopped at the end, in whatever state it is."""
    child = subprocess.Popen(
        [*command_line(), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(),
    )
    assert child.stdout is not None
    try:
        yield child.stdout.readline().strip(), child
    finally:
        child.send_signal(signal.SIGCONT)
        child.terminate()
        assert child.wait(PATIENCE_S) == 0
        child.stdout.close()


def volumes_of(control: Path) -> dict[str, dict[str, Any]]:
    """What the cache says, by name."""
    done = millpond("status", "--control", control, "--json")
    assert done.code == 0, done.errors
    return {volume["name"]: volume for volume in json.loads(done.output)["volumes"]}


class Writer:
    """A guest that writes its disk over and over, one chunk at a time, in a thread."""

    def __init__(self, uri: str, name: str, seed: int) -> None:
        self.chunks = 0
        self.newest: dict[int, bytes] = {}
        self.failure: BaseException | None = None
        self._chance = random.Random(f"{seed} {name}")
        self._uri, self._name = uri, name
        self._most_chunks = 0
        self._enough = threading.Event()
        self._thread = threading.Thread()

    def start(self, most_chunks: int) -> None:
        self._most_chunks = most_chunks
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._enough.set()

    def join(self) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), f"{self._name} hangs"
        assert self.failure is None, self.failure

    def _run(self) -> None:
        try:
            with nbdclient.connect(self._uri, export=self._name, timeout_s=PATIENCE_S) as client:
                while self.chunks < self._most_chunks and not self._enough.is_set():
                    at = self.chunks % (VOLUME_BYTES // CHUNK)
                    data = self._chance.randbytes(4096) * (CHUNK // 4096)
                    client.write(at * CHUNK, data)
                    self.newest[at] = data
                    self.chunks += 1
                client.flush()
        except BaseException as error:
            self.failure = error

    def verify(self) -> None:
        """Everything it was promised is there."""
        with nbdclient.connect(self._uri, export=self._name, timeout_s=PATIENCE_S) as client:
            for at, data in self.newest.items():
                assert client.read(at * CHUNK, CHUNK) == data, f"{self._name}: chunk {at}"


def test_a_stopped_store_slows_its_own_volume_and_no_other(tmp_path: Path) -> None:
    seed = seed_for("tests/torture/test_stopped_store.py", 3)
    device, control = tmp_path / "device", tmp_path / "control"
    with ExitStack() as stack:
        addresses, stores = [], []
        for side in ("a", "b"):
            directory = tmp_path / side
            directory.mkdir()
            _, store = stack.enter_context(process("store", "serve", str(directory), "--format"))
            stores.append(store)
            addresses.append(f"unix:{directory}/store.sock")
        for name in (*HEALTHY, STUCK):
            address = addresses[name == STUCK]
            made = millpond("volume", "create", name, str(VOLUME_BYTES), "--store", address)
            assert made.code == 0, made.errors
        formatted = millpond(
            *("cache", "format", device, "--size", "512MiB", "--log-size", str(LOG_BYTES))
        )
        assert formatted.code == 0, formatted.errors
        serve = ["cache", "serve", str(device), "--nbd", str(tmp_path / "nbd")]
        serve += ["--control", str(control)]
        for address in addresses:
            serve += ["--store", address]
        uri, _ = stack.enter_context(process(*serve))

        stuck = Writer(uri, STUCK, seed)
        stuck.start(1 << 30)
        wait_until("the stuck one is at work", lambda: stuck.chunks > 4, timeout_s=PATIENCE_S)
        stores[1].send_signal(signal.SIGSTOP)

        def is_slow() -> bool:
            limit = volumes_of(control)[STUCK]["slowed_bytes_per_s"]
            return limit is not None and limit < SLOWED_BYTES_PER_S

        wait_until("it is slowed", is_slow, timeout_s=PATIENCE_S)

        writers = [Writer(uri, name, seed) for name in HEALTHY]
        for writer in writers:
            writer.start(LOG_BYTES // CHUNK)
        for writer in writers:
            writer.join()
        assert sum(writer.chunks for writer in writers) * CHUNK >= 3 * LOG_BYTES
        assert is_slow(), "all that time"
        assert stuck.failure is None

        stores[1].send_signal(signal.SIGCONT)
        before = stuck.chunks
        wait_until("it goes on by itself", lambda: stuck.chunks > before + 16, timeout_s=PATIENCE_S)
        stuck.stop()
        stuck.join()
        for writer in (*writers, stuck):
            writer.verify()
        wait_until(
            "all of it is shipped",
            lambda: not any(volume["dirty_bytes"] for volume in volumes_of(control).values()),
            timeout_s=PATIENCE_S,
        )
