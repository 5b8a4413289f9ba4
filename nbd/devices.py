"""Volumes as /dev/nbdN: attach, keep served across restarts and lost connections, detach.

Rules: one socket per device: with two, the kernel kills one that is merely slow and sends the same
write twice.  The engine serves its end before the kernel has the other: CONNECT may be followed by
a partition scan at once, and whoever opens the device waits for it.  Nothing blocking on the event
loop.  A device belongs to the cache whose id is in its backend identifier; no other touches it.
README.md has what a crash between any two steps leaves behind.

Happy path:
    start() -> attach(volume) -> ... -> detach(volume) -> close()
Failure modes:
    the connection ends while we live (killed, fenced)   -> a new one, as at start
    the volume cannot be opened (its store is away)      -> again and again; the kernel queues I/O
    the kernel ignores a new socket, the old one lives   -> our end ends; again, a little later
    the device was disconnected behind our back          -> forgotten, with its link
    detached by force while somebody has it open         -> it fails all I/O, is never taken up
"""

import asyncio
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any, Literal

from millpond.cache.control import Handler, Request
from millpond.cache.errors import (
    AlreadyThere,
    CacheError,
    StoreAway,
    UnderWay,
    VolumeBusy,
    VolumeUnknown,
    escaped,
)
from millpond.cache.exports import DeviceExports, Export, ExportError, OpenExport
from millpond.cache.handover import Kept
from millpond.cache.tasks import Tasks
from millpond.nbd import keeper as keepers
from millpond.nbd import netlink as kernel_netlink
from millpond.nbd.devicelinks import DeviceLinks
from millpond.nbd.keeper import Keeper, Kernel
from millpond.nbd.limits import (
    ADOPT_WAIT_S,
    DEAD_TIMEOUT_S,
    DETACH_WAIT_S,
    GROW_POLL_S,
    HELD_POLL_S,
    NAMES_WAIT_S,
    UDEV_POLL_S,
    UDEV_WAIT_S,
)
from millpond.nbd.sysfs import Backend, KernelDevice, Sysfs, exclusive, index_of, is_udev
from millpond.nbd.worker import in_thread

_log = logging.getLogger(__name__)

_KINDS: dict[str, type[CacheError]] = {
    "unknown": VolumeUnknown,
    "busy": VolumeBusy,
    # Both pass: whoever asked tries again, and meets the store, or the next process.
    "away": StoreAway,
    "shutdown": StoreAway,
}
_ID = re.compile(r"[0-9a-f]{32}")

Doing = Literal["attach", "detach", "force"]


