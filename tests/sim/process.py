"""A process of the simulated world: tasks and timers that die together.

Whatever is called through run(), and whatever tasks and callbacks come of it, belongs to the
process (a context variable tells whose code runs).  kill() ends it as the kernel would: nothing
that its tasks do meanwhile reaches anybody, because its connections and disks are gone before.
"""

import asyncio
import contextvars
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_CURRENT: "contextvars.ContextVar[Process | None]" = contextvars.ContextVar("process", default=None)
KILL_AGAIN_S = 0.001  # a task may wait once more while it ends


class Process:
    """One life of a daemon."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_dead = False
        self.held_until_ns = 0  # stopped: silent until then
        self.tasks: dict[asyncio.Task[object], None] = {}  # a dict: the order of a set is chance

    def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call something that belongs to this process."""
        context = contextvars.copy_context()
        context.run(_CURRENT.set, self)
        return context.run(call, *args, **kwargs)

    def own(self, task: "asyncio.Task[object]") -> None:
        """A task that it started."""
        self.tasks[task] = None
        task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[object]") -> None:
        self.tasks.pop(task, None)
        if self.is_dead and not task.cancelled():
            task.exception()  # nobody is left who would hear of it

    async def kill(self) -> None:
        """End every task."""
        self.is_dead = True
        while self.tasks:
            for task in list(self.tasks):
                task.cancel()
            await asyncio.wait(list(self.tasks), timeout=KILL_AGAIN_S)

    async def kill_at_once(self) -> None:
        """The same where time stands still."""
        self.is_dead = True
        for _ in range(100):
            if not self.tasks:
                return
            for task in list(self.tasks):
                task.cancel()
            await asyncio.sleep(0)


def current() -> Process | None:
    """Whose code runs now; None: the world's own."""
    return _CURRENT.get()
