"""A played kernel, and a daemon's devices over it, for tests/nbd.

Its netlink calls change a tree of plain files; the rest of a device is sockets.
"""

import asyncio
import select
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from millpond.cache.errors import (
    CacheError,
)
from millpond.cache.exports import NOBODY, Agreed, Export, ExportError, Owner
from millpond.cache.handover import Kept
from millpond.cache.tasks import Tasks
from millpond.nbd.devices import KernelDevices
from millpond.nbd.keeper import DISCONNECT
from millpond.nbd.sysfs import Sysfs

OURS, THEIRS = bytes(15) + b"\1", bytes(15) + b"\2"
VOLUME, OTHER = bytes(15) + b"\7", bytes(15) + b"\10"
SIZE = 1 << 20


class PlayedKernel:
    """Its netlink calls change a tree of plain files; it takes or ignores sockets."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sockets: dict[int, socket.socket] = {}
        self.ignored = 0  # so many RECONFIGUREs come too early
        self.is_old = False  # it knows no backends
        self.answer_is_lost = False  # of CONNECT
        self.gate = threading.Event()  # RECONFIGURE waits until it is set
        self.gate.set()
        self.held: set[int] = set()  # open: what is disconnected stays until it is let go
        self.disconnects = 0
        self.marked = False  # at the last of them
        self.is_stuck = False  # a send waits for the engine, with a lock that DISCONNECT needs

    def plug(self, index: int, backend: str, size_bytes: int = SIZE, ro: int = 0) -> None:
        """A device is there."""
        here = self.root / "sys" / "block" / f"nbd{index}"
        (here / "queue").mkdir(parents=True, exist_ok=True)
        values = {"pid": "77", "backend": backend, "size": str(size_bytes // 512), "ro": str(ro)}
        values |= {"inflight": "       0        0"}
        values |= {"queue/io_timeout": "30000", "queue/scheduler": "[mq-deadline] none"}
        for name, value in values.items():
            (here / name).write_text(value + "\n")
        device = self.root / "dev" / f"nbd{index}"
        device.parent.mkdir(exist_ok=True)
        device.write_bytes(b"")

    def is_served(self, index: int) -> bool:
        """Its last socket lives."""
        try:
            return self.sockets[index].recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return True
        except KeyError:
            return False

    def value(self, index: int, name: str) -> str:
        return (self.root / "sys" / "block" / f"nbd{index}" / name).read_text().strip()

    def load(self) -> None:
        """Nothing to import."""

    def connect(self, sock: socket.socket, *, index: int | None, **what: Any) -> int:
        if index is None:
            here = self.root / "sys" / "block"
            index = next(i for i in range(9) if not (here / f"nbd{i}" / "pid").exists())
        backend = "" if self.is_old else what["backend"]
        self.plug(index, backend, what["size_bytes"], what["server_flags"] >> 1 & 1)
        self.sockets[index] = sock.dup()
        if self.answer_is_lost:
            raise CacheError("no answer of the kernel")
        return index

    def reconfigure(
        self,
        index: int,
        *,
        backend: str,
        sock: socket.socket | None = None,
        size_bytes: int | None = None,
        dead_timeout_s: int | None = None,
    ) -> None:
        self.gate.wait()
        assert self.value(index, "backend") == backend
        if size_bytes is not None:  # it waits for what is in flight
            assert sock is None and self.is_served(index), "it would wait for ever"
            size = self.root / "sys" / "block" / f"nbd{index}" / "size"
            size.write_text(str(size_bytes // 512))
        if sock is not None and self.ignored:
            self.ignored -= 1
        elif sock is not None:
            self.sockets[index] = sock.dup()

    def disconnect(self, index: int) -> None:
        while self.is_stuck and self.is_served(index):
            time.sleep(0.01)
        self.disconnects += 1
        note = self.root / "run" / "millpond" / "devices" / f"nbd{index}"
        self.marked = note.exists() and "MILLPOND_DETACHED" in note.read_text()
        if index in self.sockets:
            sock = self.sockets.pop(index)
            with suppress(OSError):  # it was cut off
                sock.send(DISCONNECT)
            sock.close()
        if index not in self.held:
            self.let_go(index)

    def let_go(self, index: int) -> None:
        """The last one has closed a device that was disconnected."""
        self.held.discard(index)
        (self.root / "sys" / "block" / f"nbd{index}" / "pid").unlink(missing_ok=True)


class PlayedExport:
    """Held by one client."""

    def __init__(self, exports: "PlayedExports", export: Export) -> None:
        self.export = export
        self._exports = exports
        self._is_held = True

    def handover(
        self, sock: socket.socket, received: bytes, agreed: Agreed, owner: Owner = NOBODY
    ) -> None:
        self._is_held = False
        self._exports.agreed.append(agreed)
        self._exports.received.append(received)
        ours = socket.socket(fileno=sock.detach())
        task = asyncio.ensure_future(self._until_end(ours, owner))
        self._exports.serving.add(task)

    async def _until_end(self, sock: socket.socket, owner: Owner) -> None:
        with sock:
            loop = asyncio.get_running_loop()
            said = b"" if self._exports.hangs_up else await loop.sock_recv(sock, len(DISCONNECT))
            while self._exports.hangs_up and not _is_hung_up(sock):  # noqa: ASYNC110  (no event)
                await asyncio.sleep(0.01)
            assert said in (b"", DISCONNECT)
        await self._exports.done.wait()
        if said == DISCONNECT:
            owner.disconnected()
        owner.closed()

    async def release(self) -> None:
        self._exports.released += self._is_held
        self._is_held = False


def _is_hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLHUP)
    return bool(poll.poll(0))


class PlayedExports:
    """One volume, `disk`, and perhaps others."""

    def __init__(self) -> None:
        self.export = Export("disk", SIZE, False, "", VOLUME)
        self.others: list[Export] = []
        self.refusal: ExportError | None = None
        self.written_by_others = False
        self.hangs_up = False  # the engine sees a hang-up before what came ahead of it
        self.done = asyncio.Event()  # the engine, with what a connection that ended asked for
        self.done.set()
        self.silent = False  # a store does not answer
        self.serving: set[asyncio.Future[None]] = set()
        self.agreed: list[Agreed] = []
        self.received: list[bytes] = []
        self.opened = self.released = 0
        self.continuing: dict[object, Callable[[], Awaitable[None]]] = {}

    def remember(
        self, volume_id: bytes, who: object, forsaken: Callable[[], Awaitable[None]]
    ) -> None:
        self.continuing[who] = forsaken

    def forget(self, volume_id: bytes, who: object) -> None:
        self.continuing.pop(who, None)

    @property
    def every(self) -> list[Export]:
        return [self.export, *self.others]

    def names(self) -> list[str]:
        return [each.name for each in self.every]

    async def describe(self, name: str) -> Export:
        return self.export

    async def open(self, name: str) -> PlayedExport:
        for each in self.every:
            if each.name == name:
                return await self.open_id(each.volume_id)
        raise ExportError("unknown", f"volume {name}: no such volume")

    async def open_id(self, volume_id: bytes) -> PlayedExport:
        (export,) = (each for each in self.every if each.volume_id == volume_id)
        if self.refusal is not None:
            raise self.refusal
        if self.written_by_others:  # a task of its own: who asks may be ended by it
            await asyncio.shield(asyncio.gather(*(each() for each in self.continuing.values())))
        self.opened += 1
        return PlayedExport(self, export)

    async def grow(self, volume_ids: Sequence[bytes]) -> dict[bytes, Export]:
        if self.silent:
            await asyncio.sleep(3600)
        return {each.volume_id: each for each in self.every if each.volume_id in volume_ids}


class Stage:
    """A daemon's devices over all of it."""

    def __init__(self, root: Path) -> None:
        self.kernel = PlayedKernel(root)
        self.exports = PlayedExports()
        self.failures: list[BaseException] = []
        self.tasks = Tasks(self.failures.append)
        self.root = root
        self.devices = self.another()
        self.links = root / "dev" / "millpond"

    async def start(self, guests: Sequence[Kept] = ()) -> Sequence[Kept]:
        """As a daemon does; what is not for devices."""
        others = self.devices.take(guests)
        await self.devices.start()
        return others

    def another(self) -> KernelDevices:
        """The devices as a new process sees them."""
        return KernelDevices(
            self.exports, OURS, self.tasks, sysfs=Sysfs(str(self.root)), netlink=self.kernel
        )


