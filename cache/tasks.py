"""Tasks with an owner: one that dies takes its owner down, loudly.

Rules: CancelledError is a normal end; any other exception is our bug or the world's end, and goes
to on_failure exactly once.  Expected failures are handled inside the task.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from millpond.cache import limits

log = logging.getLogger("millpond.cache")


class Tasks:
    """The tasks of one daemon."""

    def __init__(self, on_failure: Callable[[BaseException], None]) -> None:
        self._on_failure = on_failure
        self._tasks: set[asyncio.Task[Any]] = set()
        self.closing = False

    def spawn(self, work: Coroutine[Any, Any, object], name: str) -> asyncio.Task[Any]:
        """Run work; its death is ours."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            log.error("task died task=%s", task.get_name(), exc_info=error)
            self._on_failure(error)

    async def cancel_all(self) -> None:
        """End every task and wait for it."""
        self.closing = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Backoff:
    """Waits between attempts: doubling, bounded."""

    def __init__(
        self,
        first_s: float = limits.BACKOFF_FIRST_S,
        max_s: float = limits.BACKOFF_MAX_S,
    ) -> None:
        self._first_s = first_s
        self._max_s = max_s
        self._next_s = first_s

    def reset(self) -> None:
        """It worked."""
        self._next_s = self._first_s

    @property
    def is_first(self) -> bool:
        """Nothing failed since the last success: worth a log line."""
        return self._next_s == self._first_s

    def next_s(self) -> float:
        """How long to wait now."""
        wait_s, self._next_s = self._next_s, min(2 * self._next_s, self._max_s)
        return wait_s

    async def wait(self) -> None:
        """Wait before the next attempt."""
        await asyncio.sleep(self.next_s())
