"""Fetch and destage connections, whose frames are the core's.

A fetch connection's socket is handed to the core after its handshake (native/storesocket.c); of a
destage connection we carry the bytes, never looked into.

Happy path: one feed per wake-up; after the core's notification, take and send.
Failure modes: the peer broke the protocol: the core has queued an ERROR frame, which is sent, and
the connection ends. The peer does not read: when SEND_HIGH_BYTES wait we neither take nor read.
The core is behind: above a limit of unanswered bytes we stop reading until half of it is
answered, so a connection costs bounded memory whatever its peer does.
"""

import asyncio

from millpond.native.store import ProtocolError
from millpond.store import limits
from millpond.store.link import CoreLink
from millpond.store.session import Peer, Session


class FetchSession(Session):
    """One fetch connection: the core has its socket."""

    takes_socket = True

    def __init__(self, peer: Peer, link: CoreLink) -> None:
        self._peer = peer
        self._link = link
        self._ended = False
        self._connection = link.attach(self)

    def take_socket(self, fd: int, *, received: bytes, greeting: bytes) -> None:
        self._link.connect(self._connection, fd, received=received, greeting=greeting)

    def received(self, data: memoryview) -> None:
        raise AssertionError("the core reads the socket")

    def writable(self, writable: bool) -> None:
        raise AssertionError("the core writes the socket")

    def answers_ready(self) -> None:
        raise AssertionError("the core sends answers itself")

    def ended(self) -> None:
        self.lost()
        self._peer.gone()

    def lost(self) -> None:
        if not self._ended:
            self._ended = True
            self._link.detach(self._connection)


class DestageSession(Session):
    """One destage connection after its handshake."""

    def __init__(self, peer: Peer, link: CoreLink) -> None:
        self._peer = peer
        self._link = link
        self._writable = True
        self._behind = False  # the core has too much of ours to answer
        self._taking = False
        self._ended = False
        self._connection = link.attach(self)

    def received(self, data: memoryview) -> None:
        if self._ended:
            return
        try:
            self._link.feed(self._connection, data)
        except ProtocolError as error:
            self._refuse(str(error))
            return
        self._regulate()

    def answers_ready(self) -> None:
        if not self._ended:
            self._take()

    def ended(self) -> None:
        raise AssertionError("the core has no socket of ours")

    def writable(self, writable: bool) -> None:
        self._writable = writable
        if self._ended or self._taking:
            return  # _take is on the stack and looks itself
        if writable:
            self._take()
        else:
            self._regulate()

    def lost(self) -> None:
        if not self._ended:
            self._ended = True
            self._link.detach(self._connection)

    def _take(self) -> None:
        """Send answers while the peer takes them; give others a turn after TAKE_TURN_BYTES."""
        taken_bytes = 0
        self._taking = True
        while self._writable and not self._ended and taken_bytes < limits.TAKE_TURN_BYTES:
            data = self._link.take(self._connection)
            if not data:
                break
            taken_bytes += len(data)
            self._peer.send(data)
        self._taking = False
        if self._ended:
            return
        if taken_bytes >= limits.TAKE_TURN_BYTES and self._writable:
            asyncio.get_running_loop().call_soon(self.answers_ready)
        self._regulate()

    def _regulate(self) -> None:
        """Read from the peer only while the core and the peer keep up."""
        pending_bytes = self._link.pending_bytes(self._connection)
        if pending_bytes > limits.DESTAGE_PENDING_HIGH_BYTES:
            self._behind = True
        elif pending_bytes <= limits.DESTAGE_PENDING_LOW_BYTES:
            self._behind = False
        self._peer.set_reading(self._writable and not self._behind)

    def _refuse(self, reason: str) -> None:
        last_words = b""
        while data := self._link.take(self._connection):
            last_words += data
        self.lost()
        self._peer.refuse(last_words, reason)
