"""make fuzz: every harness for so many seconds, as many at once as there are processors.

    PYTHONPATH=tests python -m fuzz SECONDS [HARNESS ...]

Prints a line per harness; the exit code is the number of those that found something.  What is found
stays in .run/fuzz/found/ and is run again by .run/fuzz/HARNESS FILE.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

from fuzz import harness


def _one(name: str, seconds: int) -> bool:
    """True when it found something."""
    try:
        report = harness.fuzz(name, seconds=seconds)
    except harness.Found as found:
        print(f"{name}: FOUND\n{found}", flush=True)
        return True
    print(f"{name}: {report.runs} inputs in {seconds} s, nothing found", flush=True)
    return False


def main() -> int:
    """The number of harnesses that found something."""
    seconds = int(sys.argv[1])
    names = sys.argv[2:] or harness.HARNESSES
    harness.build()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(pool.map(lambda name: _one(name, seconds), names))


if __name__ == "__main__":
    sys.exit(main())
