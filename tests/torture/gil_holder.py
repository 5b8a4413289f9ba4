"""`millpond` in a process that can be told to hold Python's lock: for test_gil.py only.

    python gil_holder.py MARKERS COMMAND...

On SIGUSR2 a thread calls sleep(5) through ctypes.PyDLL, which, unlike CDLL, does not release the
GIL.  MARKERS gets one JSON line: when the hold began and ended (CLOCK_MONOTONIC), and when a
second Python thread, which ticks all the time, ran last before it and first after it.
"""

import ctypes
import json
import signal
import sys
import threading
import time
from bisect import bisect_left

from millpond.cli.main import main

HOLD_S = 5
TICK_S = 0.005


def hold_when_asked(markers: str) -> None:
    """Wait for SIGUSR2, hold, tell; for ever."""
    sleep = ctypes.PyDLL(None).sleep
    ticks: list[float] = []
    threading.Thread(target=tick, args=[ticks], daemon=True).start()
    while True:
        signal.sigwait({signal.SIGUSR2})
        begin = time.perf_counter()
        sleep(HOLD_S)
        end = time.perf_counter()
        time.sleep(10 * TICK_S)
        before = ticks[max(bisect_left(ticks, begin), 1) - 1]
        after = ticks[min(bisect_left(ticks, end - TICK_S), len(ticks) - 1)]
        with open(markers, "a") as file:
            file.write(json.dumps({"begin": begin, "end": end, "before": before, "after": after}))
            file.write("\n")


def tick(ticks: list[float]) -> None:
    """Any Python thread: it can run only while nobody holds the GIL."""
    while True:
        ticks.append(time.perf_counter())
        time.sleep(TICK_S)


if __name__ == "__main__":
    # Blocked here, so in every thread: only sigwait takes it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    threading.Thread(target=hold_when_asked, args=[sys.argv[1]], daemon=True).start()
    sys.exit(main(sys.argv[2:]))
