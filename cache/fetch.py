"""Misses: the fetch connection to one store, made here and served by the engine.

Rules: this room connects, says HELLO and hands the socket to the engine; READ frames and their
replies never pass through Python (native/README-engine.md has the measurement).

Happy path: run() connects -> up() hands over -> LinkBroken when it ends -> run() connects again.
Failure modes: connection lost: the engine keeps what is outstanding and sends it again on the next
one; a malformed or damaged reply: the same, counted.
"""

import errno

from millpond.cache.links import Identity, Stream
from millpond.native.engine import Engine, LinkBroken
from millpond.store.wire import FEATURE_BLOCK_STATUS


class FetchStream(Stream):
    """The fetch connection to one store."""

    role = "fetch"

    def __init__(self, address: str, identity: Identity, *, engine: Engine, store: int) -> None:
        super().__init__(address, identity)
        self.protocol_errors = 0
        self._engine = engine
        self._store = store
        self._early = bytearray()  # what came before the engine has the socket

    @property
    def sent_bytes(self) -> int:
        """READ frames, over all connections."""
        return self._engine.fetch_bytes(self._store)[0]

    @property
    def received_bytes(self) -> int:
        """Replies, over all connections."""
        return self._engine.fetch_bytes(self._store)[1]

    @property
    def _cookie(self) -> int:
        return self._store << 32 | self.connects

    def up(self) -> None:
        assert self._link is not None and self._link.store is not None, "it greeted us"
        block_status = FEATURE_BLOCK_STATUS in self._link.store.features
        fd = self._link.detach()
        early, self._early = self._early, bytearray()
        self._engine.fetch_open(
            self._store, fd, received=early, cookie=self._cookie, block_status=block_status
        )

    def down(self, reason: str) -> None:
        self._early.clear()
        self._engine.fetch_close(self._store)

    def received(self, data: memoryview) -> None:
        self._early += data

    def broken(self, event: LinkBroken) -> None:
        """The engine has closed a connection; perhaps one that is none of ours, or over already."""
        if event.cookie != self._cookie:
            return
        self.protocol_errors += event.status == -errno.EPROTO
        self.drop(f"lost the store at {self.address}: {event.message}")
