"""The daemon's connections: listening sockets, the handshake, roles, limits.

Happy path: accept, HELLO within the time-out, HELLO_REPLY, then the role's session has the bytes.
Failure modes: no HELLO in time, or a broken one: one reply that says why, then the end. Too many
connections: refused at once. A peer that vanishes: its session ends, its accepted work goes on.
A task or callback that dies: `on_failure` hears of it and the daemon ends; nothing is swallowed.
Without authentication TCP is bound to loopback only, unless the operator insists.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from typing import Any, cast

from millpond.store import limits, wire
from millpond.store.address import Address, check_exposure, keep_alive
from millpond.store.errors import Code, ProtocolError, StoreError, one_line
from millpond.store.session import Session
from millpond.store.unixsocket import SOCKET_MODE, SocketFile, bind_unix

log = logging.getLogger("millpond.store")

SessionFactory = Callable[["Connection", wire.Hello], Session]


class Server:
    """Listening sockets and their connections. Event loop only."""

    def __init__(
        self,
        *,
        greeting: wire.HelloReply,
        make_session: SessionFactory,
        on_failure: Callable[[BaseException], None],
        insecure_listen: bool = False,
        connections_max: int = limits.CONNECTIONS_MAX,
        handshake_timeout_s: float = limits.HANDSHAKE_TIMEOUT_S,
    ) -> None:
        self.greeting = greeting
        self.make_session = make_session
        self.connections: set[Connection] = set()
        self.handshake_timeout_s = handshake_timeout_s
        self.connections_max = connections_max
        self.refused_connections = 0
        self.closing = False
        self._on_failure = on_failure
        self._insecure_listen = insecure_listen
        self._listeners: list[asyncio.Server] = []
        self._socket_files: list[SocketFile] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(
        self, address: Address, *, mode: int = SOCKET_MODE, group: str | int | None = None
    ) -> Address:
        """Listen; returns the address with the port that was chosen when 0 was asked for."""
        loop = asyncio.get_running_loop()
        if address.path:
            sock, made = bind_unix(address.path, mode=mode, group=group)
            self._socket_files.append(made)
            self._listeners.append(
                await loop.create_unix_server(
                    lambda: Connection(self), sock=sock, backlog=limits.LISTEN_BACKLOG
                )
            )
            return address
        check_exposure(address, insecure_listen=self._insecure_listen)
        if not address.is_loopback:
            log.warning("listening insecurely address=%s: anyone who reaches it can", address)
        try:
            listener = await loop.create_server(
                lambda: Connection(self),
                address.host,
                address.port,
                backlog=limits.LISTEN_BACKLOG,
                reuse_address=True,
            )
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
            raise StoreError(Code.BUSY, f"cannot listen on {address}: {one_line(reason)}") from None
        self._listeners.append(listener)
        port = listener.sockets[0].getsockname()[1]
        return Address(host=address.host, port=port)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """A task of ours; its death is ours."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Something that must not happen did."""
        self._on_failure(error)

    async def close(self) -> None:
        """Stop accepting, let accepted calls finish, send what is queued, disconnect."""
        self.closing = True
        for listener in self._listeners:
            listener.close()
        for made in self._socket_files:
            made.remove()
        for connection in list(self.connections):
            connection.set_reading(False)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=limits.CLOSE_TIMEOUT_S)
        gone = [connection.end() for connection in list(self.connections)]
        if gone:
            _, slow = await asyncio.wait(gone, timeout=limits.CLOSE_TIMEOUT_S)
            for connection in list(self.connections):
                connection.abort()
            # The core goes away after us: nobody may be left who could still call it.
            if slow:
                await asyncio.wait(slow)
        for listener in self._listeners:
            await listener.wait_closed()


