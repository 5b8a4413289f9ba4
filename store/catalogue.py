"""The catalogue: who may create, open, change and delete, as compare-and-swap over the core's log.

The core holds the truth: a volume's state is a record in its log, put whole and durable before
the reply. This module decides whether a change is allowed and puts the new state; it keeps only
the index of names, which nobody else changes.

Rules: one change of a volume at a time (a lock per volume is held from reading the committed
state to the core's reply), so compare and swap are one step. Nothing is answered before it is
durable. A change, once put, is waited for: the caller must not cancel it (server.py does not).
Happy path: read state, check, edit a copy, put, answer with the committed state.
Failure modes: E_NOT_FOUND, E_EXISTS, E_EPOCH (someone opened since), E_BUSY (open elsewhere),
E_DIRTY (writes that only another cache holds), E_INVALID, E_FULL, E_IO (the core has stopped).
"""

import asyncio
import secrets
from collections.abc import Callable
from typing import Protocol
from weakref import WeakValueDictionary

from millpond.native import lib
from millpond.native.store import NO_ID, Lineage, VolumeState
from millpond.store import limits, wire
from millpond.store.errors import Code, StoreError, one_line

BLOCK_BYTES: int = lib.MP_BLOCK_BYTES
LINEAGES_MAX: int = lib.MP_LINEAGES
LINEAGE_MAX = 2**64 - 1


class CatalogueCore(Protocol):
    """What the catalogue needs of the store core (link.py over the real one)."""

    async def request(self, frame_type: int, payload: bytes) -> wire.Frame:
        """One frame on connection 0 and its reply."""

    def volume(self, volume_id: bytes) -> VolumeState | None:
        """Committed state, None when unknown."""

    def volumes(self) -> list[VolumeState]:
        """Committed states of all volumes."""


def new_id() -> bytes:
    """A random 128-bit volume id, never reused: the one door for this randomness."""
    while True:
        volume_id = secrets.token_bytes(16)
        if volume_id != NO_ID:
            return volume_id


