"""Misses: complete READ frames from the engine to a store, reply bytes back into the engine.

Frames are built and parsed in C; Python carries bytes, one call per wake-up however many requests
they hold, and makes no object per request.

Happy path: notification -> pump -> take_fetch -> write; reply bytes -> feed_fetch, straight from
the connection's receive buffer.
Failure modes: connection lost: the engine keeps what is outstanding and sends it again after the
next `link up`; a malformed or damaged reply (LinkBroken): the connection is dropped, counted, and
what is outstanding is asked for again on a new one.
"""

import asyncio

from millpond.cache.links import Identity, Stream
from millpond.native.engine import Engine
from millpond.store.client import DataLink
from millpond.store.errors import ProtocolError, Unreachable


class FetchStream(Stream):
    """The fetch connection to one store."""

    role = "fetch"

    def __init__(self, address: str, identity: Identity, *, engine: Engine, store: int) -> None:
        super().__init__(address, identity)
        self.protocol_errors = 0
        self.sent_bytes = 0
        self.received_bytes = 0
        self._engine = engine
        self._store = store
        self._draining: asyncio.Task[None] | None = None

    def up(self) -> None:
        self._engine.link(self._store, up=True)  # its frames come with the next notification

    def down(self, reason: str) -> None:
        if self._draining is not None:
            self._draining.cancel()
            self._draining = None
        self._engine.link(self._store, up=False)

    def received(self, data: memoryview) -> None:
        self.received_bytes += len(data)
        if self._link is None:
            return  # given up already: the engine must not see bytes of two connections
        if not self._engine.feed_fetch(self._store, data):
            raise ProtocolError(f"the store at {self.address} sent a malformed READ_REPLY")

    def broken(self, reason: str) -> None:
        """The engine cannot make sense of the replies."""
        self.protocol_errors += 1
        self.drop(reason)

    def pump(self) -> None:
        """Send what the engine wants fetched, as far as the connection takes it."""
        link = self._link
        if link is None or self._draining is not None:
            return
        while self._engine.fetch_pending(self._store):
            if not link.writable:
                self._draining = asyncio.get_running_loop().create_task(self._resume(link))
                return
            frames = self._engine.take_fetch(self._store)
            if not frames:
                return
            self.sent_bytes += len(frames)
            link.write(frames)

    async def _resume(self, link: DataLink) -> None:
        try:
            await link.drain()
        except Unreachable:
            return  # on_lost follows: down() clears the way for the next connection
        self._draining = None
        self.pump()
