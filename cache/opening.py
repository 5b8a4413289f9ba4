"""One writable open, from the stores' word to the engine's.

Happy path: open_at_engine() returns "".  Failure modes: the engine refuses: its reason, in a line;
it is busy with something of the volume: again, for a while.
"""

import asyncio
import errno
import os
from dataclasses import dataclass

from millpond.cache import limits
from millpond.cache.replicas import VolumeRecord
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
