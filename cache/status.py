"""What a cache tells about itself: counters, volumes, links, shaping, as plain JSON values.

Rules: keys are additive only; sizes are bytes, ages seconds, rates bytes per second.  Nothing here
waits for the engine; the store's counters are asked for with a short limit.
"""

import math
from collections.abc import Callable
from typing import Any

from millpond.cache.control import Handler, Request
from millpond.cache.daemon import CacheDaemon
from millpond.cache.replicas import StoreNode, store_status
from millpond.cache.settings import VolumeSettings
from millpond.cache.shaping import Admission
from millpond.cache.volumes import State, Volume
from millpond.native.engine import VolumeStatus

# Beyond it, a guest is not slowed: the engine's word for that is its largest number.
SLOWED_MAX_BYTES_PER_S = 1 << 60


def hit_rate(hits: int, misses: int) -> float | None:
    """Share of hits, None before the first request."""
    return hits / (hits + misses) if hits + misses else None


def handlers_of(daemon: CacheDaemon, ask_to_stop: Callable[[], None]) -> dict[str, Handler]:
    """The operations of the control socket."""

    async def status(request: Request) -> dict[str, Any]:
        return await status_of(daemon)

    async def volumes(request: Request) -> dict[str, Any]:
        return {"volumes": volumes_of(daemon), "engine": daemon.engine.counters()}

    async def flush(request: Request) -> dict[str, Any]:
        volume = await daemon.find(request.volume)
        position = await volume.flush(ignore_rates=request.now)
        return {
            "id": volume.id.hex(),
            "destaged_sequence": position.first_sequence,
            "target": position.last_sequence,
        }

    async def stop(request: Request) -> dict[str, Any]:
        ask_to_stop()
        return {}

    return {"status": status, "volumes": volumes, "flush": flush, "stop": stop}


async def status_of(daemon: CacheDaemon) -> dict[str, Any]:
    """Everything."""
    counters = daemon.engine.counters()
    volumes = volumes_of(daemon)
    stores = [{**_link_of(node), "counters": await store_status(node)} for node in daemon.nodes]
    return {
        "cache_id": daemon.engine.cache_id.hex(),
        "name": daemon.config.name,
        "hit_rate": hit_rate(counters["hits"], counters["misses"]),
        "dirty_bytes": sum(volume["dirty_bytes"] for volume in volumes),
        "checksum_errors": {
            "slots": counters["slot_checksum_errors"],
            "log": counters["log_checksum_errors"],
            "fetch": counters["fetch_checksum_errors"],
            "store_segments": sum(store["counters"].get("checksum_errors", 0) for store in stores),
        },
        "scrub": daemon.scrub.status(counters, daemon.config.engine.scrub_bytes_per_s),
        "volumes": volumes,
        "stores": stores,
        "shaping": _shaping_of(daemon.host),
        "engine": counters,
    }


def volumes_of(daemon: CacheDaemon) -> list[dict[str, Any]]:
    """Every volume in use here or remembered by the device."""
    known = {status.id: status for status in daemon.engine.list_volumes()}
    ids = sorted(known.keys() | daemon.volumes.keys())
    return [_volume(each, daemon.volumes.get(each), known.get(each)) for each in ids]


def _volume(volume_id: bytes, volume: Volume | None, status: VolumeStatus | None) -> dict[str, Any]:
    """One volume: what the control plane decided, and what the engine counts."""
    record = volume.record if volume is not None else None
    destage = volume.destage if volume is not None else None
    settings = volume.settings if volume is not None else VolumeSettings()
    answer: dict[str, Any] = {
        "id": volume_id.hex(),
        "name": record.name if record is not None else None,
        "stores": volume.store_addresses if volume is not None else [],
        "state": str(volume.state if volume is not None else State.CLOSED),
        "problem": (volume.problem if volume is not None else "") or None,
        "destage_problem": (destage.problem if destage is not None else "") or None,
        "destage_retries": destage.retries if destage is not None else 0,
        "dirty_recorded": volume.dirty_recorded if volume is not None else False,
        "size_bytes": record.size_bytes if record is not None else None,
        "epoch": record.epoch if record is not None else None,
        "dirty_bytes": 0,
        "oldest_dirty_s": None,
        "bound_s": settings.bound_s,
        "bound": str(settings.bound) if settings.bound_s is not None else None,
        "bound_exceeded": False,
    }
    if status is None:
        return answer
    lookups = status.read_hit_blocks + status.read_zero_blocks
    return answer | {
        "size_bytes": status.size_bytes,
        "epoch": status.epoch,
        "lineage": status.lineage,
        "dirty_bytes": status.dirty_bytes,
        "oldest_dirty_s": status.oldest_dirty_ns / 1e9 if status.oldest_dirty_ns else None,
        "last_sequence": status.last_sequence,
        "synced_sequence": status.synced_sequence,
        "destaged_sequence": status.destaged_sequence,
        "bound_exceeded": (settings.bound_s or math.inf) * 1e9 < status.oldest_dirty_ns,
        "log_segments": status.log_segments,
        "log_share_bytes": status.log_share_bytes,
        "slowed_bytes_per_s": _slowed(status),
        "slots_held": status.slots_held,
        "connections": status.connections,
        "reads": status.reads,
        "writes": status.writes,
        "flushes": status.flushes,
        "trims": status.trims,
        "zeroes": status.zeroes,
        "read_hit_blocks": status.read_hit_blocks,
        "read_miss_blocks": status.read_miss_blocks,
        "read_zero_blocks": status.read_zero_blocks,
        "hit_rate": hit_rate(lookups, status.read_miss_blocks),
        "log_checksum_errors": status.log_checksum_errors,
        "engine_error": status.error or None,
    }


def _slowed(status: VolumeStatus) -> int | None:
    """What the guest may write now; None: anything."""
    limit = status.slowed_bytes_per_s
    return limit if limit <= SLOWED_MAX_BYTES_PER_S else None


def _link_of(node: StoreNode) -> dict[str, Any]:
    """The connections to one store."""
    fetch, destage = node.fetch, node.destage
    return {
        "address": node.address,
        "up": fetch.is_up and destage.is_up,
        "problem": fetch.problem or destage.problem or None,
        "fetch": {
            "up": fetch.is_up,
            "connects": fetch.connects,
            "sent_bytes": fetch.sent_bytes,
            "received_bytes": fetch.received_bytes,
            "protocol_errors": fetch.protocol_errors,
        },
        "destage": {
            "up": destage.is_up,
            "connects": destage.connects,
            "sent_bytes": destage.sent_bytes,
        },
    }


def _shaping_of(host: Admission) -> dict[str, Any]:
    """The host's rates and what has passed them."""
    return {
        "average_bytes_per_s": host.limits.average_bytes_per_s,
        "peak_bytes_per_s": host.limits.peak_bytes_per_s,
        "passed_bytes": host.passed_bytes,
        "waiting_batches": host.waiting_count,
    }
