"""The stores behind a volume, addressed as a set everywhere.

Rules: opening is compare-and-swap on every recorded in-sync member; "dirty" is on record only when
every in-sync member has it; an unknown volume is never an empty one.  This version keeps sets of
one: a second member is refused at construction, so that nobody believes in a copy that is not
there.

Failure modes: a member that cannot be reached: StoreAway (with a set of one there is no survivor to
record it as out of date on, so everybody waits); it refuses: VolumeBusy, VolumeFenced,
VolumeRefused.
"""

import logging
from collections.abc import Sequence
from typing import Any

import msgspec

from millpond.cache import limits
from millpond.cache.destage import DestageStream
from millpond.cache.errors import (
    CacheError,
    StoreAway,
    VolumeBusy,
    VolumeFenced,
    VolumeRefused,
    VolumeUnknown,
    escaped,
)
from millpond.cache.fetch import FetchStream
from millpond.cache.links import ControlLink, Identity
from millpond.native.engine import Engine
from millpond.store.errors import Code, StoreError

log = logging.getLogger("millpond.cache")


class VolumeRecord(msgspec.Struct, frozen=True):
    """A volume as a store's catalogue tells it; unknown fields are from the future."""

    name: str
    id: str
    size_bytes: int
    epoch: int
    lineage: int
    applied_sequence: int
    dirty_holder: str | None = None
    open_holder: str | None = None
    # Writable opens, oldest first: lineage, and the sequence that it began with.
    lineages: tuple[tuple[int, int], ...] = ()

    @property
    def volume_id(self) -> bytes:
        """The id as the engine has it."""
        return bytes.fromhex(self.id)


class StoreNode:
    """One store as this cache uses it: control, fetch and destage connections."""

    def __init__(self, address: str, *, index: int, engine: Engine, identity: Identity) -> None:
        self.address = address
        self.index = index
        self.control = ControlLink(address, identity)
        self.fetch = FetchStream(address, identity, engine=engine, store=index)
        self.destage = DestageStream(address, identity)

    async def find(
        self, *, name: str | None = None, volume_id: bytes | None = None
    ) -> VolumeRecord:
        """A volume by name or id; VolumeRefused when the store has none such."""
        selector = {"name": name} if name is not None else {"id": (volume_id or b"").hex()}
        return await self.volume_call("volume.show", name or (volume_id or b"").hex(), **selector)

    async def list(self) -> list[VolumeRecord]:
        """Every volume of the store."""
        try:
            reply = await self.control.call("volume.list")
        except StoreError as error:
            raise _refusal(error, "all") from None
        return msgspec.convert(reply["volumes"], list[VolumeRecord])

    async def volume_call(self, op: str, label: str, **arguments: Any) -> VolumeRecord:
        """A call that answers with a volume; the store's refusals become ours."""
        try:
            reply = await self.control.call(op, **arguments)
        except StoreError as error:
            raise _refusal(error, label) from None
        return msgspec.convert(reply["volume"], VolumeRecord)


class ReplicaSet:
    """The in-sync stores of one volume."""

    def __init__(self, members: Sequence[StoreNode]) -> None:
        if len(members) != 1:
            raise CacheError("one store per volume in this version")
        self.in_sync = tuple(members)

    @property
    def fetch_store(self) -> int:
        """Whose fetch stream carries the misses."""
        return self.in_sync[0].index

    @property
    def addresses(self) -> list[str]:
        """For people."""
        return [member.address for member in self.in_sync]

    @property
    def destage(self) -> tuple[DestageStream, ...]:
        """Where each batch goes."""
        return tuple(member.destage for member in self.in_sync)

    async def show(self, volume_id: bytes) -> VolumeRecord:
        """The newest state on record."""
        records = [await member.find(volume_id=volume_id) for member in self.in_sync]
        return max(records, key=lambda record: (record.epoch, record.applied_sequence))

    async def open(
        self,
        record: VolumeRecord,
        *,
        cache_id: bytes,
        lineage: int,
        first_sequence: int | None,
    ) -> VolumeRecord:
        """Compare-and-swap record.epoch + 1 on every member; durable when this returns."""
        opened = [
            await member.volume_call(
                "volume.open",
                record.name,
                id=record.id,
                cache_id=cache_id.hex(),
                lineage=lineage,
                first_sequence=first_sequence,
                expected_epoch=record.epoch,
                accept_loss=False,
            )
            for member in self.in_sync
        ]
        return opened[0]

    async def record_dirty(
        self, record: VolumeRecord, *, cache_id: bytes, dirty: bool
    ) -> VolumeRecord:
        """Put on every member's record, durably, whether this cache may hold unshipped writes."""
        changed = [
            await member.volume_call(
                "volume.dirty",
                record.name,
                id=record.id,
                epoch=record.epoch,
                cache_id=cache_id.hex(),
                dirty=dirty,
            )
            for member in self.in_sync
        ]
        return changed[0]

    async def close(self, record: VolumeRecord, *, cache_id: bytes) -> None:
        """Everything is there: give the volume back."""
        for member in self.in_sync:
            await member.volume_call(
                "volume.close",
                record.name,
                id=record.id,
                epoch=record.epoch,
                cache_id=cache_id.hex(),
            )


def _refusal(error: StoreError, label: str) -> CacheError:
    """The store's no, by what the caller can do about it."""
    match error.code:
        case Code.BUSY | Code.DIRTY:
            return VolumeBusy(error.message)
        case Code.EPOCH:
            return VolumeFenced(error.message)
        case Code.NOT_FOUND:
            return VolumeUnknown(error.message)
        case Code.IO | Code.FULL:
            log.warning("store refused volume=%s reason=%s", escaped(label), escaped(error.message))
            return StoreAway(error.message)
    return VolumeRefused(error.message)


async def store_status(node: StoreNode) -> dict[str, Any]:
    """The store's counters, or why there are none; never waits long."""
    try:
        reply = await node.control.call("status", timeout_s=limits.STATUS_STORE_TIMEOUT_S)
    except (StoreAway, StoreError) as error:
        return {"error": str(error)}
    counters = reply.get("store", {})
    return dict(counters) if isinstance(counters, dict) else {}
