"""Who goes on with a disk that he has seen: connections of the process before, kernel devices.

Rules:
* as long as there is one, the volume is not given back: he would find it changed.
* when it has a history that is not ours alone all the same (a takeover), he is ended before we
  open it: he would write what he remembers over what others have written.
* connections of the process before are served before any other client: what lies in them may be
  writes of a guest that has died since and comes again; it must find them done, or never done.

Happy path: add(kept) each -> serve(connect); remember(who, forsaken) -> forget(who).
Failure modes: the volume cannot be had: drop(reason), guests connect again.  The process ends
before they were served: take(), and the next one goes on with them.
"""

import logging
import os
import socket
from collections.abc import Awaitable, Callable

from millpond.cache.errors import CacheError, escaped
from millpond.cache.exports import Agreed, Owner
from millpond.cache.handover import Kept
from millpond.native.engine import NativeError

log = logging.getLogger("millpond.cache")


Connect = Callable[[socket.socket, bytes, Agreed, Owner], None]  # Volume.connect


class Continuing:
    """Those of one volume.  Event loop only."""

    def __init__(self, nobody: Callable[[], None]) -> None:
        """nobody: the last of them has ended."""
        self._nobody = nobody
        self._waiting: list[Kept] = []
        self._others: dict[object, Callable[[], Awaitable[None]]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting or self._others)

    @property
    def waiting(self) -> bool:
        """There are connections to be served."""
        return bool(self._waiting)

    def add(self, kept: Kept) -> None:
        """A connection; its descriptor is ours from here."""
        self._waiting.append(kept)

    def take(self) -> list[Kept]:
        """All that wait; their descriptors are the caller's."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def serve(self, connect: Connect, label: str) -> None:
        """The volume is open: connect all of them."""
        for kept in self.take():
            sock = socket.socket(fileno=kept.fd)
            try:
                connect(sock, kept.received, kept.agreed, Owner(tag=kept.tag))
            except (CacheError, NativeError) as error:  # it closed the socket
                _not_taken_up(label, str(error))

    def drop(self, reason: str, label: str) -> None:
        """Close all that wait."""
        dropped = self.take()
        for kept in dropped:
            os.close(kept.fd)
            _not_taken_up(label, reason)
        if dropped and not self:
            self._nobody()

    def remember(self, who: object, forsaken: Callable[[], Awaitable[None]]) -> None:
        """Somebody who goes on, connected or not; forsaken ends him."""
        self._others[who] = forsaken

    def forget(self, who: object) -> None:
        """He has ended.  Twice is harmless."""
        if self._others.pop(who, None) is not None and not self:
            self._nobody()

    async def forsake(self, label: str) -> None:
        """Others have written."""
        self.drop("another host has written to the volume since", label)
        for forsaken in list(self._others.values()):
            await forsaken()


def _not_taken_up(label: str, reason: str) -> None:
    log.warning("connection not taken up volume=%s reason=%s", label, escaped(reason))
