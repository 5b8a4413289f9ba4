"""The client's end of a connection to a store: calls (control) and byte streams (fetch, destage).

StoreClient carries control calls: many in flight, paired by request id. DataLink carries frames
that C builds and parses (the cache's engine) or transfer.py does; it knows only the handshake.

Happy path: connect, HELLO, HELLO_REPLY, then calls or bytes.
Failure modes: cannot connect or lost: Unreachable, for every call in flight; the store refused or
broke the protocol: ProtocolError or StoreError with the store's own words. A lost connection says
nothing about what the store did: a caller that needs to know asks again.
"""

import asyncio
import os
from collections.abc import Callable
from typing import Any, cast

import msgspec

from millpond.store import limits, wire
from millpond.store.address import Address, connect_transport, keep_alive, parse_address
from millpond.store.errors import Code, ProtocolError, StoreError, Unreachable, one_line


class ControlReply(msgspec.Struct, frozen=True):
    """The part that every CONTROL_REPLY has."""

    ok: bool
    code: str = ""
    message: str = ""


class _Link(asyncio.BufferedProtocol):
    """A connection that says HELLO first. Subclasses get frames or bytes after it."""

    def __init__(self, address: Address, hello: wire.Hello) -> None:
        self.address = address
        self.store: wire.HelloReply | None = None
        self._hello = hello
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._receive = memoryview(bytearray(limits.RECEIVE_BYTES))
        self._reader = wire.FrameReader(
            payload_max_bytes=limits.HELLO_PAYLOAD_MAX_BYTES,
            types=(wire.HELLO_REPLY, wire.ERROR),
            peer=f"the store at {address}",
        )
        self._greeted: asyncio.Future[None] = self._loop.create_future()
        self._resumed: asyncio.Future[None] | None = None
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._error: Exception | None = None

    async def _establish(self) -> None:
        """Connect and shake hands; on any failure nothing stays open."""
        try:
            await connect_transport(self.address, self)
            async with asyncio.timeout(limits.HANDSHAKE_TIMEOUT_S):
                await self._greeted
        except TimeoutError:
            self._abort()
            raise Unreachable(
                f"the store at {self.address} accepted the connection and said nothing"
            ) from None
        except BaseException:
            self._abort()
            raise

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not isinstance: uvloop's transports are none of asyncio's classes.
        stream = cast(asyncio.Transport, transport)
        self._transport = stream
        stream.set_write_buffer_limits(limits.SEND_HIGH_BYTES, limits.SEND_LOW_BYTES)
        keep_alive(transport)
        stream.write(wire.encode_json(wire.HELLO, self._hello))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._receive

    def buffer_updated(self, nbytes: int) -> None:
        data = self._receive[:nbytes]
        if self.store is not None:
            self._received(data)
            return
        try:
            self._reader.feed(data)
            frame = self._reader.next_frame()
            if frame is not None:
                self._greet(frame)
        except StoreError as error:
            self._fail(error)

    def _greet(self, frame: wire.Frame) -> None:
        if frame.type == wire.ERROR:
            raise ProtocolError(
                f"the store at {self.address} refused: {wire.error_text(frame.payload)}"
            )
        reply = wire.decode_json(frame.payload, wire.HelloReply, what="HELLO_REPLY")
        if frame.status != 0:
            raise ProtocolError(f"the store at {self.address} refused: {one_line(reply.error)}")
        if reply.wire_version != wire.WIRE_VERSION:
            raise ProtocolError(
                wire.version_mismatch(
                    reply.wire_version, "this client", f"the store at {self.address}"
                )
            )
        self.store = reply
        if not self._greeted.done():
            self._greeted.set_result(None)
        self._connected()

    def pause_writing(self) -> None:
        self._resumed = self._loop.create_future()

    def resume_writing(self) -> None:
        if self._resumed is not None and not self._resumed.done():
            self._resumed.set_result(None)
        self._resumed = None

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        reason = f": {one_line(str(exc))}" if exc is not None else ""
        error = self._error or Unreachable(f"lost the store at {self.address}{reason}")
        if self._resumed is not None and not self._resumed.done():
            self._resumed.set_result(None)
        self._resumed = None
        self._transport = None
        if not self._closed.done():
            self._closed.set_result(None)
        if not self._greeted.done():
            self._greeted.set_exception(error)
            self._greeted.exception()  # retrieved by whoever waits; nobody may be waiting any more
            return
        self._lost(error)

    def _fail(self, error: Exception) -> None:
        """We cannot go on with this peer: remember why, drop the connection."""
        self._error = self._error or error
        self._abort()

    # -- for subclasses

    def _connected(self) -> None:
        raise NotImplementedError

    def _received(self, data: memoryview) -> None:
        raise NotImplementedError

    def _lost(self, error: Exception) -> None:
        raise NotImplementedError

    # -- public

    @property
    def writable(self) -> bool:
        """False while more than the high-water mark waits to be sent, and after the end."""
        return self._transport is not None and self._resumed is None

    async def drain(self) -> None:
        """Wait until writable again; Unreachable when the connection is lost."""
        if self._resumed is not None:
            await asyncio.shield(self._resumed)
        if self._transport is None:
            raise self._error or Unreachable(f"lost the store at {self.address}")

    async def close(self) -> None:
        """Send what is buffered, then close; never raises for a peer that is gone."""
        if self._transport is None:
            return
        self._transport.close()
        try:
            async with asyncio.timeout(limits.CLOSE_TIMEOUT_S):
                await asyncio.shield(self._closed)
        except TimeoutError:
            self._abort()


