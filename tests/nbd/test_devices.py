"""Kernel devices over a played kernel: whose they are, what is taken up again, names, refusals.

What a real kernel does is in tests/kernel.
"""

import asyncio
import errno
import os
import re
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from millpond.cache.errors import (
    AlreadyThere,
    CacheError,
    NotPermitted,
    StoreAway,
    UnderWay,
    VolumeBusy,
    VolumeUnknown,
)
from millpond.cache.exports import NOBODY, Agreed, Export, ExportError, Owner
from millpond.cache.handover import Kept
from millpond.cache.tasks import Tasks
from millpond.nbd.devicelinks import DeviceLinks, link_name
from millpond.nbd.devices import KernelDevices
from millpond.nbd.netlink import refusal
from millpond.nbd.sysfs import Backend, Sysfs, index_of

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
            self.sockets.pop(index).close()
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
            assert await asyncio.get_running_loop().sock_recv(sock, 1) == b""
        await self._exports.done.wait()
        owner.closed()

    async def release(self) -> None:
        self._exports.released += self._is_held
        self._is_held = False


class PlayedExports:
    """One volume, `disk`, and perhaps others."""

    def __init__(self) -> None:
        self.export = Export("disk", SIZE, False, "", VOLUME)
        self.others: list[Export] = []
        self.refusal: ExportError | None = None
        self.written_by_others = False
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


def test_attached_then_detached_and_nothing_is_left(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        made = await stage.devices.attach("disk")
        assert made["device"] == "/dev/nbd0" and made["served"] and not made["read_only"]
        assert stage.kernel.value(0, "backend") == str(Backend(OURS, VOLUME))
        assert stage.kernel.value(0, "queue/io_timeout") == "500"
        assert stage.kernel.value(0, "queue/scheduler") == "none"
        assert (stage.links / "disk").readlink() == Path("../nbd0")
        with pytest.raises(AlreadyThere, match="already as /dev/nbd0"):
            await stage.devices.attach("disk")
        assert stage.exports.released == 1
        await stage.devices.detach(str(stage.links / "disk"))
        assert stage.devices.list() == [] and not stage.links.exists()
        assert not (tmp_path / "run" / "millpond" / "devices").exists()
        with pytest.raises(VolumeUnknown, match="not attached"):
            await stage.devices.detach("disk")

    play(tmp_path, scenario)


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [("away", StoreAway), ("shutdown", StoreAway), ("busy", VolumeBusy), ("platform", CacheError)],
)
def test_refusal_says_whether_waiting_helps(
    tmp_path: Path, refusal: Any, kind: type[CacheError]
) -> None:
    async def scenario(stage: Stage) -> None:
        stage.exports.refusal = ExportError(refusal, "volume disk: no")
        with pytest.raises(CacheError, match="volume disk: no") as caught:
            await stage.devices.attach("disk")
        assert type(caught.value) is kind

    play(tmp_path, scenario)


