"""Worlds on all processors: each is one thread's work, and knows nothing of the others.

Happy path: run_many(work, worlds) gives results in order.  Failure modes: what a world raises is
raised here, first come first served; the rest is not run.  A world that ends its whole process (an
assertion of the C core) is Crashed, with the worlds that it may have been.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

W = TypeVar("W")
R = TypeVar("R")


class Crashed(AssertionError):
    """A process is gone; the message names what it may have been doing."""


def run_many(work: Callable[[W], R], worlds: Iterable[W]) -> Iterator[R]:
    """work(world) for each; `work` is a module's function, its result can be pickled."""
    processors = len(os.sched_getaffinity(0))
    # fork: a child has all modules, and a world needs nothing else of its parent
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processors, mp_context=context) as pool:
        asked: list[tuple[W, Future[R]]] = [(world, pool.submit(work, world)) for world in worlds]
        try:
            for at, (_, future) in enumerate(asked):
                try:
                    yield future.result()
                except BrokenProcessPool as error:
                    maybe = [str(world) for world, _ in asked[at : at + 2 * processors]]
                    raise Crashed(f"a process crashed, in one of: {'; '.join(maybe)}") from error
        finally:
            for _, future in asked:
                future.cancel()
