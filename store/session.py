"""What a connection becomes after its handshake: the seam between server.py and the roles."""

from abc import ABC, abstractmethod
from collections.abc import Coroutine
from typing import Any, Protocol

from millpond.store import limits


class Peer(Protocol):
    """The connection as a session sees it."""

    def send(self, data: bytes) -> None:
        """Queue bytes; `Session.writable(False)` may be called from within."""

    def set_reading(self, reading: bool) -> None:
        """Read from the peer, or let it wait. Idempotent."""

    def gone(self) -> None:
        """The socket that the session took is closed."""

    def refuse(self, last_words: bytes, reason: str) -> None:
        """The peer broke the protocol: send this, then end the connection."""

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a task of the server; it outlives the connection."""


class Session(ABC):
    """One role's handling of a connection's bytes."""

    receive_bytes = limits.RECEIVE_BYTES  # at most this per wake-up
    takes_socket = False  # then take_socket() is called, and nothing but lost() after it

    def take_socket(self, fd: int, *, received: bytes, greeting: bytes) -> None:
        """The socket, what was read of it, and what it is to be sent first.

        OSError: fd stays the caller's.
        """
        raise NotImplementedError

    @abstractmethod
    def received(self, data: memoryview) -> None:
        """Bytes from the peer; the view is valid only in the call."""

    @abstractmethod
    def writable(self, writable: bool) -> None:
        """The peer stopped (or resumed) taking what we send."""

    @abstractmethod
    def lost(self) -> None:
        """The connection is gone."""
