"""Data requests from Python, pipelined over one DataLink: for transfers, not for the data path.

Happy path: submit returns a future of the reply frame; many may be in flight.
Failure modes: a reply with a status becomes StoreError (its words name the volume); a lost link
fails every request in flight. Read replies are checked as a cache would: the pieces must tile what
was asked for, and every extent is verified before it is decoded.
"""

import asyncio
from collections.abc import Iterator
from typing import Any

from millpond.native import ffi, lib
from millpond.store import wire
from millpond.store.client import DataLink, connect_data
from millpond.store.errors import Code, ProtocolError, StoreError, Unreachable, one_line

REPLY_BYTES = ffi.sizeof("struct mp_read_reply")
PIECE_BYTES = ffi.sizeof("struct mp_piece")
CODE_OF_STATUS: dict[int, Code] = {
    lib.MP_STATUS_UNKNOWN_VOLUME: Code.NOT_FOUND,
    lib.MP_STATUS_STALE_EPOCH: Code.EPOCH,
    lib.MP_STATUS_FULL: Code.FULL,
    lib.MP_STATUS_INVALID: Code.INVALID,
    lib.MP_STATUS_RANGE: Code.INVALID,
}


class DataRequests:
    """Requests and replies over one fetch or destage link."""

    def __init__(self, role: wire.Role, volume_name: str) -> None:
        self._role: wire.Role = role
        self._volume_name = volume_name
        self._link: DataLink | None = None
        self._replies: dict[int, asyncio.Future[wire.Frame]] = {}
        self._next_request_id = 1
        self._error: Exception | None = None
        self._reader = wire.FrameReader(
            payload_max_bytes=wire.PAYLOAD_MAX_BYTES,
            types=(wire.READ_REPLY, wire.BATCH_REPLY, wire.ERROR),
            peer="the store",
        )

    async def connect(self, address: str, *, client_id: bytes, client_name: str) -> None:
        """Open the link."""
        self._link = await connect_data(
            address,
            role=self._role,
            client_id=client_id,
            client_name=client_name,
            on_bytes=self._on_bytes,
            on_lost=self._on_lost,
        )

    async def submit(
        self, frame_type: int, payload: bytes, *, checked_bytes: int | None = None
    ) -> asyncio.Future[wire.Frame]:
        """Send one request, once the link takes it; the future is its reply."""
        assert self._link is not None
        await self._link.drain()
        if self._error is not None:
            raise self._error
        request_id = self._next_request_id
        self._next_request_id += 1
        reply: asyncio.Future[wire.Frame] = asyncio.get_running_loop().create_future()
        self._replies[request_id] = reply
        self._link.write(
            wire.encode_frame(
                frame_type, payload, checked_bytes=checked_bytes, request_id=request_id
            )
        )
        return reply

    async def close(self) -> None:
        """Close the link; replies that nobody awaited are dropped."""
        for reply in self._replies.values():
            reply.cancel()
        if self._link is not None:
            await self._link.close()

    def _on_bytes(self, data: memoryview) -> None:
        self._reader.feed(data)
        while (frame := self._reader.next_frame()) is not None:
            if frame.type == wire.ERROR:
                raise ProtocolError(f"the store says: {wire.error_text(frame.payload)}")
            reply = self._replies.pop(frame.request_id, None)
            if reply is None or reply.done():
                continue
            if frame.status == wire.STATUS_OK:
                reply.set_result(frame)
            else:
                _fail(reply, self._refusal(frame.status))

    def _refusal(self, status: int) -> StoreError:
        reason = wire.STATUS_NAMES.get(status, f"status {status}")
        code = CODE_OF_STATUS.get(status, Code.IO)
        return StoreError(code, f"volume '{one_line(self._volume_name)}': {reason}")

    def _on_lost(self, error: Exception | None) -> None:
        self._error = error or Unreachable("the connection to the store was closed")
        replies, self._replies = self._replies, {}
        for reply in replies.values():
            if not reply.done():
                _fail(reply, self._error)


def _fail(reply: asyncio.Future[wire.Frame], error: Exception) -> None:
    """Of many in flight only the first failure is awaited: the others are no unheard errors."""
    reply.set_exception(error)
    reply.exception()


def encode_read(
    volume_id: bytes, *, epoch: int, minimum_sequence: int, first_block: int, block_count: int
) -> bytes:
    """Payload of a READ frame."""
    request = ffi.new("struct mp_read_request *")
    request.volume = volume_id
    request.epoch = epoch
    request.minimum_sequence = minimum_sequence
    request.first_block = first_block
    request.block_count = block_count
    return bytes(ffi.buffer(request))


class ReadReply:
    """A READ_REPLY whose pieces are known to tile the range asked for."""

    def __init__(
        self, frame: wire.Frame, *, volume_id: bytes, first_block: int, block_count: int
    ) -> None:
        payload = bytes(frame.payload)
        if len(payload) < REPLY_BYTES:
            raise ProtocolError("the store sent a READ_REPLY without a header")
        self._payload = payload
        self._bytes = ffi.from_buffer(payload)
        header = ffi.cast("struct mp_read_reply *", self._bytes)
        self._piece_count = int(header.piece_count)
        self._stored_from = REPLY_BYTES + self._piece_count * PIECE_BYTES
        asked = (volume_id, first_block, block_count)
        if (bytes(ffi.buffer(header.volume)), header.first_block, header.block_count) != asked:
            raise ProtocolError("the store answered another READ than was asked")
        if self._stored_from > frame.checked_bytes or self._stored_from > len(payload):
            raise ProtocolError("the store sent a READ_REPLY whose pieces are not checked")
        self._first_block = first_block
        self._block_count = block_count
        self.position: tuple[int, int] = (int(header.lineage), int(header.sequence))

    def blocks(self) -> Iterator[tuple[int, Any, int]]:
        """(first block, C memory, byte count) of every piece that is not a hole, verified."""
        next_block, offset = self._first_block, self._stored_from
        end_block = self._first_block + self._block_count
        for index in range(self._piece_count):
            piece = ffi.cast("struct mp_piece *", self._bytes + REPLY_BYTES + index * PIECE_BYTES)
            shipped_bytes, count = int(piece.shipped_bytes), int(piece.block_count)
            if piece.first_block != next_block or not 0 < count <= end_block - next_block:
                raise ProtocolError("the store sent a READ_REPLY whose pieces do not tile")
            if shipped_bytes > len(self._payload) - offset:
                raise ProtocolError("the store sent a READ_REPLY that is cut off")
            if piece.extent.codec not in (lib.MP_CODEC_ZERO, lib.MP_CODEC_TRIM):
                yield next_block, self._decode(piece, offset), count * lib.MP_BLOCK_BYTES
            next_block += count
            offset += shipped_bytes
        if next_block != end_block or offset != len(self._payload):
            raise ProtocolError("the store sent a READ_REPLY of the wrong length")

    def _decode(self, piece: Any, offset: int) -> Any:
        extent = ffi.addressof(piece.extent)
        skip_blocks = int(piece.first_block) - int(extent.first_block)
        status = lib.mp_extent_check(extent)
        if status >= 0 and 0 <= skip_blocks <= extent.block_count - piece.block_count:
            out = ffi.new("uint8_t[]", piece.block_count * lib.MP_BLOCK_BYTES)
            status = lib.mp_extent_decode(
                extent,
                skip_blocks,
                piece.block_count,
                self._bytes + offset,
                piece.shipped_bytes,
                out,
            )
            if status >= 0:
                return out
        raise StoreError(
            Code.IO,
            f"block {int(piece.first_block)} came damaged from the store: its checksum differs;"
            " check the store's disk",
        )