class KernelDevices:
    """All kernel devices of one daemon.  Event loop only."""

    def __init__(
        self,
        exports: DeviceExports,
        cache_id: bytes,
        tasks: Tasks,
        *,
        dead_timeout_s: int = DEAD_TIMEOUT_S,
        sysfs: Sysfs | None = None,
        netlink: "ModuleType | Any" = kernel_netlink,
    ) -> None:
        sysfs = sysfs or Sysfs()
        links = DeviceLinks(sysfs)
        self._kernel = Kernel(exports, tasks, sysfs, links, netlink, dead_timeout_s)
        self._cache_id = cache_id
        self._keepers: dict[int, Keeper] = {}
        self._busy: set[tuple[bytes, Doing]] = set()  # volumes
        self._grower: asyncio.Task[None] | None = None
        self._asking = asyncio.Lock()
        self._question: asyncio.Task[None] | None = None  # waits for its turn to be asked

    # -- the daemon's start and end

    def take(self, guests: Sequence[Kept]) -> Sequence[Kept]:
        """Before anything else: find the devices that an earlier process of this cache left.

        guests: connections of the process before.  Those of devices are kept here; the others.
        """
        kept = {each.tag: each for each in guests if Backend.parse(each.tag) is not None}
        others = [each for each in guests if kept.get(each.tag) is not each]
        for device, backend in self._ours():
            if not self._kernel.links.is_detached(device.index, backend):
                keeper = Keeper(self._kernel, device, backend, backend.volume_id.hex())
                keeper.kept = kept.pop(device.backend, None)
                self._add(keeper)
        for stranger in kept.values():  # its device is gone
            os.close(stranger.fd)
        return others

    async def start(self) -> None:
        """Serve the devices that take() found; waits a moment for them.

        Whoever hears that the daemon is ready finds them served, unless a store is away.
        """
        ours = self._ours()
        if ours:
            # Imports belong to the start: after it, a guest would wait for them.
            await in_thread(self._kernel.netlink.load, "load-netlink")
        for keeper in self._keepers.values():
            keeper.keep()
        there = {(device.index, backend) for device, backend in ours}
        for index, backend in self._kernel.links.stale(self._cache_id):
            if (index, backend) not in there:
                self._kernel.links.remove(index, backend)
        for device, backend in ours:
            if device.index not in self._keepers:
                await self._end_again(device.index, backend)
        if self._keepers:
            await self._wait_settled()

    def _ours(self) -> "list[tuple[KernelDevice, Backend]]":
        every = ((each, Backend.parse(each.backend)) for each in self._kernel.sysfs.devices())
        return [
            (device, backend)
            for device, backend in every
            if backend is not None and backend.cache_id == self._cache_id
        ]

    async def _wait_settled(self) -> None:
        _log.info("taking up kernel devices count=%d", len(self._keepers))
        waits = [asyncio.ensure_future(each.settled.wait()) for each in self._keepers.values()]
        _, late = await asyncio.wait(waits, timeout=ADOPT_WAIT_S)
        for wait in late:
            wait.cancel()

    async def close(self) -> "list[Kept]":
        """Leave the devices to the next process: the kernel lets I/O wait meanwhile.

        Connections of the process before that never came to be served: the caller's again.
        """
        if self._grower is not None:
            self._grower.cancel()
        for keeper in list(self._keepers.values()):
            await keeper.pause()
        return [each.kept for each in self._keepers.values() if each.kept is not None]

    def list(self) -> "list[dict[str, Any]]":
        """As `millpond device list --json` prints them."""
        return [self._describe(keeper) for _, keeper in sorted(self._keepers.items())]

    # -- attach

    async def attach(
        self, name: str, *, device: str = "", read_only: bool = False
    ) -> dict[str, Any]:
        """Make a volume a block device; as list() describes it.  CacheError.

        name: or the volume's id, which its link is called when the name is too long for a file's.
        """
        index = self._free_index(device) if device else None
        await self.refresh()  # a device of another volume may have had the name
        opened = await self._open(name)
        volume_id = opened.export.volume_id
        try:
            with self._claim("attach", volume_id, f"volume {escaped(name)}"):
                await self._check_new(opened.export)
                await self._forget_old(volume_id)
                keeper = await keepers.connect(
                    self._kernel, opened, self._cache_id, index=index, read_only=read_only
                )
                self._add(keeper)
        except BaseException:
            await opened.release()
            raise
        _log.info("attached volume=%s device=%s", escaped(keeper.name), keeper.path)
        return self._describe(keeper)

    async def _open(self, name: str) -> OpenExport:
        if not name:
            raise VolumeUnknown("name the volume to attach")
        exports = self._kernel.exports
        try:
            try:
                return await exports.open(name)
            except ExportError as error:
                if error.code != "unknown" or not _ID.fullmatch(name):
                    raise
            return await exports.open_id(bytes.fromhex(name))
        except ExportError as error:
            raise _KINDS.get(error.code, CacheError)(error.message) from None

    def _free_index(self, device: str) -> int:
        """Before the volume is opened: a wrong or busy device costs nothing."""
        index = index_of(device)
        if index is None:
            raise CacheError(f"{escaped(device)} is no NBD device: they are called /dev/nbdN")
        kept = self._keepers.get(index)
        if kept is not None:
            raise VolumeBusy(f"{kept.path} is volume {escaped(kept.name)} already")
        if self._kernel.sysfs.device(index) is not None:
            raise VolumeBusy(f"/dev/nbd{index} is in use by another NBD client")
        return index

    async def _check_new(self, export: Export) -> None:
        kernel, name = self._kernel, export.name
        backend = Backend(self._cache_id, export.volume_id)
        for device in kernel.sysfs.devices():
            if device.backend != str(backend):
                continue
            if kernel.links.is_detached(device.index, backend):
                users = await in_thread(partial(kernel.sysfs.users, device.index), "find-users")
                raise VolumeBusy(
                    f"volume {escaped(name)} was detached, but /dev/nbd{device.index} is still"
                    f" {users or 'in use'}"
                )
            how = ", read-only" if device.read_only else ""
            raise AlreadyThere(
                f"volume {escaped(name)} is attached already as /dev/nbd{device.index}{how}"
            )
        conflict = await in_thread(partial(kernel.links.conflict, name, backend), "look-at-link")
        if conflict:
            link = kernel.links.path_of(name, export.volume_id)
            raise VolumeBusy(f"{escaped(link)} leads to {conflict}, which has another volume")
        # A mark of an earlier device of this volume would be taken for one of the new device.
        await in_thread(lambda: kernel.links.drop_detached(backend), "drop-marks")

    def _add(self, keeper: Keeper) -> None:
        keeper.gone = self._gone
        self._keepers[keeper.index] = keeper
        self._kernel.exports.remember(
            keeper.backend.volume_id, keeper, lambda: self._forsaken(keeper)
        )
        if self._grower is None:
            self._grower = self._kernel.tasks.spawn(self._grow_for_ever(), "grow-kernel-devices")

    # -- detach

    async def detach(self, target: str, *, force: bool = False) -> dict[str, Any]:
        """Disconnect a device, named by its volume, its path or its link.  CacheError.

        force: also one that is in use or waits; what is not written is lost.
        """
        await self.refresh()
        keeper = self._find(target)
        described = self._describe(keeper)
        if force:
            with self._claim("force", keeper.backend.volume_id, keeper.path):
                await self._detach_by_force(keeper)
        else:
            with self._claim("detach", keeper.backend.volume_id, keeper.path):
                await self._detach(keeper)
        _log.info("detached volume=%s device=%s", escaped(keeper.name), keeper.path)
        return described

    async def _detach(self, keeper: Keeper) -> None:
        loop = asyncio.get_running_loop()

        def pause() -> None:
            asyncio.run_coroutine_threadsafe(keeper.pause(), loop).result()

        def disconnect() -> None:
            users = self._users(keeper.index)
            if users:
                raise VolumeBusy(f"{keeper.path} is {users}")
            if not keeper.served:
                self._check_unused(keeper)
                pause()
                keeper.disconnect()
                return
            with exclusive(self._kernel.sysfs, keeper.index):
                # Not before: what is written back here waits for the keeper, if the connection
                # ends meanwhile.
                pause()
                keeper.disconnect()

        try:
            await in_thread(disconnect, f"detach-{keeper.path}")
        except CacheError:
            keeper.resume()
            raise
        await keeper.ended(DETACH_WAIT_S)
        await self._forget(keeper)

    def _check_unused(self, keeper: Keeper) -> None:
        """No connection, no user: nothing is lost, if nothing waits to be written either.

        Whoever closes it, or unmounts it, is no user any more while that waits.
        """
        if not self._kernel.sysfs.is_idle(keeper.index):
            raise VolumeBusy(
                f"{keeper.path} waits for its volume: {keeper.problem or 'not served yet'}; if"
                " that does not pass, restart the cache, or --force, which fails what waits"
            )

    def _users(self, index: int) -> str:
        """As Sysfs.users, without udev's look behind the last close.  Worker thread."""
        for _ in range(round(UDEV_WAIT_S / UDEV_POLL_S)):
            users = self._kernel.sysfs.users(index)
            if not is_udev(users):
                return users
            time.sleep(UDEV_POLL_S)
        return users

    async def _detach_by_force(self, keeper: Keeper) -> None:
        """Also one that a plain detach is stuck in: what that waits for fails."""
        kernel = self._kernel
        await keeper.pause()
        # Before DISCONNECT: else a crash between the two would bring a device back to life whose
        # user has had errors.  The other way round the next start disconnects it.
        try:
            await in_thread(
                lambda: kernel.links.mark_detached(keeper.index, keeper.backend), "mark"
            )
        except CacheError:
            keeper.resume()
            raise
        keeper.over = True
        try:
            await in_thread(keeper.disconnect_by_force, f"force-{keeper.path}")
        except CacheError as error:
            keeper.problem = f"half detached, detach --force again: {error}"
            raise
        await keeper.ended(DETACH_WAIT_S)
        await self._forget(keeper)

    def _find(self, target: str) -> Keeper:
        for keeper in self._keepers.values():
            if target in (keeper.name, keeper.backend.volume_id.hex(), keeper.path):
                return keeper
        for keeper in self._keepers.values():
            link = self._kernel.links.path_of(keeper.name, keeper.backend.volume_id)
            if os.path.normpath(target) == link:
                return keeper
        raise VolumeUnknown(f"{escaped(target)} is not attached here")

    def _gone(self, keeper: Keeper) -> None:
        self._kernel.tasks.spawn(self._forget(keeper), f"forget-{keeper.path}")

    async def _forsaken(self, keeper: Keeper) -> None:
        """Others have written to the volume: what is mounted here would write over it."""
        _log.error(
            "kernel device ended device=%s volume=%s reason=%s",
            keeper.path,
            escaped(keeper.name),
            '"another host has written to the volume since; what is not written here is lost"',
        )
        try:
            await self._detach_by_force(keeper)
        except CacheError as error:  # whatever is wrong with it, we do not serve it
            _log.error("%s stays, without us reason=%s", keeper.path, escaped(str(error)))
            keeper.over = True
            await keeper.pause()
            await self._forget(keeper)

    async def _forget(self, keeper: Keeper) -> None:
        self._kernel.exports.forget(keeper.backend.volume_id, keeper)
        try:
            if not await in_thread(keeper.unlink, f"unlink-nbd{keeper.index}"):
                self._spawn_let_go(keeper.index, keeper.backend)
        except CacheError as error:
            _log.warning("a restart may take it up again reason=%s", escaped(str(error)))
        if self._keepers.get(keeper.index) is keeper:  # another volume's may be there
            del self._keepers[keeper.index]
            keeper.drop_kept()

    async def _forget_old(self, volume_id: bytes) -> None:
        """The kernel has no device of a volume; a keeper that has not seen it yet would take the
        next one for its own."""
        for keeper in list(self._keepers.values()):
            if keeper.backend.volume_id == volume_id:
                await keeper.pause()
                await self._forget(keeper)

    async def _end_again(self, index: int, backend: Backend) -> None:
        """The process before may have died between the mark and its DISCONNECT.

        Waited for: later, the number may be another device's.
        """
        try:
            await in_thread(partial(self._kernel.netlink.disconnect, index), f"end-nbd{index}")
        except CacheError as error:
            _log.warning("not disconnected device=nbd%d reason=%s", index, escaped(str(error)))
        self._spawn_let_go(index, backend)

    def _spawn_let_go(self, index: int, backend: Backend) -> None:
        self._kernel.tasks.spawn(self._let_go(index, backend), f"let-go-nbd{index}")

    async def _let_go(self, index: int, backend: Backend) -> None:
        """Take the mark away when nobody has the device any more."""
        kernel = self._kernel
        while kernel.links.is_detached(index, backend):
            if not kernel.sysfs.has(index, backend):
                await in_thread(lambda: kernel.links.drop_detached(backend), "drop-marks")
                return
            await asyncio.sleep(HELD_POLL_S)

    # -- what becomes of the volumes

    async def _grow_for_ever(self) -> None:
        """Nobody tells a cache that a volume became larger, or was renamed: ask the stores."""
        while True:
            await asyncio.sleep(GROW_POLL_S)
            await self.refresh()

    async def refresh(self) -> None:
        """Hear of names and sizes as they are now, unless that takes long."""
        if not self._keepers:
            return
        if self._question is None:
            self._question = self._kernel.tasks.spawn(self._ask_stores(), "ask-for-names")
        await asyncio.wait([self._question], timeout=NAMES_WAIT_S)

    async def _ask_stores(self) -> None:
        async with self._asking:
            self._question = None  # who comes from here on may know of something newer
            keepers = {each.backend.volume_id: each for each in self._keepers.values()}
            try:
                exports = await self._kernel.exports.grow(list(keepers))
                for volume_id, export in exports.items():
                    await keepers[volume_id].learn(export)
            except (CacheError, ExportError) as error:
                _log.warning("a kernel device did not grow reason=%s", escaped(str(error)))

    # -- helpers

    @contextmanager
    def _claim(self, doing: Doing, volume_id: bytes, label: str) -> Iterator[None]:
        """One attach or detach of a volume at a time; force may come to the help of a detach."""
        beside = "detach" if doing == "force" else None
        if any(each == volume_id and work != beside for each, work in self._busy):
            raise UnderWay(f"{label} is being attached or detached at the moment")
        self._busy.add((volume_id, doing))
        try:
            yield
        finally:
            self._busy.discard((volume_id, doing))

    def _describe(self, keeper: Keeper) -> dict[str, Any]:
        return {
            "device": keeper.path,
            "volume": keeper.name,
            "id": keeper.backend.volume_id.hex(),
            "link": self._kernel.links.path_of(keeper.name, keeper.backend.volume_id),
            "size_bytes": keeper.size_bytes,
            "read_only": keeper.read_only,
            "served": keeper.served,
            "problem": keeper.problem or None,
        }


def handlers_of(devices: KernelDevices) -> dict[str, Handler]:
    """Its operations of the control socket."""

    async def attach(request: Request) -> dict[str, Any]:
        return await devices.attach(
            request.volume, device=request.device, read_only=request.read_only
        )

    async def detach(request: Request) -> dict[str, Any]:
        return await devices.detach(request.volume, force=request.force)

    async def list_devices(request: Request) -> dict[str, Any]:
        await devices.refresh()
        return {"devices": devices.list()}

    return {"attach": attach, "detach": detach, "devices": list_devices}
