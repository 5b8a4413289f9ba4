"""The engine's events, routed: answers to whoever asked, news to the handler of their kind.

Rules: a question registers its answer's key before it is asked, in the same turn of the loop, so
no answer can be missed.  One pump drains everything; it runs on every notification.

Failure modes: an answer that nobody waits for any more (its asker was cancelled) is dropped: every
command is idempotent or is asked again.  When the engine fails, every waiter gets CacheError.
"""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from millpond.cache.errors import CacheError
from millpond.native.engine import (
    Batch,
    Closed,
    Engine,
    EngineFailed,
    Event,
    Opened,
    Position,
    Stopped,
)

E = TypeVar("E", bound=Event)
Key = tuple[type[Event], int | bytes]

_BY_COOKIE = (Opened, Closed, Batch, Position)


def _key(event: Event) -> Key:
    """What pairs an answer with its question."""
    by_cookie = isinstance(event, _BY_COOKIE)
    return (type(event), event.cookie if by_cookie else event.volume)


class EngineEvents:
    """Routes the events of one engine.  Event loop only."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[Key, asyncio.Future[Event]] = {}
        self._handlers: dict[type[Event], Callable[[Event], None]] = {}
        self._next_cookie = 1
        self.stopped: asyncio.Future[None] = self._loop.create_future()
        self.failed: str | None = None

    def new_cookie(self) -> int:
        """A number that no other question or connection of this engine has."""
        cookie = self._next_cookie
        self._next_cookie += 1
        return cookie

    def on(self, kind: type[E], handler: Callable[[E], None]) -> None:
        """Who hears of this kind of news."""
        assert kind not in self._handlers, f"two handlers for {kind.__name__}"
        self._handlers[kind] = handler  # type: ignore[assignment]  # called with this kind only

    async def ask(self, kind: type[E], key: int | bytes, question: Callable[[], None]) -> E:
        """Ask the engine (a command that does not block) and wait for its answer."""
        if self.failed is not None:
            raise CacheError(self.failed)
        full_key: Key = (kind, key)
        assert full_key not in self._waiting, "the same question twice"
        answer: asyncio.Future[Event] = self._loop.create_future()
        self._waiting[full_key] = answer
        try:
            question()
            event = await answer
        finally:
            if self._waiting.get(full_key) is answer:
                del self._waiting[full_key]
        assert isinstance(event, kind)
        return event

    def pump(self) -> None:
        """Drain the engine's events."""
        for event in self._engine.events():
            self._route(event)

    def _route(self, event: Event) -> None:
        if isinstance(event, EngineFailed):
            self._fail(event.message or "the engine failed")
        if isinstance(event, Stopped) and not self.stopped.done():
            self.stopped.set_result(None)
        waiting = self._waiting.pop(_key(event), None)
        if waiting is not None and not waiting.done():
            waiting.set_result(event)
            return
        handler = self._handlers.get(type(event))
        if handler is not None:
            handler(event)

    def _fail(self, message: str) -> None:
        self.failed = message
        waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            if not answer.done():
                answer.set_exception(CacheError(message))
                answer.exception()  # whoever waited may have given up already
