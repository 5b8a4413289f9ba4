"""Requests and replies of the raw NBD client; a structured reply put together from its chunks.

It holds the server to what the protocol says of chunks: data and holes tile the range asked for,
without overlap; nothing follows DONE; DF means one chunk; descriptors stay inside the range.
Failure modes: AssertionError.
"""

from dataclasses import dataclass, field

from millpond.nbd import wire
from millpond.nbd.wire import Chunk, Command, CommandFlag


@dataclass(frozen=True)
class Request:
    """What was sent, payload too: an unanswered write may have done it, wholly or in part."""

    cookie: int
    command: int
    offset: int
    length_bytes: int
    flags: int
    payload: bytes = b""

    def __str__(self) -> str:
        return (
            f"command {self.command} flags {self.flags:#x} at {self.offset}+{self.length_bytes}"
            f" cookie {self.cookie}"
        )


@dataclass(frozen=True)
class Reply:
    """An answer; data only of a READ without error."""

    request: Request
    error: int
    data: bytes
    chunks: tuple[int, ...] = ()  # their types, when it was structured
    extents: tuple[tuple[int, int], ...] = ()  # of BLOCK_STATUS: length, flags


@dataclass
class Chunked:
    """A structured reply on its way."""

    request: Request
    kinds: list[int] = field(default_factory=list)
    pieces: dict[int, bytes] = field(default_factory=dict)  # by offset
    extents: tuple[tuple[int, int], ...] = ()
    error: int = 0

    def add(self, kind: int, payload: bytes) -> None:
        """One more chunk."""
        self.kinds.append(kind)
        if kind == Chunk.OFFSET_DATA:
            (offset,) = wire.CHUNK_OFFSET.unpack_from(payload)
            self._piece(offset, payload[wire.CHUNK_OFFSET.size :])
        elif kind == Chunk.OFFSET_HOLE:
            offset, length_bytes = wire.CHUNK_HOLE.unpack(payload)
            self._piece(offset, bytes(length_bytes))
        elif kind == Chunk.BLOCK_STATUS:
            self._status(payload)
        elif kind == Chunk.ERROR:
            self.error, message_bytes = wire.CHUNK_ERROR.unpack_from(payload)
            assert self.error and len(payload) == wire.CHUNK_ERROR.size + message_bytes
        else:
            assert kind == Chunk.NONE and payload == b"", f"chunk type {kind}"

    def _piece(self, offset: int, data: bytes) -> None:
        assert self.request.command == Command.READ and data and offset not in self.pieces
        self.pieces[offset] = data

    def _status(self, payload: bytes) -> None:
        request = self.request
        assert request.command == Command.BLOCK_STATUS and not self.extents
        assert wire.CONTEXT_ID.unpack_from(payload) == (wire.ALLOCATION_CONTEXT_ID,)
        descriptors = payload[wire.CONTEXT_ID.size :]
        self.extents = tuple(wire.STATUS_DESCRIPTOR.iter_unpack(descriptors))
        assert self.extents and all(length_bytes for length_bytes, _ in self.extents)
        assert sum(length_bytes for length_bytes, _ in self.extents) <= request.length_bytes
        assert len(self.extents) == 1 or not request.flags & CommandFlag.REQ_ONE

    def reply(self) -> Reply:
        """DONE came."""
        request, data = self.request, b""
        for offset, piece in sorted(self.pieces.items()):
            assert offset == request.offset + len(data), "chunks must tile the range"
            data += piece
        if request.command == Command.READ and not self.error:
            assert len(data) == request.length_bytes
        if request.command == Command.BLOCK_STATUS and not self.error:
            assert self.extents
        if request.flags & CommandFlag.DF and request.command == Command.READ:
            assert len(self.kinds) == 1 and Chunk.OFFSET_HOLE not in self.kinds
        return Reply(request, self.error, data, tuple(self.kinds), self.extents)
