"""The image of a volume as a store's core has it, read in frames and verified as a cache would.

Happy path: image() while the world turns.  Failure modes: a block that the store cannot read any
more is in `unreadable`; any other refusal is Illegal.
"""

from collections.abc import Awaitable, Callable

from millpond.native import ffi, lib
from millpond.native.record import Frame, decode_frame, encode_frame
from millpond.native.store import StoreCore
from millpond.store.link import CoreLink
from sim.nodes import READ_BLOCKS_MAX, decode_read_reply
from sim.oracle import BLOCK, Illegal

Until = Callable[[Callable[[], bool], str], Awaitable[None]]


class ImageReader:
    """A connection of the tester's own at a store's core."""

    def __init__(self, link: CoreLink, core: StoreCore) -> None:
        self.unreadable: set[int] = set()
        self._core = core
        self._link = link
        self._connection = link.attach(self)
        self._stream = bytearray()
        self._replies: dict[int, Frame] = {}
        self._request = 0

    def answers_ready(self) -> None:
        """As link.Stream."""
        while data := self._link.take(self._connection):
            self._stream += data
        while (found := decode_frame(bytes(self._stream))) is not None:
            frame, length = found
            self._replies[frame.request_id] = frame
            del self._stream[:length]

    def ended(self) -> None:
        """As link.Stream."""

    async def image(self, volume: bytes, block_count: int, until: Until) -> bytes:
        """All blocks; zeroes where `unreadable`."""
        whole = await self._read(volume, range(0, block_count, READ_BLOCKS_MAX), until, block_count)
        pieces = []
        for first, data in whole.items():
            if data is None:
                last = min(first + READ_BLOCKS_MAX, block_count)
                single = await self._read(volume, range(first, last), until, block_count, step=1)
                self.unreadable |= {block for block, one in single.items() if one is None}
                data = b"".join(one or bytes(BLOCK) for one in single.values())
            pieces.append(data)
        return b"".join(pieces)

    async def _read(
        self,
        volume: bytes,
        firsts: range,
        until: Until,
        block_count: int,
        *,
        step: int = READ_BLOCKS_MAX,
    ) -> dict[int, bytes | None]:
        state = self._core.volume(volume)
        assert state is not None
        asked: dict[int, int] = {}
        for first in firsts:
            wanted = ffi.new("struct mp_read_request *")
            wanted.volume, wanted.epoch, wanted.first_block = volume, state.epoch, first
            wanted.block_count = min(step, block_count - first)
            self._request += 1
            asked[first] = self._request
            payload = bytes(ffi.buffer(wanted))
            frame = encode_frame(lib.MP_FRAME_READ, payload, request_id=self._request)
            self._link.feed(self._connection, memoryview(frame))
        await until(lambda: all(r in self._replies for r in asked.values()), "the store's image")
        found: dict[int, bytes | None] = {}
        for first, request in asked.items():
            found[first] = _decoded(self._replies.pop(request))
        return found


def _decoded(frame: Frame) -> bytes | None:
    """None: the store tells that it cannot read this, or what it sends does not verify."""
    if frame.status in (lib.MP_STATUS_IO, lib.MP_STATUS_CORRUPT):
        return None
    if frame.status:
        raise Illegal(f"the store refuses a read with status {frame.status}")
    try:
        return decode_read_reply(frame)
    except Illegal:
        return None
