"""A store core on this disk, driven by frames as its daemon drives it."""

import os
import select
from collections import deque
from pathlib import Path
from typing import Any

from millpond.native import check, ffi, lib
from millpond.native.record import decode_frame, encode_batch, encode_frame
from millpond.native.store import Lineage, VolumeState

VOLUME = b"benchmark volume"
EPOCH, LINEAGE = 1, 7
SIZE_BYTES = 1 << 40
OWN, PEER = 0, 1  # connections: the daemon's own, and a cache's


class Core:
    """A store core with one volume, driven by frames as its daemon does."""

    def __init__(self, directory: Path) -> None:
        self._driver = lib.mp_driver_linux_directory(os.open(directory, os.O_RDONLY))
        check(lib.mp_store_format(self._driver, b"benchmark store!", 64 << 20))
        error, message = ffi.new("int *"), ffi.new("char[200]")
        options = ffi.new("struct mp_store_options *")
        self._store = lib.mp_store_open(self._driver, options, error, message, len(message))
        if not self._store:
            raise OSError(-error[0], ffi.string(message).decode())
        check(lib.mp_store_start(self._store))
        self._notified = lib.mp_driver_linux_notify_fd(self._driver)
        self._sequence = 0
        self._next_block = 0
        state = VolumeState(
            id=VOLUME,
            name="bench",
            size_bytes=SIZE_BYTES,
            epoch=EPOCH,
            lineages=(Lineage(LINEAGE, 1),),
        )
        frame = encode_frame(lib.MP_FRAME_PUT_VOLUME, state.encode())
        self.exchange([frame], connection=OWN)

    def close(self) -> None:
        """Stop the reactor and give the directory back."""
        lib.mp_store_stop(self._store)
        lib.mp_store_free(self._store)
        lib.mp_driver_destroy(self._driver)

    def counters(self) -> Any:
        """struct mp_store_counters."""
        out = ffi.new("struct mp_store_counters *")
        lib.mp_store_counters(self._store, out)
        return out

    def batch(self, data: bytes) -> bytes:
        """The BATCH frame that writes data behind everything written so far."""
        payload, last_sequence = encode_batch(
            VOLUME,
            lineage=LINEAGE,
            epoch=EPOCH,
            first_sequence=self._sequence + 1,
            first_block=self._next_block,
            data=data,
        )
        self._sequence = last_sequence
        self._next_block += len(data) // lib.MP_BLOCK_BYTES
        return encode_frame(lib.MP_FRAME_BATCH, payload, checked_bytes=0)

    def read(self, first_block: int, block_count: int) -> bytes:
        """The READ frame for these blocks."""
        request = ffi.new("struct mp_read_request *")
        request.volume = VOLUME
        request.epoch = EPOCH
        request.minimum_sequence = self._sequence
        request.first_block = first_block
        request.block_count = block_count
        return encode_frame(lib.MP_FRAME_READ, bytes(ffi.buffer(request)))

    def exchange(
        self, frames: list[bytes], *, connection: int = PEER, in_flight: int | None = None
    ) -> None:
        """Send frames, so many unanswered at most, and wait for as many replies, all OK."""
        unsent = deque(frames)
        received, replies = b"", 0

        def send(count: int) -> None:
            while unsent and len(frames) - len(unsent) < count:
                frame = unsent.popleft()
                check(lib.mp_store_feed(self._store, connection, frame, len(frame)))

        send(in_flight or len(frames))
        out = ffi.new("uint8_t[]", 1 << 20)
        ready = ffi.new("uint64_t[]", 8)
        while replies < len(frames):
            if not select.select([self._notified], [], [], 30)[0]:
                raise TimeoutError("the store core does not answer")
            lib.mp_store_ready(self._store, ready, len(ready))
            while taken := check(lib.mp_store_take(self._store, connection, out, len(out))):
                received += bytes(ffi.buffer(out, taken))
            while found := decode_frame(received):
                reply, length_bytes = found
                assert reply.status == lib.MP_STATUS_OK, f"status {reply.status}"
                received, replies = received[length_bytes:], replies + 1
            send(replies + (in_flight or len(frames)))