def play(root: Path, scenario: Callable[[Stage], Awaitable[None]]) -> None:
    """Run it; nothing may have died."""

    async def main() -> None:
        stage = Stage(root)
        await scenario(stage)
        await stage.devices.close()
        await stage.tasks.cancel_all()
        for each in stage.kernel.sockets.values():
            each.close()
        await asyncio.gather(*stage.exports.serving)
        for thread in threading.enumerate():  # nobody waits for settings; the folder goes now
            if thread.name.startswith("settings-"):
                await asyncio.to_thread(thread.join)
        assert not stage.failures

    asyncio.run(main())


async def until(holds: Callable[[], bool]) -> None:
    """Soon, or never."""
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110  (what it waits for has no event)
            await asyncio.sleep(0.01)


def opener(root: Path, name: str) -> Path:
    """A process that has /dev/nbd0 open."""
    (root / "sys/block/nbd0/dev").write_text("0:0")  # as plain files have
    process = root / "proc" / "123"
    (process / "fd").mkdir(parents=True)
    (process / "comm").write_text(f"{name}\n")
    for closed in ("3", "4", "6"):
        (process / "fd" / closed).write_text("no link: closed at this moment")
    (process / "fd" / "5").symlink_to(root / "dev" / "nbd0")
    return process / "fd" / "5"