class Connection(asyncio.BufferedProtocol):
    """One accepted socket: handshake, then its session's bytes."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._session: Session | None = None
        self._refused = False
        self._handed_over = False  # the session has the socket; the transport is only its shell
        self._reading = True
        self._receive = memoryview(bytearray(limits.RECEIVE_BYTES))
        self._timer: asyncio.TimerHandle | None = None
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._reader = wire.FrameReader(
            payload_max_bytes=limits.HELLO_PAYLOAD_MAX_BYTES,
            types=(wire.HELLO,),
            peer="the client",
        )

    # -- asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not isinstance: uvloop's transports are none of asyncio's classes.
        stream = cast(asyncio.Transport, transport)
        self._transport = stream
        keep_alive(transport)
        stream.set_write_buffer_limits(limits.SEND_HIGH_BYTES, limits.SEND_LOW_BYTES)
        full = len(self._server.connections) >= self._server.connections_max
        self._server.connections.add(self)
        if full or self._server.closing:
            self._server.refused_connections += 1
            reason = "it is shutting down" if self._server.closing else "too many connections"
            self.refuse(wire.encode_error(f"the store refuses: {reason}"), reason)
            return
        self._timer = self._loop.call_later(self._server.handshake_timeout_s, self._no_hello)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._session is not None:
            return self._receive[: self._session.receive_bytes]
        # What comes behind a HELLO is the session's, before it can say how much it wants.
        return self._receive[: limits.HELLO_RECEIVE_BYTES]

    def buffer_updated(self, nbytes: int) -> None:
        try:
            if self._refused:
                return  # read and dropped, so that our last words arrive before a reset
            if self._session is not None:
                self._session.received(self._receive[:nbytes])
            else:
                self._shake_hands(self._receive[:nbytes])
        except Exception as error:
            self.abort()
            self._server.fail(error)

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        if self._session is not None:
            self._session.writable(False)

    def resume_writing(self) -> None:
        if self._session is not None and not self._refused:
            self._session.writable(True)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        self._transport = None
        if not self._handed_over:
            self._end_session()

    # -- handshake

    def _shake_hands(self, data: memoryview) -> None:
        try:
            self._reader.feed(data)
            frame = self._reader.next_frame()
        except ProtocolError as error:
            self.refuse(wire.encode_error(error.message), error.message)
            return
        if frame is None:
            return
        try:
            hello = wire.decode_json(frame.payload, wire.Hello, what="HELLO")
            wire.check_hello(hello)
        except ProtocolError as error:
            reply = wire.HelloReply(wire_version=wire.WIRE_VERSION, error=error.message)
            self.refuse(
                wire.encode_json(
                    wire.HELLO_REPLY,
                    reply,
                    request_id=frame.request_id,
                    status=wire.STATUS_INVALID,
                ),
                error.message,
            )
            return
        self._cancel_timer()
        greeting = wire.encode_json(
            wire.HELLO_REPLY, self._server.greeting, request_id=frame.request_id
        )
        log.info(
            "client connected role=%s client=%s name=%r",
            hello.role,
            hello.client_id,
            one_line(hello.client_name),
        )
        self._session = self._server.make_session(self, hello)
        rest = self._reader.rest()
        if self._session.takes_socket:
            self._hand_over(self._session, received=bytes(rest), greeting=greeting)
            return
        self.send(greeting)
        if rest:
            self._session.received(memoryview(rest))

    def _hand_over(self, session: Session, *, received: bytes, greeting: bytes) -> None:
        assert self._transport is not None
        fd = None
        try:
            fd = os.dup(self._transport.get_extra_info("socket").fileno())
            session.take_socket(fd, received=received, greeting=greeting)
        except OSError as error:  # out of descriptors, say: this peer's loss alone
            if fd is not None:
                os.close(fd)
            self.refuse(wire.encode_error(f"the store refuses: {error}"), str(error))
            return
        self._handed_over = True
        self._transport.abort()  # closes its own descriptor; the connection goes on

    def _end_session(self) -> None:
        """The socket is closed: nothing is left of this connection."""
        self._server.connections.discard(self)
        session, self._session = self._session, None
        try:
            if session is not None:
                session.lost()
        except Exception as error:
            self._server.fail(error)
        finally:
            if not self._gone.done():
                self._gone.set_result(None)

    def _no_hello(self) -> None:
        timeout_s = self._server.handshake_timeout_s
        message = f"no HELLO within {timeout_s:g} s"
        self.refuse(wire.encode_error(message), message)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- Peer, for sessions

    def send(self, data: bytes) -> None:
        """Queue bytes for the peer; dropped when it is gone."""
        if self._transport is not None:
            self._transport.write(data)

    def set_reading(self, reading: bool) -> None:
        """Read from the peer, or let it wait."""
        if self._transport is None or self._refused or self._handed_over:
            return
        if reading == self._reading:
            return
        if reading and self._server.closing:
            return
        self._reading = reading
        if reading:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a task of the server; it outlives the connection."""
        self._server.spawn(coroutine)

    def gone(self) -> None:
        """The socket that the session took is closed."""
        self._end_session()

    def refuse(self, last_words: bytes, reason: str) -> None:
        """Say why, then end: half-close, read what still comes, give up after a while."""
        if self._transport is None or self._refused:
            return
        log.warning("connection refused reason=%r", one_line(reason))
        self.set_reading(True)
        self._refused = True
        self._cancel_timer()
        self._transport.write(last_words)
        if self._transport.can_write_eof():
            self._transport.write_eof()
            self._timer = self._loop.call_later(limits.CLOSE_TIMEOUT_S, self.abort)
        else:
            self._transport.close()

    # -- for the server

    def end(self) -> asyncio.Future[None]:
        """Send what is queued and disconnect; done when the connection is gone."""
        if self._handed_over:
            self._end_session()
        elif self._transport is not None:
            self._transport.close()
        return self._gone

    def abort(self) -> None:
        """Disconnect now."""
        if self._handed_over:
            self._end_session()
        elif self._transport is not None:
            self._transport.abort()
