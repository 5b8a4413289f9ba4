"""Background verification of the cache device, as the control plane sees it: rate, news, status.

The engine reads and judges (native/scrub.c).  Here its findings become log lines that name the
volume, and the end of a pass gets a time on the loop's clock.

Failure modes: none of its own.  Undestaged data that does not verify fails its volume: that is a
VolumeFailed of the engine, handled as every other one.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from millpond.cache import limits
from millpond.cache.errors import escaped
from millpond.cache.events import EngineEvents
from millpond.native import lib
from millpond.native.engine import ScrubFound, ScrubPass

log = logging.getLogger("millpond.cache")

STAGES = {
    int(lib.MP_SCRUB_OFF): "off",
    int(lib.MP_SCRUB_RESTS): "rests",
    int(lib.MP_SCRUB_DIRTY): "undestaged log",
    int(lib.MP_SCRUB_CLEAN): "log",
    int(lib.MP_SCRUB_SLOTS): "slots",
}


def check_rate(bytes_per_s: int | None) -> int:
    """The rate in force for what an operator set (None: nothing); ValueError with one line."""
    if bytes_per_s is None:
        return limits.SCRUB_BYTES_PER_S
    least, most = limits.SCRUB_MIN_BYTES_PER_S, limits.SCRUB_MAX_BYTES_PER_S
    if bytes_per_s and not least <= bytes_per_s <= most:
        raise ValueError(
            f"scrub_rate is 0 (off), or from {least // limits.KIB}KiB to {most // limits.MIB}MiB"
        )
    return bytes_per_s


class Scrub:
    """What one engine's verification said so far.  Event loop only."""

    def __init__(self, events: EngineEvents, label_of: Callable[[bytes], str]) -> None:
        self._loop = asyncio.get_running_loop()
        self._label_of = label_of
        self._pass_ended: float | None = None
        events.on(ScrubFound, self._found)
        events.on(ScrubPass, self._passed)

    def _found(self, event: ScrubFound) -> None:
        log.warning(
            "damage found volume=%s what=%s",
            self._label_of(event.volume),
            escaped(event.message),
        )

    def _passed(self, event: ScrubPass) -> None:
        self._pass_ended = self._loop.time()

    def status(self, counters: dict[str, int], bytes_per_s: int) -> dict[str, Any]:
        """For the control socket; last_pass_age_s is None before the first whole pass."""
        ended = self._pass_ended
        return {
            "bytes_per_s": bytes_per_s,
            "stage": STAGES[counters["scrub_stage"]],
            "slot": counters["scrub_slot"],
            "passes": counters["scrub_passes"],
            "last_pass_age_s": self._loop.time() - ended if ended is not None else None,
            "read_bytes": counters["scrub_read_bytes"],
            "verified_bytes": counters["scrub_verified_bytes"],
            "slot_errors": counters["scrub_slot_errors"],
            "log_errors": counters["scrub_log_errors"],
        }
