"""One writable open, from the stores' word to the engine's.

Happy path: open_at_stores() -> open_at_engine() returns "".
Failure modes: stores that are away, other caches that are faster, histories that have parted: a
CacheError.  The engine refuses: its reason, in a line; it is busy with something of the volume:
again, for a while.
"""

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from millpond.cache import limits
from millpond.cache.destage import find_volume
from millpond.cache.errors import VolumeBusy, VolumeFenced
from millpond.cache.positions import (
    check_still_ours,
    first_sequence_of,
    has_arrived,
    history_is_ours,
    slots_are_valid,
)
from millpond.cache.replicas import ReplicaSet, VolumeRecord
from millpond.cache.tasks import Backoff
from millpond.cache.world import World
from millpond.native.engine import NativeError, Opened


@dataclass(frozen=True, slots=True)
class Opening:
    """One writable open, durable at the stores, not yet known to the engine."""

    record: VolumeRecord
    lineage: int
    keep_slots: bool
    undestaged: bool


async def open_at_stores(
    world: World,
    volume_id: bytes,
    replicas: ReplicaSet,
    *,
    given_back_epoch: int | None,
    part: Callable[[], Awaitable[None]],
) -> Opening:
    """Compare-and-swap epoch + 1, after making sure that the newest writes are known.  CacheError.

    given_back_epoch: under which this process gave it back, with everything shipped.  part: called
    before a history that is not ours alone becomes the one that we go on with.
    """
    cache_id = world.cache_id
    for _ in range(limits.OPEN_RACES_MAX):
        before = await replicas.show(volume_id)
        known = find_volume(world.engine, volume_id)
        check_still_ours(before, known, cache_id)
        given_back = given_back_epoch == before.epoch  # and nobody has opened it since
        if not (given_back or history_is_ours(before, known, cache_id)):
            await part()
        lineage = world.chance.new_lineage()
        try:
            after = await replicas.open(
                before,
                cache_id=cache_id,
                lineage=lineage,
                first_sequence=first_sequence_of(before, known, cache_id),
            )
        except VolumeFenced:
            continue  # somebody was faster, perhaps an earlier attempt of ours: look again
        undestaged = (
            known is not None and known.has_undestaged and not has_arrived(before, known, cache_id)
        )
        if undestaged and after.dirty_holder != cache_id.hex():
            # The engine takes it for recorded when it finds such records: make it true first.
            after = await replicas.record_dirty(after, cache_id=cache_id, dirty=True)
        return Opening(
            record=after,
            lineage=lineage,
            keep_slots=given_back or slots_are_valid(before, known, cache_id),
            undestaged=undestaged,
        )
    raise VolumeBusy("other caches keep opening the volume; try again")


async def open_at_engine(world: World, volume_id: bytes, opening: Opening, *, store: int) -> str:
    """Tell the engine; returns why it refuses, or nothing.

    It is busy while anything of the volume, or any fetch, is under way: then again.
    """
    backoff = Backoff(limits.ENGINE_BUSY_FIRST_S, limits.ENGINE_BUSY_MAX_S)
    give_up_s = asyncio.get_running_loop().time() + limits.OPEN_WAIT_S
    while True:
        status, message = await _ask(world, volume_id, opening, store)
        if status == 0:
            return ""
        if status != -errno.EBUSY or asyncio.get_running_loop().time() > give_up_s:
            return message or f"the engine refuses: {os.strerror(abs(status))}"
        await backoff.wait()


async def _ask(world: World, volume_id: bytes, opening: Opening, store: int) -> tuple[int, str]:
    record = opening.record
    cookie = world.events.new_cookie()
    try:
        answer = await world.events.ask(
            Opened,
            cookie,
            lambda: world.engine.open_volume(
                volume_id,
                size_bytes=record.size_bytes,
                epoch=record.epoch,
                lineage=opening.lineage,
                applied_sequence=record.applied_sequence,
                keep_slots=opening.keep_slots,
                cookie=cookie,
                store=store,
            ),
        )
    except NativeError as error:
        return -(error.errno or errno.EIO), str(error)
    return answer.status, answer.message
