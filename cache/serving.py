"""The cache's exports: every volume of every store, opened by the first client that wants it.

Implements the protocols of exports.py for nbd/.

Failure modes become ExportError: unknown name; busy at another cache; away: the store, and the
same again may do; platform: the volume has failed here (the message says why); shutdown.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from millpond.cache import limits
from millpond.cache.continuing import Continuing
from millpond.cache.errors import (
    CacheError,
    StoreAway,
    VolumeBusy,
    VolumeRefused,
    VolumeUnknown,
    escaped,
)
from millpond.cache.exports import NOBODY, Agreed, Export, ExportError, Owner
from millpond.cache.replicas import VolumeRecord
from millpond.cache.stores import Found, Stores
from millpond.cache.tasks import Tasks
from millpond.cache.volumes import State, Volume
from millpond.native.engine import NativeError

log = logging.getLogger("millpond.cache")


class CacheExports:
    """Exports of one daemon; see exports.Exports."""

    def __init__(
        self,
        stores: Stores,
        volume_for: Callable[[Found], Volume],
        opened: Callable[[str], Found | None],
        continuing: Callable[[bytes], Continuing],
        tasks: Tasks,
        *,
        read_only: bool,
    ) -> None:
        self.closing = False
        self._stores = stores
        self._opened = opened  # by name
        self._continuing = continuing  # by id
        self._volume_for = volume_for
        self._tasks = tasks
        self._read_only = read_only
        self._refreshing = False

    def names(self) -> list[str]:
        """As last heard from the stores; asking refreshes it for the next one."""
        if not self._refreshing and not self._tasks.closing:
            self._refreshing = True
            self._tasks.spawn(self._refresh(), "refresh-exports")
        return self._stores.names

    async def describe(self, name: str) -> Export:
        """Look up at the stores; "" is the only volume."""
        return self._export((await self._find(name)).record)

    async def open(self, name: str) -> "CacheOpenExport":
        """Attach to the volume; the first client opens it at the store."""
        if self.closing:
            raise ExportError("shutdown", "this cache is shutting down")
        return await self._open(await self._find(name))

    async def _open(self, found: Found) -> "CacheOpenExport":
        record = found.record
        try:
            volume = self._volume_for(found)
            async with asyncio.timeout(limits.OPEN_WAIT_S):
                record = await volume.attach()
        except TimeoutError:
            raise ExportError(
                "away", f"volume {escaped(record.name)}: the store does not answer; try again"
            ) from None
        except CacheError as error:
            raise _export_error(error, record.name) from None
        return CacheOpenExport(self._export(record), volume)

    async def open_id(self, volume_id: bytes) -> "CacheOpenExport":
        """As open, by id."""
        if self.closing:
            raise ExportError("shutdown", "this cache is shutting down")
        label = volume_id.hex()
        try:
            found = await self._stores.find_id(volume_id)
            return await self._open(found)
        except CacheError as error:
            raise _export_error(error, label) from None

    async def grow(self, volume_ids: Sequence[bytes]) -> dict[bytes, Export]:
        """Hear from the stores whether volumes in use became larger, or have another name."""
        exports: dict[bytes, Export] = {}
        for found in await self._stores.list_heard():
            if found.record.volume_id in volume_ids:
                try:
                    volume = self._volume_for(found)
                except CacheError:
                    continue  # two stores have it: not a size to believe
                if volume.state is State.OPEN:
                    export = self._export(found.record)
                    exports[volume.id] = replace(export, size_bytes=await volume.grow())
        return exports

    def remember(
        self, volume_id: bytes, who: object, forsaken: Callable[[], Awaitable[None]]
    ) -> None:
        """He goes on with the volume, until forget(); see DeviceExports."""
        self._continuing(volume_id).remember(who, forsaken)

    def forget(self, volume_id: bytes, who: object) -> None:
        """He has ended."""
        self._continuing(volume_id).forget(who)

    async def look_up(self, name: str) -> Found:
        """A volume by name, on whichever store has it; CacheError."""
        return await self._stores.find(name)

    async def _refresh(self) -> None:
        try:
            await self._stores.list()
        except CacheError as error:
            log.debug("exports not refreshed reason=%s", escaped(str(error)))
        finally:
            self._refreshing = False

    def _export(self, record: VolumeRecord) -> Export:
        return Export(
            name=record.name,
            size_bytes=record.size_bytes,
            read_only=self._read_only,
            description=f"Millpond volume {record.id}",
            volume_id=record.volume_id,
        )

    async def _find(self, name: str) -> Found:
        try:
            if name:
                known = self._opened(name)
                return await (self._stores.find_open(known) if known else self._stores.find(name))
            every = await self._stores.list()
        except CacheError as error:
            raise _export_error(error, name) from None
        if len(every) != 1:
            raise ExportError(
                "unknown", f"there are {len(every)} volumes; ask for one of them by name"
            )
        return every[0]


class CacheOpenExport:
    """A volume that one client is attached to; see exports.OpenExport."""

    def __init__(self, export: Export, volume: Volume) -> None:
        self.export = export
        self._volume: Volume | None = volume

    def handover(
        self, sock: socket.socket, received: bytes, agreed: Agreed, owner: Owner = NOBODY
    ) -> None:
        """Give the socket to the engine."""
        volume, self._volume = self._volume, None
        assert volume is not None, "handed over or released before"
        try:
            volume.connect(sock, received, agreed, owner)
        except (NativeError, VolumeRefused) as error:
            log.warning("connection refused volume=%s reason=%s", volume.label, escaped(str(error)))
            owner.closed()
        finally:
            volume.detach()

    async def release(self) -> None:
        """The handshake failed after open.  Twice is harmless."""
        volume, self._volume = self._volume, None
        if volume is not None:
            volume.detach()


def _export_error(error: CacheError, name: str) -> ExportError:
    """A refusal of ours in the words of the handshake."""
    message = f"volume {escaped(name)}: {error}"
    if isinstance(error, VolumeBusy):
        return ExportError("busy", message)
    if isinstance(error, VolumeUnknown):
        return ExportError("unknown", message)
    if isinstance(error, StoreAway):
        return ExportError("away", message)
    return ExportError("platform", message)
