"""Shaping: how fast destaged bytes may leave, per volume and per host.

`Rate` is pure: a clock is passed in, nothing waits.  `Admission` puts a queue and one timer in
front of it; the time to wait is computed, never polled.

Two promises, both checked by tests/cache/test_shaping.py on a virtual clock:

* peak: in no sliding second do more than peak bytes pass.  Bytes pass somewhere between their
  admission and their acknowledgement, so they count from the one until a second after the other:
  a network that delays one batch and not the next cannot squeeze two seconds' bytes into one.
* average: a token bucket that starts empty and holds two seconds' worth, so that over any minute
  the bytes stay within 5 % of the average while there is enough to send.

A volume that is late (its oldest undestaged write comes near its bound) passes all the same: first
without regard to the average, then to the peak, its own and the host's, and before those that are
not late.  Its bytes are counted, so that the others make room for them.

Happy path: `permit = await admission.admit(n)`, send, wait for the reply, `permit.finish()`.
Failure modes: a permit that is never finished blocks the peak for ever: callers finish in
`finally`.  n above `largest_bytes` can never pass: the caller splits (assert).
"""

import asyncio
import math
from collections import deque
from dataclasses import dataclass

from millpond.cache import limits


@dataclass(frozen=True, slots=True)
class RateLimits:
    """Bytes per second; None means unlimited."""

    average_bytes_per_s: int | None = None
    peak_bytes_per_s: int | None = None

    def __post_init__(self) -> None:
        for rate in (self.average_bytes_per_s, self.peak_bytes_per_s):
            if rate is not None and rate < limits.RATE_MIN_BYTES_PER_S:
                raise ValueError(f"a rate is at least {limits.RATE_MIN_BYTES_PER_S} bytes/s")
        average, peak = self.average_bytes_per_s, self.peak_bytes_per_s
        if average is not None and peak is not None and peak < average:
            raise ValueError("the peak rate is at least the average rate")

    @property
    def cut_bytes(self) -> int:
        """How much raw data one batch may carry under these rates."""
        wanted = limits.BATCH_MAX_BYTES
        if self.peak_bytes_per_s is not None:
            wanted = min(wanted, self.peak_bytes_per_s // limits.PEAK_PARTS)
        if self.average_bytes_per_s is not None:
            wanted = min(wanted, self.average_bytes_per_s)
        return max(wanted, limits.BATCH_MIN_BYTES)

    @property
    def largest_bytes(self) -> float:
        """The most that one admission may ask for: it has to fit into a second and the bucket."""
        peak = math.inf if self.peak_bytes_per_s is None else self.peak_bytes_per_s
        average = math.inf if self.average_bytes_per_s is None else self.average_bytes_per_s
        return min(peak, average * limits.AVERAGE_CAPACITY_S)


@dataclass(frozen=True, slots=True)
class Lateness:
    """From when on (loop time) a volume passes without regard to a rate."""

    average_from_s: float = math.inf
    peak_from_s: float = math.inf

    @classmethod
    def of(cls, age_s: float, bound_s: float | None, now_s: float) -> "Lateness":
        """For a volume whose oldest undestaged write is so old now."""
        if bound_s is None:
            return ON_TIME
        return cls(
            now_s + limits.LATE_FOR_AVERAGE * bound_s - age_s,
            now_s + limits.LATE_FOR_PEAK * bound_s - age_s,
        )


ON_TIME = Lateness()


class Permit:
    """Bytes that were admitted; finish when the receiver has acknowledged them (or is gone)."""

    __slots__ = ("bytes_count", "_rates")

    def __init__(self, bytes_count: int, rates: tuple["Admission", ...]) -> None:
        self.bytes_count = bytes_count
        self._rates = rates

    def finish(self) -> None:
        """The bytes have passed, or never will.  Twice is harmless."""
        rates, self._rates = self._rates, ()
        for admission in rates:
            admission.finish(self.bytes_count)


class Rate:
    """One pair of rates on a clock; pure."""

    def __init__(self, rate_limits: RateLimits, now_s: float) -> None:
        self.limits = rate_limits
        self.passed_bytes = 0
        self._tokens = 0.0
        self._filled_at_s = now_s
        self._in_flight_bytes = 0
        self._recent: deque[tuple[float, int]] = deque()  # (counts until, bytes), ascending
        self._recent_bytes = 0

    def wait_s(self, bytes_count: int, now_s: float, late: Lateness = ON_TIME) -> float:
        """How long until bytes_count may pass: 0 now, inf only after something finished."""
        assert 0 < bytes_count <= self.limits.largest_bytes, "split before asking"
        average_s = min(
            self._wait_average_s(bytes_count, now_s), max(0.0, late.average_from_s - now_s)
        )
        peak_s = min(self._wait_peak_s(bytes_count, now_s), max(0.0, late.peak_from_s - now_s))
        return max(average_s, peak_s)

    def take(self, bytes_count: int, now_s: float) -> None:
        """Admit; wait_s must have said 0 at this time."""
        self._fill(now_s)
        average = self.limits.average_bytes_per_s
        if average is not None:
            # What a late volume takes beyond its turn is owed by all, but not for ever.
            least = -average * limits.AVERAGE_CAPACITY_S
            self._tokens = max(self._tokens - bytes_count, least)
        self._in_flight_bytes += bytes_count
        self.passed_bytes += bytes_count

    def finish(self, bytes_count: int, now_s: float) -> None:
        """Bytes admitted before were acknowledged, or the connection that carried them is gone."""
        self._in_flight_bytes -= bytes_count
        assert self._in_flight_bytes >= 0, "more finished than admitted"
        if self.limits.peak_bytes_per_s is not None:
            self._recent.append((now_s + limits.PEAK_WINDOW_S, bytes_count))
            self._recent_bytes += bytes_count

    def _fill(self, now_s: float) -> None:
        """Tokens up to now."""
        average = self.limits.average_bytes_per_s
        if average is not None:
            earned = (now_s - self._filled_at_s) * average
            self._tokens = min(self._tokens + earned, average * limits.AVERAGE_CAPACITY_S)
        self._filled_at_s = now_s

    def _wait_average_s(self, bytes_count: int, now_s: float) -> float:
        average = self.limits.average_bytes_per_s
        if average is None:
            return 0.0
        self._fill(now_s)
        # Half a byte forgives the rounding of the sum of many small intervals.
        missing = bytes_count - self._tokens - 0.5
        return max(0.0, missing / average)

    def _wait_peak_s(self, bytes_count: int, now_s: float) -> float:
        peak = self.limits.peak_bytes_per_s
        if peak is None:
            return 0.0
        while self._recent and self._recent[0][0] <= now_s:
            self._recent_bytes -= self._recent.popleft()[1]
        excess = self._in_flight_bytes + self._recent_bytes + bytes_count - peak
        if excess <= 0:
            return 0.0
        for until_s, passed_bytes in self._recent:
            excess -= passed_bytes
            if excess <= 0:
                return until_s - now_s
        return math.inf


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """One batch in the queue."""

    bytes_count: int
    turn: asyncio.Future[None]
    late: Lateness


class Admission:
    """A queue in front of a Rate: first come, first served, so volumes take turns."""

    def __init__(self, rate_limits: RateLimits) -> None:
        self._loop = asyncio.get_running_loop()
        self._rate = Rate(rate_limits, self._loop.time())
        self._waiting: deque[_Waiting] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def limits(self) -> RateLimits:
        """The rates in force."""
        return self._rate.limits

    @property
    def waiting_count(self) -> int:
        """Batches that wait for their turn."""
        return len(self._waiting)

    @property
    def passed_bytes(self) -> int:
        """Bytes admitted since the start."""
        return self._rate.passed_bytes

    async def reserve(self, bytes_count: int, late: Lateness = ON_TIME) -> None:
        """Wait until bytes_count may pass, and count them; every reserve needs one finish."""
        turn: asyncio.Future[None] = self._loop.create_future()
        waiting = _Waiting(bytes_count, turn, late)
        self._waiting.append(waiting)
        self._advance()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.finish(bytes_count)  # it was our turn already: the bytes never left
            elif waiting in self._waiting:
                self._waiting.remove(waiting)
                self._advance()
            raise

    def finish(self, bytes_count: int) -> None:
        """Bytes reserved before have passed, or never will."""
        self._rate.finish(bytes_count, self._loop.time())
        self._advance()

    def _advance(self) -> None:
        """Admit who is next as long as it fits; else one timer for when that changes."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            now_s = self._loop.time()
            following = self._next(now_s)
            if following.turn.cancelled():  # its task removes it; until then nobody waits for it
                self._waiting.remove(following)
                continue
            wait_s = self._rate.wait_s(following.bytes_count, now_s, following.late)
            if wait_s > 0:
                self._wake_in(min(wait_s, self._next_late_s(now_s)), now_s)
                return
            self._rate.take(following.bytes_count, now_s)
            self._waiting.remove(following)
            following.turn.set_result(None)

    def _next(self, now_s: float) -> "_Waiting":
        """Who is late comes first; else the head."""
        for waiting in self._waiting:
            if waiting.late.average_from_s <= now_s:
                return waiting
        return self._waiting[0]

    def _next_late_s(self, now_s: float) -> float:
        """How long until one more of those that wait is late."""
        times = [waiting.late.average_from_s for waiting in self._waiting]
        return min((at_s - now_s for at_s in times if at_s > now_s), default=math.inf)

    def _wake_in(self, wait_s: float, now_s: float) -> None:
        if not math.isinf(wait_s):
            # uvloop's timers have millisecond grain: sooner would spin on rounding.
            ready_at_s = now_s + max(wait_s, limits.TIMER_GRAIN_S)
            self._timer = self._loop.call_at(ready_at_s, self._advance)


class Shaper:
    """A volume's rates and its host's, asked as one."""

    def __init__(self, volume: Admission, host: Admission) -> None:
        self._admissions = (volume, host)
        self.ignored = False  # the rates, while an operator flushes with --now
        self.late = ON_TIME

    @property
    def volume_limits(self) -> RateLimits:
        """The volume's own."""
        return self._admissions[0].limits

    @property
    def cut_bytes(self) -> int:
        """How much raw data one batch may carry."""
        return min(admission.limits.cut_bytes for admission in self._admissions)

    @property
    def largest_bytes(self) -> float:
        """The most that one admit may ask for."""
        return min(admission.limits.largest_bytes for admission in self._admissions)

    async def admit(self, bytes_count: int) -> Permit:
        """Wait for the volume's turn, then for the host's: a slow volume holds up nobody else."""
        if self.ignored:
            return Permit(bytes_count, ())
        granted: tuple[Admission, ...] = ()
        try:
            for admission in self._admissions:
                await admission.reserve(bytes_count, self.late)
                granted = (*granted, admission)
        except asyncio.CancelledError:
            Permit(bytes_count, granted).finish()
            raise
        return Permit(bytes_count, granted)