def check_name(name: str) -> None:
    """A volume name is 1 to 255 bytes of UTF-8 without control characters or '/'."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        raise StoreError(Code.INVALID, "a volume name must be valid UTF-8") from None
    shown = repr(one_line(name, limit=80))
    if not 1 <= len(encoded) <= limits.NAME_BYTES_MAX:
        raise StoreError(
            Code.INVALID,
            f"volume name {shown} has {len(encoded)} bytes; 1 to {limits.NAME_BYTES_MAX} allowed",
        )
    if name in (".", "..") or "/" in name:
        raise StoreError(Code.INVALID, f"volume name {shown} must not be '.', '..' or hold a '/'")
    if any(ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 or c in "\u2028\u2029" for c in name):
        raise StoreError(Code.INVALID, f"volume name {shown} holds control characters")


def check_size(size_bytes: int) -> None:
    """A volume is a whole number of blocks, at least one."""
    if not BLOCK_BYTES <= size_bytes <= limits.VOLUME_BYTES_MAX or size_bytes % BLOCK_BYTES:
        raise StoreError(
            Code.INVALID,
            f"a volume of {size_bytes} bytes cannot be: the size is a multiple of {BLOCK_BYTES},"
            f" at least {BLOCK_BYTES} and at most {limits.VOLUME_BYTES_MAX}",
        )


class Catalogue:
    """Volumes of one store. All functions: event loop only."""

    def __init__(self, core: CatalogueCore, *, make_id: Callable[[], bytes] = new_id) -> None:
        self._core = core
        self._make_id = make_id
        self._locks: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()
        self._ids_by_name: dict[str, bytes] = {}
        for state in core.volumes():
            self._ids_by_name[state.name] = state.id

    # -- reading

    def list(self) -> list[VolumeState]:
        """Every volume, by name."""
        return sorted(self._core.volumes(), key=lambda state: state.name)

    def get(self, volume_id: bytes) -> VolumeState:
        """The committed state of a volume."""
        state = self._core.volume(volume_id)
        if state is None:
            raise StoreError(Code.NOT_FOUND, f"no volume with id {volume_id.hex()}")
        return state

    def find(self, *, name: str | None, volume_id: bytes | None) -> VolumeState:
        """A volume by name or by id, exactly one of them."""
        if (name is None) == (volume_id is None):
            raise StoreError(Code.INVALID, "give either the name or the id of a volume")
        if volume_id is not None:
            return self.get(volume_id)
        assert name is not None
        known = self._ids_by_name.get(name)
        state = self._core.volume(known) if known is not None else None
        if state is None:
            raise StoreError(Code.NOT_FOUND, f"no volume named {_quote(name)}")
        return state

    # -- changing

    async def create(self, name: str, size_bytes: int) -> VolumeState:
        """A new, empty volume."""
        check_name(name)
        check_size(size_bytes)
        if name in self._ids_by_name:
            raise StoreError(Code.EXISTS, f"volume {_quote(name)} exists already")
        if len(self._ids_by_name) >= limits.VOLUMES_MAX:
            raise StoreError(
                Code.FULL, f"the store holds {limits.VOLUMES_MAX} volumes; delete some first"
            )
        volume_id = self._make_id()
        # Taken before the first await: of two creations of one name, one is too late.
        self._ids_by_name[name] = volume_id
        try:
            state = VolumeState(id=volume_id, name=name, size_bytes=size_bytes)
            return await self._put(state)
        except BaseException:
            if self._core.volume(volume_id) is None:
                del self._ids_by_name[name]
            raise

    async def open(
        self,
        volume_id: bytes,
        *,
        cache_id: bytes,
        lineage: int,
        first_sequence: int | None,
        expected_epoch: int,
        accept_loss: bool,
    ) -> VolumeState:
        """Open for writing: epoch + 1 and a new lineage, unless someone else was faster."""
        if not 1 <= lineage <= LINEAGE_MAX:
            raise StoreError(Code.INVALID, "a lineage is a random number of 1 to 64 bits")

        async with self._lock(volume_id):
            state = self.get(volume_id)
            _check_epoch(state, expected_epoch)
            if not accept_loss:
                _check_not_held(state, cache_id)
            if any(known.id == lineage for known in state.lineages):
                raise StoreError(
                    Code.INVALID,
                    f"lineage {lineage} of volume {_quote(state.name)} was used before; every"
                    " writable open takes a new one",
                )
            keeps_dirty = state.dirty_holder == cache_id
            wanted = state.with_changes(
                epoch=state.epoch + 1,
                open_holder=cache_id,
                dirty_holder=cache_id if keeps_dirty else NO_ID,
                lineages=_lineages(state, lineage, first_sequence),
            )
            committed = await self._put(wanted)
            if committed.applied_sequence != state.applied_sequence:
                # A batch of the old writer slipped in before the fence: the new lineage starts
                # behind it. Nothing can slip in any more.
                known = _lineages(committed, lineage, first_sequence)
                committed = await self._put(committed.with_changes(lineages=known))
            return committed

    async def set_dirty(
        self, volume_id: bytes, *, epoch: int, cache_id: bytes, dirty: bool
    ) -> VolumeState:
        """Record that a cache may (or no longer can) hold writes that the store has not."""

        def decide(state: VolumeState) -> VolumeState:
            _check_epoch(state, epoch)
            _check_holder(state, cache_id)
            return state.with_changes(dirty_holder=cache_id if dirty else NO_ID)

        return await self._change(volume_id, decide)

    async def close(self, volume_id: bytes, *, epoch: int, cache_id: bytes) -> VolumeState:
        """The writer is done, everything it acknowledged is here. Closing twice is no error."""

        def decide(state: VolumeState) -> VolumeState:
            _check_epoch(state, epoch)
            if state.open_holder == NO_ID and state.dirty_holder == NO_ID:
                return state
            _check_holder(state, cache_id)
            keeps = state.dirty_holder if state.dirty_holder != cache_id else NO_ID
            return state.with_changes(open_holder=NO_ID, dirty_holder=keeps)

        return await self._change(volume_id, decide)

    async def resize(self, volume_id: bytes, *, size_bytes: int, shrink: bool) -> VolumeState:
        """Another size.  Growing is always possible, also under a guest: it sees the new size with
        its next connection.  Shrinking drops what lies behind the new end, only when told, and
        only while nobody can have writes for it: closed and not dirty.  It takes an epoch, as if
        somebody had opened the volume, so that no cache trusts what it remembers of the old end.
        """
        check_size(size_bytes)

        def decide(state: VolumeState) -> VolumeState:
            if size_bytes >= state.size_bytes:
                return state.with_changes(size_bytes=size_bytes)
            _check_may_shrink(state, size_bytes, told=shrink)
            return state.with_changes(size_bytes=size_bytes, epoch=state.epoch + 1)

        return await self._change(volume_id, decide)

    async def rename(self, volume_id: bytes, new_name: str) -> VolumeState:
        """Another name for the same volume, open or not; its id, and so its identity, stays."""
        check_name(new_name)
        async with self._lock(volume_id):
            state = self.get(volume_id)
            if state.name == new_name:
                return state
            if new_name in self._ids_by_name:
                raise StoreError(Code.EXISTS, f"volume {_quote(new_name)} exists already")
            # Taken before the first await, as in create; both names lead here until it is durable.
            self._ids_by_name[new_name] = volume_id
            try:
                committed = await self._put(state.with_changes(name=new_name))
            except BaseException:
                found = self._core.volume(volume_id)
                if found is None or found.name != new_name:
                    del self._ids_by_name[new_name]
                raise
            del self._ids_by_name[state.name]
            return committed

    async def delete(self, volume_id: bytes, *, force: bool) -> VolumeState:
        """Delete a volume; an open or dirty one only by force. Returns its last state."""
        async with self._lock(volume_id):
            state = self.get(volume_id)
            if state.open_holder != NO_ID and not force:
                raise StoreError(
                    Code.BUSY,
                    f"volume {_quote(state.name)} is open at cache {state.open_holder.hex()};"
                    " close it there first, or delete it by force",
                )
            if state.dirty_holder != NO_ID and not force:
                raise StoreError(
                    Code.DIRTY,
                    f"volume {_quote(state.name)} has writes that only cache"
                    f" {state.dirty_holder.hex()} holds; close it there first, or delete by force",
                )
            reply = await self._core.request(wire.DELETE_VOLUME, volume_id)
            _check_status(reply, state)
            if self._ids_by_name.get(state.name) == volume_id:
                del self._ids_by_name[state.name]
            return state

    # -- below

    def _lock(self, volume_id: bytes) -> asyncio.Lock:
        lock = self._locks.get(volume_id)
        if lock is None:
            lock = self._locks[volume_id] = asyncio.Lock()
        return lock

    async def _change(
        self, volume_id: bytes, decide: Callable[[VolumeState], VolumeState]
    ) -> VolumeState:
        """Compare and swap: decide on the committed state, put the result."""
        async with self._lock(volume_id):
            state = self.get(volume_id)
            wanted = decide(state)
            if wanted == state:
                return state  # durable already
            return await self._put(wanted)

    async def _put(self, wanted: VolumeState) -> VolumeState:
        reply = await self._core.request(wire.PUT_VOLUME, wanted.encode())
        _check_status(reply, wanted)
        committed = self.get(wanted.id)
        assert committed.epoch == wanted.epoch, "the core committed another epoch than was put"
        assert committed.open_holder == wanted.open_holder
        assert committed.dirty_holder == wanted.dirty_holder
        assert (committed.size_bytes, committed.name) == (wanted.size_bytes, wanted.name)
        return committed


def _quote(name: str) -> str:
    return f"'{one_line(name, limit=300)}'"


def _lineages(state: VolumeState, lineage: int, first_sequence: int | None) -> tuple[Lineage, ...]:
    """The lineages on record after an open; the core refuses batches of any other.

    A lineage that starts where the new one starts, or later, wrote nothing that counts. Of the
    others, those before the newest applied one are history and the first to be forgotten.
    """
    next_sequence = state.applied_sequence + 1
    first = next_sequence if first_sequence is None else first_sequence
    name = _quote(state.name)
    if not next_sequence <= first <= LINEAGE_MAX:
        raise StoreError(
            Code.INVALID,
            f"volume {name} cannot be opened at sequence {first}: the store has applied up to"
            f" {state.applied_sequence}",
        )
    applied = state.lineage
    kept = [
        known
        for known in state.lineages
        if known.id == applied or (known.first_sequence < first and known.id != lineage)
    ]
    history = next((at for at, known in enumerate(kept) if known.id == applied), 0)
    kept = kept[min(history, max(0, len(kept) + 1 - LINEAGES_MAX)) :]
    if len(kept) >= LINEAGES_MAX:
        raise StoreError(
            Code.BUSY,
            f"volume {name} was opened {LINEAGES_MAX} times without shipping what was written;"
            " its holder must ship first, or its loss be accepted",
        )
    return (*kept, Lineage(lineage, first))


def _check_epoch(state: VolumeState, expected_epoch: int) -> None:
    if state.epoch != expected_epoch:
        raise StoreError(
            Code.EPOCH,
            f"volume {_quote(state.name)} is at epoch {state.epoch}, not {expected_epoch}:"
            " it was opened since; look again",
        )


def _check_holder(state: VolumeState, cache_id: bytes) -> None:
    if state.open_holder != cache_id:
        where = f"open at cache {state.open_holder.hex()}" if any(state.open_holder) else "not open"
        raise StoreError(
            Code.BUSY,
            f"volume {_quote(state.name)} is {where}; cache {cache_id.hex()} has no say in it",
        )


def _check_may_shrink(state: VolumeState, size_bytes: int, *, told: bool) -> None:
    name = _quote(state.name)
    if not told:
        raise StoreError(
            Code.INVALID,
            f"volume {name} has {state.size_bytes} bytes; making it {size_bytes} would destroy what"
            " lies behind: say --shrink if that is meant",
        )
    holder = state.open_holder if state.open_holder != NO_ID else state.dirty_holder
    if holder != NO_ID:
        raise StoreError(
            Code.BUSY,
            f"volume {name} is in use at cache {holder.hex()}; stop its guest and wait until it is"
            " closed before it can shrink",
        )


def _check_not_held(state: VolumeState, cache_id: bytes) -> None:
    """Another cache has the volume open, or may hold the newest acknowledged writes."""
    loss = ""
    if state.dirty_holder not in (NO_ID, cache_id):
        loss = (
            f"every write after sequence {state.applied_sequence} that cache"
            f" {state.dirty_holder.hex()} acknowledged and has not shipped would be lost"
        )
    if state.open_holder not in (NO_ID, cache_id):
        raise StoreError(
            Code.BUSY,
            f"volume {_quote(state.name)} is open at cache {state.open_holder.hex()}; close it"
            f" there, or accept the loss: {loss or 'its writer is shut out'}",
        )
    if loss:
        raise StoreError(
            Code.DIRTY,
            f"volume {_quote(state.name)} is dirty elsewhere: {loss}; bring that cache back, or"
            " open with acceptance of the loss",
        )


def _check_status(reply: wire.Frame, state: VolumeState) -> None:
    if reply.status == wire.STATUS_OK:
        return
    code = {
        wire.STATUS_UNKNOWN_VOLUME: Code.NOT_FOUND,
        wire.STATUS_FULL: Code.FULL,
        wire.STATUS_INVALID: Code.INVALID,
        wire.STATUS_CONFLICT: Code.BUSY,
        wire.STATUS_STALE_EPOCH: Code.EPOCH,
    }.get(reply.status, Code.IO)
    reason = wire.STATUS_NAMES.get(reply.status, f"status {reply.status}")
    raise StoreError(code, f"volume {_quote(state.name)} was not changed: {reason}")
