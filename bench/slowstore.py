"""`millpond store serve` on a disk that becomes slow: 200 random reads per second at 10 ms each.

    bench/slowstore.py ARMS LATENCY_MS store serve DIR ...

It is as fast as it is until SIGUSR1 comes, so that filling and warming take no time. Everything is
the product's but the table through which the store sees its disk: native's driver_slow.c stands in
front of the real one.
"""

import runpy
import signal
import sys
from typing import Any

from millpond import native

REAL = native.lib


class SlowLibrary:
    """The C library, but that stores get a disk that SIGUSR1 makes slow."""

    def __init__(self, arms: int, latency_ms: float) -> None:
        self.arms = arms
        self.latency_ns = int(latency_ms * 1e6)
        self.inner: Any = None

    def mp_driver_linux_directory(self, fd: int) -> Any:
        """The real driver behind the slow one."""
        self.inner = REAL.mp_driver_linux_directory(fd)
        if self.inner == native.ffi.NULL:
            return self.inner
        driver = REAL.mp_driver_slow(self.inner, self.arms, 0)
        signal.signal(signal.SIGUSR1, lambda *_: REAL.mp_driver_slow_set(driver, self.latency_ns))
        return driver

    def mp_driver_linux_notify_fd(self, _driver: Any) -> int:
        """Of the real driver."""
        return REAL.mp_driver_linux_notify_fd(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(REAL, name)


if __name__ == "__main__":
    arms, latency_ms, *arguments = sys.argv[1:]
    vars(native)["lib"] = SlowLibrary(int(arms), float(latency_ms))
    sys.argv[1:] = arguments
    runpy.run_module("millpond.cli.main", run_name="__main__")
