"""The event loop's side of the store core's mailbox: streams in and out, and connection 0.

Rules: the core runs in its own reactor thread; we call only its "any thread" functions and hear of
it through one eventfd. One call carries whatever has arrived; no object is made per data frame.
Happy path: attach a stream, feed it; after a notification each stream that is listed takes.
Failure modes: the core stopped (disk failed): every call in flight fails with E_IO and on_failure
is told once; the daemon then ends, loudly. An exception in here does the same.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Protocol

from millpond.native.store import ScrubFinding, StoreCore, VolumeState
from millpond.store import limits, wire
from millpond.store.errors import Code, StoreError

OWN_CONNECTION = 0


class Stream(Protocol):
    """A connection whose frames the core answers."""

    def answers_ready(self) -> None:
        """Bytes can be taken for this connection."""

    def ended(self) -> None:
        """The core has closed the socket that it was given."""


class CoreLink:
    """Carries bytes between connections and the core. Event loop only."""

    def __init__(
        self,
        core: StoreCore,
        notify_fd: int,
        on_failure: Callable[[BaseException], None],
        on_scrub_finding: Callable[[ScrubFinding], None],
    ) -> None:
        self._core = core
        self._notify_fd = notify_fd
        self._on_failure = on_failure
        self._on_scrub_finding = on_scrub_finding
        self._streams: dict[int, Stream] = {}
        self._next_connection = OWN_CONNECTION + 1
        self._loop = asyncio.get_running_loop()
        self._replies: dict[int, asyncio.Future[wire.Frame]] = {}
        self._next_request_id = 1
        self._reader = wire.FrameReader(
            payload_max_bytes=wire.PAYLOAD_MAX_BYTES,
            types=(
                wire.PUT_VOLUME_REPLY,
                wire.DELETE_VOLUME_REPLY,
                wire.CHECKPOINT_REPLY,
                wire.ERROR,
            ),
            peer="the store core",
        )
        self._failed = False
        self._stopped = False

    def start(self) -> None:
        """Listen to the core's notifications."""
        self._loop.add_reader(self._notify_fd, self.notified)

    def stop(self) -> None:
        """Stop listening; calls in flight fail. The core is not called any more."""
        self._stopped = True
        self._loop.remove_reader(self._notify_fd)
        self._fail_replies(StoreError(Code.IO, "the store is shutting down"))

    def attach(self, stream: Stream) -> int:
        """A connection number of its own, never reused."""
        connection = self._next_connection
        self._next_connection += 1
        self._streams[connection] = stream
        return connection

    def connect(self, connection: int, fd: int, *, received: bytes, greeting: bytes) -> None:
        """Hand a socket over; the core sends greeting first.  OSError: fd stays the caller's."""
        self._living_core().connect(connection, fd, received=received, greeting=greeting)

    def detach(self, connection: int) -> None:
        """The connection is gone; what it asked for is still done."""
        del self._streams[connection]
        self._living_core().hangup(connection)

    def feed(self, connection: int, data: memoryview) -> None:
        """Bytes that the peer sent; ProtocolError when they are no frames of its role."""
        self._living_core().feed(connection, data)

    def take(self, connection: int) -> bytes:
        """Bytes to send to the peer; empty when there are none for now."""
        return self._living_core().take(connection, limits.TAKE_BYTES)

    def pending_bytes(self, connection: int) -> int:
        """Of frames that are not answered yet."""
        return self._living_core().pending_bytes(connection)

    async def request(self, frame_type: int, payload: bytes) -> wire.Frame:
        """One frame on the daemon's own connection, and its reply (whatever its status)."""
        if self._failed or self._stopped:
            raise StoreError(Code.IO, "the store has stopped after a failure; see its log")
        request_id = self._next_request_id
        self._next_request_id += 1
        reply: asyncio.Future[wire.Frame] = self._loop.create_future()
        self._replies[request_id] = reply
        try:
            self._core.feed(
                OWN_CONNECTION, wire.encode_frame(frame_type, payload, request_id=request_id)
            )
            return await reply
        finally:
            self._replies.pop(request_id, None)

    def volume(self, volume_id: bytes) -> VolumeState | None:
        """Committed state of a volume."""
        return self._core.volume(volume_id)

    def volumes(self) -> list[VolumeState]:
        """Committed states of all volumes."""
        return self._core.volumes()

    def notified(self) -> None:
        """The core has answers, or has failed."""
        try:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._notify_fd)
            failure = self._core.failure()
            if failure is not None:
                raise StoreError(Code.IO, failure)
            for finding in self._core.scrub_findings():
                self._on_scrub_finding(finding)
            # All of them: a connection whose peer does not read stays listed, and must not hide
            # the others behind it.
            for connection in self._core.ready(len(self._streams) + 1):
                if connection == OWN_CONNECTION:
                    self._take_replies()
                elif (stream := self._streams.get(connection)) is not None:
                    stream.answers_ready()
            while ended := self._core.ended():
                for connection in ended:
                    if (stream := self._streams.get(connection)) is not None:
                        stream.ended()
        except Exception as error:
            self._fail(error)

    def _living_core(self) -> StoreCore:
        assert not self._stopped, "a connection outlived the core"
        return self._core

    def _take_replies(self) -> None:
        while data := self._core.take(OWN_CONNECTION, limits.TAKE_BYTES):
            self._reader.feed(data)
        while (frame := self._reader.next_frame()) is not None:
            assert frame.type != wire.ERROR, wire.error_text(frame.payload)
            reply = self._replies.pop(frame.request_id, None)
            if reply is not None and not reply.done():
                reply.set_result(frame)

    def _fail(self, error: Exception) -> None:
        if self._failed:
            return
        self._failed = True
        self._fail_replies(error)
        self._on_failure(error)

    def _fail_replies(self, error: Exception) -> None:
        replies, self._replies = self._replies, {}
        for reply in replies.values():
            if not reply.done():
                reply.set_exception(error)
