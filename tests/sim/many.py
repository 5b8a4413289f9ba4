"""Worlds on all processors: each is one thread's work, and knows nothing of the others.

Happy path: run_many(work, worlds) gives results in order.  Failure modes: what a world raises is
raised here, first come first served; the rest is not run.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

W = TypeVar("W")
R = TypeVar("R")


def run_many(work: Callable[[W], R], worlds: Iterable[W]) -> Iterator[R]:
    """work(world) for each; `work` is a module's function, its result can be pickled."""
    processors = len(os.sched_getaffinity(0))
    if processors == 1:
        yield from map(work, worlds)
        return
    # fork: a child has all modules, and a world needs nothing else of its parent
    with multiprocessing.get_context("fork").Pool(processors) as pool:
        yield from pool.imap(work, worlds)