def test_attach_beside_another_of_the_same_volume_is_under_way(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        first = asyncio.ensure_future(stage.devices.attach("disk"))
        await asyncio.sleep(0)
        with pytest.raises(UnderWay, match="at the moment"):
            await stage.devices.attach("disk")
        await first

    play(tmp_path, scenario)


def test_volume_is_attached_by_its_id_too_and_only_once(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        by_id = asyncio.ensure_future(stage.devices.attach(VOLUME.hex()))
        await asyncio.sleep(0)
        with pytest.raises(UnderWay, match="volume disk"):
            await stage.devices.attach("disk")
        assert (await by_id)["volume"] == "disk" and stage.exports.released == 1
        with pytest.raises(AlreadyThere):
            await stage.devices.attach(VOLUME.hex())
        for other in (THEIRS.hex()[1:], VOLUME.hex() + "0", "g" * 32):
            with pytest.raises(VolumeUnknown):
                await stage.devices.attach(other)

    play(tmp_path, scenario)


def test_device_of_another_cache_and_of_a_stranger_are_left_alone(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        stage.kernel.plug(0, str(Backend(THEIRS, VOLUME)))
        stage.kernel.plug(1, "")
        stage.kernel.plug(2, f"millpond/{OURS.hex()}")
        await stage.start()
        assert stage.devices.list() == [] and stage.exports.opened == 0
        for index in range(3):
            with pytest.raises(VolumeBusy, match="in use"):
                await stage.devices.attach("disk", device=f"/dev/nbd{index}")
        assert stage.exports.opened == 0

    play(tmp_path, scenario)


def test_our_device_is_taken_up_at_the_start(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        stage.kernel.plug(3, str(Backend(OURS, VOLUME)), ro=1)
        await stage.start()
        (found,) = stage.devices.list()
        assert found["device"] == "/dev/nbd3" and found["served"] and found["read_only"]
        assert stage.exports.agreed == [Agreed(read_only=True)]
        await until(lambda: (stage.links / "disk").is_symlink())

    play(tmp_path, scenario)


def kept(backend: Backend, *, received: bytes = b"") -> tuple[Kept, socket.socket]:
    """A device's connection, as the process before left it; the kernel's end."""
    ours, kernels = socket.socketpair()
    ours.setblocking(False)
    agreed = Agreed(read_only=True)
    return Kept(ours.detach(), VOLUME, agreed, received, tag=str(backend)), kernels


def test_device_goes_on_with_the_connection_of_the_process_before(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        backend = Backend(OURS, VOLUME)
        stage.kernel.plug(0, str(backend))
        ours, kernels = kept(backend, received=b"half a request")
        stranger = Kept(7, VOLUME, Agreed(), b"")
        assert await stage.start([stranger, ours]) == [stranger]
        (found,) = stage.devices.list()
        assert found["served"] and found["volume"] == "disk"
        assert (stage.exports.received, stage.exports.agreed) == (
            [b"half a request"],
            [ours.agreed],
        )
        assert not stage.kernel.sockets, "the kernel was told nothing"
        kernels.close()
        await until(lambda: bool(stage.kernel.sockets))  # that one ended: a new one, as ever

    play(tmp_path, scenario)


@pytest.mark.expects_warnings
def test_connection_that_could_not_go_on_is_passed_on_again(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        backend = Backend(OURS, VOLUME)
        stage.kernel.plug(0, str(backend))
        stage.exports.refusal = ExportError("away", "the store is away")
        ours, kernels = kept(backend)
        await stage.start([ours])
        assert await stage.devices.close() == [ours]
        kernels.close()
        os.close(ours.fd)

    play(tmp_path, scenario)


def test_connection_of_a_device_that_is_gone_is_closed(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        ours, kernels = kept(Backend(OURS, VOLUME))
        assert not await stage.start([ours])
        with kernels:
            assert kernels.recv(1) == b""

    play(tmp_path, scenario)


@pytest.mark.expects_warnings
@pytest.mark.parametrize("keeps", [False, True], ids=["crash", "planned"])
def test_device_whose_volume_others_have_written_is_ended(tmp_path: Path, keeps: bool) -> None:
    """Whoever has it mounted would write what it remembers over what they have written."""

    async def scenario(stage: Stage) -> None:
        backend = Backend(OURS, VOLUME)
        stage.kernel.plug(0, str(backend))
        ours, kernels = kept(backend)
        if not keeps:
            os.close(ours.fd)
        stage.exports.written_by_others = True
        await stage.start([ours] if keeps else [])
        await until(lambda: stage.devices.list() == [])
        assert not stage.exports.continuing
        assert stage.kernel.marked, "a crash meanwhile does not bring it back"
        assert not (tmp_path / "sys" / "block" / "nbd0" / "pid").exists(), "disconnected"
        assert stage.exports.opened == stage.exports.released, "nothing is served"
        with kernels:
            assert kernels.recv(1) == b""
        await asyncio.gather(*stage.exports.serving)

    play(tmp_path, scenario)


def test_volume_is_held_for_as_long_as_its_device_is_there(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        assert len(stage.exports.continuing) == 1
        await stage.devices.detach("disk")
        assert not stage.exports.continuing

    play(tmp_path, scenario)


@pytest.mark.expects_warnings
def test_store_is_away_at_the_start_and_comes_back(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        stage.kernel.plug(0, str(Backend(OURS, VOLUME)))
        stage.exports.refusal = ExportError("away", "the store is away")
        await stage.start()
        (found,) = stage.devices.list()
        assert not found["served"] and found["problem"] == "the store is away"
        (tmp_path / "sys/block/nbd0/inflight").write_text("       0        3\n")
        with pytest.raises(VolumeBusy, match="the store is away; if that does not pass, restart"):
            await stage.devices.detach("/dev/nbd0")
        stage.exports.refusal = None
        await until(lambda: bool(stage.devices.list()[0]["served"]))
        assert stage.devices.list()[0]["problem"] is None

    play(tmp_path, scenario)


@pytest.mark.expects_warnings
def test_device_of_a_failed_volume_that_nobody_uses_is_detached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        stage.exports.refusal = ExportError("platform", "writes were not shipped and are kept")
        stage.kernel.sockets.pop(0).close()
        await until(lambda: stage.devices.list()[0]["problem"] is not None)
        opened = opener(tmp_path, "qemu-system-x86")
        with pytest.raises(VolumeBusy, match="open in qemu"):
            await stage.devices.detach("disk")
        opened.unlink()
        await stage.devices.detach("disk")
        assert stage.devices.list() == [] and not stage.links.exists()

    def exclusive(*arguments: object) -> None:
        raise AssertionError("to open it would wait for the volume")

    monkeypatch.setattr("millpond.nbd.devices.exclusive", exclusive)
    play(tmp_path, scenario)


def test_kernel_ignores_a_socket_while_the_old_one_lives(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        stage.kernel.plug(0, str(Backend(OURS, VOLUME)))
        stage.kernel.ignored = 3
        await stage.start()
        await until(lambda: 0 in stage.kernel.sockets and bool(stage.devices.list()[0]["served"]))
        assert stage.exports.opened == 4

    play(tmp_path, scenario)


def test_connection_ends_while_we_live(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        stage.kernel.sockets.pop(0).close()
        await until(lambda: 0 in stage.kernel.sockets and bool(stage.devices.list()[0]["served"]))
        assert stage.exports.opened == 2

    play(tmp_path, scenario)


@pytest.mark.expects_warnings
def test_answer_to_connect_is_lost(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        stage.kernel.answer_is_lost = True
        made = await stage.devices.attach("disk")
        assert made["device"] == "/dev/nbd0" and made["served"]
        assert (stage.links / "disk").is_symlink()

    play(tmp_path, scenario)


def test_kernel_is_too_old_for_backends(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        stage.kernel.is_old = True
        with pytest.raises(CacheError, match=r"need Linux 5\.14"):
            await stage.devices.attach("disk")
        assert stage.devices.list() == [] and stage.kernel.disconnects == 1
        assert not stage.kernel.sockets and not stage.links.exists()

    play(tmp_path, scenario)


def test_no_descriptor_is_left_for_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(stage: Stage) -> None:
        def full(*arguments: object) -> None:
            raise OSError(errno.EMFILE, "")

        monkeypatch.setattr("millpond.nbd.keeper.socket.socketpair", full)
        try:
            with pytest.raises(CacheError, match="Too many open files"):
                await stage.devices.attach("disk")
        finally:
            monkeypatch.undo()
        assert stage.exports.released == 1

    play(tmp_path, scenario)


@pytest.mark.expects_warnings
def test_device_is_disconnected_behind_our_back(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        stage.kernel.disconnect(0)
        await until(lambda: stage.devices.list() == [] and not stage.links.exists())

    play(tmp_path, scenario)


@pytest.mark.expects_warnings
@pytest.mark.parametrize(
    ("now", "says"),
    [
        (Export("disk", SIZE // 2, False, "", VOLUME), "made smaller"),
        (Export("disk", SIZE, True, "", VOLUME), "attached writable"),
    ],
)
def test_volume_that_a_guest_would_not_know_again_is_not_served(
    tmp_path: Path, now: Export, says: str
) -> None:
    async def scenario(stage: Stage) -> None:
        stage.kernel.plug(0, str(Backend(OURS, VOLUME)))
        stage.exports.export = now
        await stage.start()
        (found,) = stage.devices.list()
        assert not found["served"] and says in found["problem"]
        await asyncio.sleep(0.5)
        assert stage.exports.opened == stage.exports.released == 1, "an epoch at the store each"
        assert not stage.kernel.sockets

    play(tmp_path, scenario)


def test_volume_grew_while_nobody_served_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(stage: Stage) -> None:
        stage.kernel.plug(0, str(Backend(OURS, VOLUME)))
        stage.exports.export = Export("renamed", 2 * SIZE, False, "", VOLUME)
        await stage.start()
        (found,) = stage.devices.list()
        assert found["size_bytes"] == SIZE and found["volume"] == "renamed"
        await until(lambda: stage.devices.list()[0]["size_bytes"] == 2 * SIZE)
        assert stage.kernel.value(0, "size") == str(2 * SIZE // 512)

    monkeypatch.setattr("millpond.nbd.devices.GROW_POLL_S", 0.05)
    play(tmp_path, scenario)


@pytest.mark.expects_warnings
def test_volume_grows_while_its_device_waits_for_a_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        stage.exports.refusal = ExportError("platform", "the store is away")
        stage.kernel.sockets.pop(0).close()
        await until(lambda: not stage.devices.list()[0]["served"])
        stage.exports.export = Export("disk", 2 * SIZE, False, "", VOLUME)
        await asyncio.sleep(0.3)
        assert stage.kernel.value(0, "size") == str(SIZE // 512)
        stage.exports.refusal = None
        await until(lambda: stage.devices.list()[0]["size_bytes"] == 2 * SIZE)

    monkeypatch.setattr("millpond.nbd.devices.GROW_POLL_S", 0.05)
    play(tmp_path, scenario)


def test_device_in_use_is_not_detached_and_goes_on(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        (tmp_path / "sys/block/nbd0/dev").write_text("43:0")
        mounts = tmp_path / "proc" / "self" / "mountinfo"
        mounts.parent.mkdir(parents=True)
        mounts.write_text("24 1 43:0 / /srv/disk rw - ext4 /dev/nbd0 rw\n")
        with pytest.raises(VolumeBusy, match="/dev/nbd0 is mounted at /srv/disk"):
            await stage.devices.detach("disk")
        assert stage.devices.list()[0]["served"]
        stage.kernel.sockets.pop(0).close()
        await until(lambda: 0 in stage.kernel.sockets)
        await stage.devices.detach("disk", force=True)
        assert stage.devices.list() == []

    play(tmp_path, scenario)


def test_device_detached_by_force_and_still_open_stays_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        stage.kernel.held.add(0)
        await stage.devices.detach("disk", force=True)
        assert stage.kernel.marked, "a crash behind DISCONNECT must find the mark"
        assert stage.devices.list() == [] and not stage.links.exists()
        with pytest.raises(VolumeBusy, match="detached, but /dev/nbd0 is still in use"):
            await stage.devices.attach("disk")
        again = stage.another()
        again.take([])
        await again.start()
        assert again.list() == [] and 0 not in stage.kernel.sockets
        stage.kernel.let_go(0)
        assert (await again.attach("disk"))["served"]
        await asyncio.sleep(0.1)  # whoever watched for the end of the device sees a new one
        assert (stage.links / "disk").is_symlink()
        third = stage.another()
        await again.close()
        stage.kernel.sockets.pop(0).close()
        third.take([])
        await third.start()
        assert third.list()[0]["served"]
        await third.close()

    monkeypatch.setattr("millpond.nbd.devices.HELD_POLL_S", 0.02)
    play(tmp_path, scenario)


def test_nothing_is_left_of_a_device_that_is_let_go_after_its_detach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        stage.kernel.held.add(0)
        await stage.devices.detach("disk")  # udev, say, looks at it at this moment
        assert stage.devices.list() == []
        stage.kernel.let_go(0)
        await until(lambda: not (tmp_path / "run" / "millpond" / "devices").exists())

    monkeypatch.setattr("millpond.nbd.devices.HELD_POLL_S", 0.02)
    play(tmp_path, scenario)


def test_crash_between_the_mark_and_disconnect_by_force(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        backend = Backend(OURS, VOLUME)
        stage.kernel.plug(0, str(backend))
        DeviceLinks(Sysfs(str(tmp_path))).mark_detached(0, backend)
        await stage.start()
        assert stage.devices.list() == []
        await until(lambda: not (tmp_path / "run" / "millpond" / "devices").exists())
        assert stage.kernel.disconnects == 1

    play(tmp_path, scenario)


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


@pytest.mark.parametrize("name", ["(udev-worker)", "systemd-udevd"])
def test_udev_looks_at_the_device_that_its_user_has_just_closed(tmp_path: Path, name: str) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        opened = opener(tmp_path, name)
        asyncio.get_running_loop().call_later(0.3, opened.unlink)
        await stage.devices.detach("disk")
        assert not opened.is_symlink()

    play(tmp_path, scenario)


@pytest.mark.parametrize("name", ["qemu-system-x86", "(udev-worker)"])
def test_device_that_stays_open_is_not_detached(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        opener(tmp_path, name)
        with pytest.raises(VolumeBusy, match=f"/dev/nbd0 is open in {re.escape(name)}"):
            await stage.devices.detach("disk")
        assert stage.devices.list()[0]["served"]

    monkeypatch.setattr("millpond.nbd.devices.UDEV_WAIT_S", 0.2)
    play(tmp_path, scenario)


def test_connection_ends_while_a_detach_writes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(stage: Stage) -> None:
        @contextmanager
        def exclusive(sysfs: Sysfs, index: int) -> Iterator[None]:
            stage.kernel.sockets.pop(0).close()
            for _ in range(1000):
                if 0 in stage.kernel.sockets:
                    yield  # what was written has waited for a new connection
                    return
                time.sleep(0.01)
            raise AssertionError("nobody connects it again")

        monkeypatch.setattr("millpond.nbd.devices.exclusive", exclusive)
        await stage.devices.attach("disk")
        await stage.devices.detach("disk")
        assert stage.devices.list() == []

    play(tmp_path, scenario)


def test_force_ends_a_guest_that_is_stuck_and_the_detach_that_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(stage: Stage) -> None:
        waits = threading.Event()

        @contextmanager
        def exclusive(sysfs: Sysfs, index: int) -> Iterator[None]:
            waits.set()
            while not stage.kernel.disconnects:  # written back only by a log that is full
                time.sleep(0.01)
            raise CacheError("cannot be written back")
            yield

        monkeypatch.setattr("millpond.nbd.devices.exclusive", exclusive)
        await stage.devices.attach("disk")
        stage.kernel.is_stuck = True
        plain = asyncio.ensure_future(stage.devices.detach("disk"))
        await until(waits.is_set)
        async with asyncio.timeout(20):
            await stage.devices.detach("disk", force=True)
            with pytest.raises(CacheError, match="cannot be written back"):
                await plain
        assert stage.devices.list() == [] and stage.exports.opened == 1
        assert not (tmp_path / "run" / "millpond" / "devices").exists()

    play(tmp_path, scenario)


def test_connection_that_is_late_is_not_given_to_a_device_that_is_over(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        stage.kernel.gate.clear()  # the thread that gives the device a new connection is slow
        stage.kernel.sockets.pop(0).close()
        await until(lambda: stage.exports.opened == 2)
        forced = asyncio.ensure_future(stage.devices.detach("disk", force=True))
        await asyncio.sleep(0.1)
        stage.kernel.gate.set()
        await forced
        await until(lambda: not any("adopt" in each.name for each in threading.enumerate()))
        assert 0 not in stage.kernel.sockets and stage.devices.list() == []

    play(tmp_path, scenario)


def test_attached_again_while_the_engine_is_not_done_with_the_detached_device(
    tmp_path: Path,
) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        stage.exports.done.clear()
        detaching = asyncio.ensure_future(stage.devices.detach("/dev/nbd0"))
        await until(lambda: stage.kernel.disconnects == 1)
        with pytest.raises(VolumeBusy, match="disk is being attached or detached"):
            await stage.devices.attach("disk")
        stage.exports.done.set()
        await detaching
        await stage.devices.attach("disk")
        assert (stage.links / "disk").is_symlink() and stage.exports.released == 1

    play(tmp_path, scenario)


@pytest.mark.expects_warnings
def test_attached_again_before_its_keeper_has_seen_that_others_disconnected_it(
    tmp_path: Path,
) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        stage.exports.refusal = ExportError("platform", "the store is away")
        stage.kernel.sockets.pop(0).close()
        await until(lambda: stage.devices.list()[0]["problem"] is not None)
        await asyncio.sleep(0.2)  # so that its next attempt is later than what follows
        stage.kernel.disconnect(0)
        stage.exports.refusal = None
        await stage.devices.attach("disk")
        await asyncio.sleep(0.7)
        assert stage.exports.opened == 2, "two keepers have one device"
        assert stage.devices.list()[0]["served"] and (stage.links / "disk").is_symlink()

    play(tmp_path, scenario)


def test_attached_volume_is_renamed_and_another_has_its_name_now(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        stage.exports.export = Export("old", SIZE, False, "", VOLUME)
        stage.exports.others = [Export("disk", SIZE, False, "", OTHER)]
        made = await stage.devices.attach("disk")
        assert (made["device"], made["id"]) == ("/dev/nbd1", OTHER.hex())
        links = {each.name: each.readlink().name for each in stage.links.iterdir()}
        assert links == {"disk": "nbd1", "old": "nbd0"}
        stage.exports.others = [Export("new", SIZE, False, "", OTHER)]
        with pytest.raises(VolumeUnknown, match="disk is not attached"):
            await stage.devices.detach("disk")
        assert (await stage.devices.detach("new"))["device"] == "/dev/nbd1"
        assert [each["volume"] for each in stage.devices.list()] == ["old"]

    play(tmp_path, scenario)


def test_renamed_while_no_daemon_ran(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        await stage.devices.close()
        stage.kernel.sockets.pop(0).close()
        stage.exports.export = Export("old", SIZE, False, "", VOLUME)
        again = stage.another()
        again.take([])
        await again.start()
        await until((stage.links / "old").is_symlink)
        assert not (stage.links / "disk").is_symlink()
        await again.close()

    play(tmp_path, scenario)


def test_renamed_while_it_cannot_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        stage.exports.export = Export("old", SIZE, False, "", VOLUME)
        stage.exports.others = [Export("disk", SIZE, False, "", OTHER)]
        stage.exports.silent = True
        with pytest.raises(VolumeBusy, match="dev/millpond/disk leads to /dev/nbd0"):
            await stage.devices.attach("disk")
        assert len(stage.devices.list()) == 1 and stage.exports.released == 1

    monkeypatch.setattr("millpond.nbd.devices.NAMES_WAIT_S", 0.05)
    play(tmp_path, scenario)


def test_link_of_a_device_that_is_gone_is_removed_at_the_start(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        await stage.devices.close()
        stage.kernel.disconnect(0)
        again = stage.another()
        again.take([])
        await again.start()
        assert not stage.links.exists() and again.list() == []

    play(tmp_path, scenario)


@pytest.mark.parametrize(
    ("code", "binding", "kind", "says"),
    [
        (errno.ENOENT, True, CacheError, "modprobe nbd"),
        (errno.EPERM, False, NotPermitted, "CAP_SYS_ADMIN"),
        (errno.EPERM, True, NotPermitted, "CAP_SYS_ADMIN"),
        (errno.EBUSY, False, VolumeBusy, "/dev/nbd4 is in use"),
        (-errno.EINVAL, False, CacheError, "Invalid argument"),
    ],
)
def test_kernel_says_no(code: int, binding: bool, kind: type[CacheError], says: str) -> None:
    error = refusal(code, "/dev/nbd4", binding=binding)
    assert type(error) is kind and says in str(error)


def test_backend_of_others_is_not_ours() -> None:
    backend = Backend(OURS, VOLUME)
    assert Backend.parse(str(backend)) == backend
    for text in ("", "millpond", f"millpond/{OURS.hex()}", f"x{backend}", f"{backend}0"):
        assert Backend.parse(text) is None


def test_names_of_devices() -> None:
    assert [index_of(text) for text in ("/dev/nbd0", "nbd12", "3")] == [0, 12, 3]
    for text in ("", "/dev/vda", "/dev/nbd", "/dev/nbd0p1", "/dev/nbd-1", "/dev/../nbd1"):
        assert index_of(text) is None


NAMES = st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), min_size=1)


@given(NAMES, NAMES)
@example("disk-part1", "disk")
def test_link_of_any_volume_is_a_plain_file_name(first: str, second: str) -> None:
    one, two = link_name(first, OURS), link_name(second, THEIRS)
    assert one.isascii() and one.isprintable() and not set(one) & set("/ \"'$")
    assert not one.startswith(".") and 0 < len(one) <= 255
    assert one != two or first == second
    assert not re.search(r"-part[0-9]+$", one)


def test_link_of_a_name_too_long_for_a_file_is_the_id() -> None:
    assert link_name("ü" * 120, VOLUME) == VOLUME.hex()
    assert link_name("u" * 255, VOLUME) == "u" * 255
    assert link_name("u" * 249 + "-part1", VOLUME) == VOLUME.hex()


def test_links_of_names_that_need_an_escape() -> None:
    assert link_name("disk-part12", VOLUME) == "disk\\x2dpart12"
    assert link_name("disk-part1a", VOLUME) == "disk-part1a"
    assert link_name("a b.", VOLUME) == "a\\x20b."