class StoreClient(_Link):
    """Control calls to one store. Create with `await StoreClient.connect(...)`."""

    def __init__(self, address: Address, hello: wire.Hello) -> None:
        super().__init__(address, hello)
        self._calls: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._next_request_id = 1

    @classmethod
    async def connect(
        cls, address: str, *, role: wire.Role = "control", client_id: bytes, client_name: str
    ) -> "StoreClient":
        """Connect and shake hands. client_id: 16 bytes, who we are in holders and logs."""
        client = cls(parse_address(address), _hello(role, client_id, client_name))
        await client._establish()
        return client

    async def call(self, op: str, /, **arguments: Any) -> dict[str, Any]:
        """One control call; StoreError carries the store's code and message.

        A cancelled call may still happen at the store; its reply is dropped.
        """
        await self.drain()
        assert self._transport is not None
        request_id = self._next_request_id
        self._next_request_id += 1
        reply: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._calls[request_id] = reply
        frame = wire.encode_json(wire.CONTROL, {"op": op, **arguments}, request_id=request_id)
        self._transport.write(frame)
        try:
            return await reply
        finally:
            self._calls.pop(request_id, None)

    def _connected(self) -> None:
        self._reader.expect(
            payload_max_bytes=limits.CONTROL_REPLY_MAX_BYTES,
            types=(wire.CONTROL_REPLY, wire.ERROR),
        )
        self._received(memoryview(b""))

    def _received(self, data: memoryview) -> None:
        self._reader.feed(data)
        try:
            while (frame := self._reader.next_frame()) is not None:
                self._take_reply(frame)
        except StoreError as error:
            self._fail(error)

    def _take_reply(self, frame: wire.Frame) -> None:
        if frame.type == wire.ERROR:
            raise ProtocolError(
                f"the store at {self.address} says: {wire.error_text(frame.payload)}"
            )
        reply = wire.decode_json(frame.payload, ControlReply, what="CONTROL_REPLY")
        result = wire.decode_json(frame.payload, dict[str, Any], what="CONTROL_REPLY")
        waiting = self._calls.pop(frame.request_id, None)
        if waiting is None or waiting.done():
            return  # cancelled by the caller
        if reply.ok:
            del result["ok"]
            waiting.set_result(result)
        else:
            waiting.set_exception(StoreError(reply.code or Code.IO, one_line(reply.message)))

    def _lost(self, error: Exception) -> None:
        calls, self._calls = self._calls, {}
        for waiting in calls.values():
            if not waiting.done():
                waiting.set_exception(error)
        self._error = self._error or error


class DataLink(_Link):
    """A byte stream of frames after the handshake. Create with `connect_data`."""

    def __init__(
        self,
        address: Address,
        hello: wire.Hello,
        on_bytes: Callable[[memoryview], None],
        on_lost: Callable[[Exception | None], None],
    ) -> None:
        super().__init__(address, hello)
        self._on_bytes = on_bytes
        self._on_lost = on_lost
        self._closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes, which must not change afterwards; dropped when the connection is lost.

        Check `writable` or await drain() between large writes.
        """
        if self._transport is not None:
            self._transport.write(data)

    def detach(self) -> int:
        """Take the socket away from the event loop: a descriptor that is the caller's from here.

        Nothing more is read here, and on_lost is not called.  Unreachable: it is lost already.
        """
        if self._transport is None:
            raise self._error or Unreachable(f"lost the store at {self.address}")
        fd = os.dup(self._transport.get_extra_info("socket").fileno())
        self._closing = True
        self._on_lost = _nobody_listens
        self._transport.abort()
        return fd

    async def close(self) -> None:
        """Close on purpose: on_lost is called with None."""
        self._closing = True
        await super().close()

    def _connected(self) -> None:
        rest = self._reader.rest()
        if rest:
            self._received(memoryview(rest))

    def _received(self, data: memoryview) -> None:
        if self._closing:
            return
        try:
            self._on_bytes(data)
        except StoreError as error:
            self._fail(error)

    def _lost(self, error: Exception) -> None:
        self._error = self._error or error
        self._on_lost(None if self._closing else self._error)


async def connect_data(
    address: str,
    *,
    role: wire.Role,
    client_id: bytes,
    client_name: str,
    on_bytes: Callable[[memoryview], None],
    on_lost: Callable[[Exception | None], None],
) -> DataLink:
    """Open a fetch or destage stream. The memoryview given to on_bytes is valid only in the call.

    on_bytes may raise StoreError: the connection is dropped and on_lost gets that error. on_lost is
    called exactly once (perhaps before this returns), and never when connect_data itself raised.
    """
    assert role in ("fetch", "destage"), "control connections are StoreClient's"
    link = DataLink(parse_address(address), _hello(role, client_id, client_name), on_bytes, on_lost)
    try:
        await link._establish()
    except BaseException:
        link._on_lost = _nobody_listens
        raise
    return link


def _nobody_listens(error: Exception | None) -> None:
    """Whoever would hear of it knows, or is served by somebody else."""


def _hello(role: wire.Role, client_id: bytes, client_name: str) -> wire.Hello:
    assert len(client_id) == 16, "a client id has 16 bytes"
    return wire.Hello(
        role=role,
        wire_version=wire.WIRE_VERSION,
        client_id=client_id.hex(),
        client_name=client_name[: limits.CLIENT_NAME_MAX],
    )
