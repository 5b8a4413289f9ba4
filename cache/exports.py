"""What the cache offers to whoever speaks NBD to guests: exports, and how to take one over.

nbd/ negotiates and calls; the cache implements.  Nothing here knows how either works.
"""

import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True)
class Export:
    """A volume as offered over NBD."""

    name: str
    size_bytes: int
    read_only: bool
    description: str
    volume_id: bytes = b""  # stays when the name changes


@dataclass(frozen=True)
class Agreed:
    """What a client negotiated for the transmission phase."""

    structured: bool = False  # structured replies
    allocation: bool = False  # the metadata context base:allocation; only with structured
    read_only: bool = False  # this client asked for it; the export may be so for all


@dataclass(frozen=True)
class Owner:
    """Who has connected a socket, when that matters later."""

    closed: Callable[[], None] = lambda: None  # the engine is done with it, whatever the reason
    tag: str = ""  # told again when the connection goes on in another process
    disconnected: Callable[[], None] = lambda: None  # before closed: the client's NBD_CMD_DISC


NOBODY = Owner()


class ExportError(Exception):
    """Why an export cannot be described or opened; message is one line for the guest's operator."""

    def __init__(
        self,
        code: Literal["unknown", "busy", "policy", "away", "platform", "shutdown"],
        message: str,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class OpenExport(Protocol):
    """An export that a client has picked, until its socket is handed over or given up."""

    export: Export

    def handover(
        self, sock: socket.socket, received: bytes, agreed: Agreed, owner: Owner = NOBODY
    ) -> None:
        """Give the connected socket to the engine, with bytes already read from it.

        The engine owns the descriptor from here: it is detached from sock, on errors too.
        """

    async def release(self) -> None:
        """The handshake failed after open.  Harmless when repeated, and after handover."""


class Exports(Protocol):
    """All exports of this process."""

    def names(self) -> list[str]:
        """Canonical names, for LIST."""

    async def describe(self, name: str) -> Export:
        """Look up; "" is the only volume.  Opens nothing.  Raises ExportError."""

    async def open(self, name: str) -> OpenExport:
        """Open for a client; the first writable one opens the volume at the store (epoch + 1).

        Raises ExportError.
        """


class DeviceExports(Exports, Protocol):
    """And what kernel devices need: they outlive names, sizes and this process."""

    async def open_id(self, volume_id: bytes) -> OpenExport:
        """As open, whatever the volume is called now."""

    async def grow(self, volume_ids: Sequence[bytes]) -> dict[bytes, Export]:
        """Those that are open here, as the stores have them now: their size, their name.

        The engine serves all of it before this returns.  Stores that are away say nothing.
        """

    def remember(
        self, volume_id: bytes, who: object, forsaken: Callable[[], Awaitable[None]]
    ) -> None:
        """Somebody goes on with a disk that he has seen, connected or not, until forget().

        The volume is not given back meanwhile.  When others have written to it all the same,
        forsaken() has to end him; it returns before the volume is opened again.
        """

    def forget(self, volume_id: bytes, who: object) -> None:
        """He has ended.  Twice is harmless."""
