"""What an operator may set for one volume on one cache; defaults for volumes that are not named.

Plain values: `cli/` reads them from the command line and the configuration file, `volumes.py`
hands them to the engine and to shaping.  Sizes are bytes, rates bytes per second, durations
seconds.

Failure modes: values that contradict each other are a ValueError with one line for the operator.
"""

from enum import StrEnum

import msgspec

from millpond.cache.shaping import RateLimits
from millpond.native.engine import VolumeShares


class Bound(StrEnum):
    """What gives way when the oldest undestaged write of a volume is older than its bound_s."""

    RATES = "rates"  # the average first, then the peak; status says BOUND EXCEEDED
    STRICT = "strict"  # the guest, which is slowed


class VolumeSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shares, rates and bound of one volume.  None: no minimum, no maximum, no limit."""

    log_min_bytes: int | None = None
    log_max_bytes: int | None = None
    slots_min_bytes: int | None = None
    slots_max_bytes: int | None = None
    average_bytes_per_s: int | None = None
    peak_bytes_per_s: int | None = None
    bound_s: float | None = None
    bound: Bound = Bound.RATES

    def __post_init__(self) -> None:
        for least, most, what in (
            (self.log_min_bytes, self.log_max_bytes, "log"),
            (self.slots_min_bytes, self.slots_max_bytes, "slots"),
        ):
            if least is not None and most is not None and most < least:
                raise ValueError(f"the maximum share of {what} is at least the minimum share")
            if (least or 0) < 0 or (most or 0) < 0:
                raise ValueError("a share is not negative")
            if most == 0:
                raise ValueError(f"the maximum share of {what} is above zero")
        if self.bound_s is not None and self.bound_s <= 0:
            raise ValueError("bound_s is above zero")
        if self.bound is Bound.STRICT and self.bound_s is None:
            raise ValueError("bound = strict needs bound_s")
        _ = self.rates  # checks them

    @property
    def rates(self) -> RateLimits:
        """Of its destage."""
        return RateLimits(self.average_bytes_per_s, self.peak_bytes_per_s)

    @property
    def shares(self) -> VolumeShares:
        """What the engine keeps for it, and how it slows the guest."""
        strict_s = self.bound_s if self.bound is Bound.STRICT else None
        return VolumeShares(
            log_min_bytes=self.log_min_bytes or 0,
            log_max_bytes=self.log_max_bytes or 0,
            slots_min_bytes=self.slots_min_bytes or 0,
            slots_max_bytes=self.slots_max_bytes or 0,
            strict_bound_ns=round((strict_s or 0) * 1e9),
        )

    @property
    def rates_bound_s(self) -> float | None:
        """The age from which on the rates give way; None: they do not."""
        return self.bound_s if self.bound is Bound.RATES else None
