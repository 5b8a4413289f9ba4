"""A store, and a cache that a service manager starts, stops and starts again.

with site(tmp_path, 64 * MIB) as made:
    with nbdclient.connect(made.uri, export="disk") as client: ...
    made.stop(); made.start()        # as systemctl restart
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from millpond.cache.chance import Chance
from millpond.cache.device import format_cache
from servicemanager import ServiceManager
from torture.commands import millpond
from torture.daemons import MIB, Daemon


class Site:
    """A store, and a cache that a service manager starts."""

    def __init__(self, folder: Path, manager: ServiceManager, store: Daemon) -> None:
        self.folder, self.manager, self.store = folder, manager, store
        self.uri = f"nbd+unix:///?socket={folder}/nbd.sock"
        self.log = folder / "cache.log"
        self._cache = manager.start(self._arguments, self.log)

    @property
    def _arguments(self) -> list[str]:
        store, control = f"unix:{self.folder}/store.sock", f"{self.folder}/control.sock"
        arguments = ["cache", "serve", f"{self.folder}/cache", "--store", store]
        return [*arguments, "--nbd", f"{self.folder}/nbd.sock", "--control", control]

    def stop(self) -> None:
        """As systemctl stop, or the first half of a restart."""
        self._cache.terminate()
        assert self._cache.wait(120) == 0, self.log.read_text()[-4000:]

    def kill(self) -> None:
        """kill -9."""
        self._cache.kill()
        self._cache.wait()

    def start_and_kill(self) -> None:
        """A second half that ends between taking over and the first byte."""
        self.manager.start_and_kill(self._arguments, self.log)

    def start(self) -> None:
        """The second half."""
        self._cache = self.manager.start(self._arguments, self.log)


@contextmanager
def site(folder: Path, size_bytes: int) -> Iterator[Site]:
    """With a volume `disk`, being served."""
    (folder / "store").mkdir()
    address = f"unix:{folder}/store.sock"
    store = Daemon(
        folder / "store.log",
        *("store", "serve", folder / "store", "--format", "--listen", address),
    )
    store.start()
    millpond("volume", "create", "disk", "--size", str(size_bytes), "--store", address)
    format_cache(str(folder / "cache"), size_bytes=512 * MIB, chance=Chance())
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/nbd.sock")
        listener.listen()
        with ServiceManager(folder, {"nbd": listener}) as manager:
            made = Site(folder, manager, store)
            yield made
            made.stop()
    store.stop()
