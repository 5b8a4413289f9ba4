"""Listening sockets and their handshakes; a negotiated socket is handed to the engine.

Rules: raw non-blocking sockets, never transports, because the descriptor changes its owner.  A
client's time is bounded by one budget for all its waits, an export's by another: a store that is
slow is not the client's fault, and the client hears of it.  No await between the last send and the
handover: once the client has its answer, the engine has its socket.

Happy path:
    serve_unix(path), serve_tcp(address) -> accept -> negotiate -> exports.open -> handover(...)
Failure modes:
    client breaks the protocol or stalls       -> it is cut off; counted, logged once per kind
    too many handshakes                        -> more wait in the listen backlog
    too many connections                       -> accepted and closed at once
    out of descriptors                         -> accepting pauses, then goes on
    client leaves                              -> counted; after open: release() too
    close()                                    -> no new ones; handshakes drain, late ones are cut
"""

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from millpond.cache.exports import ExportError, Exports, OpenExport
from millpond.nbd.errors import ProtocolError
from millpond.nbd.handshake import (
    ContextsRequested,
    DescribeRequested,
    Ended,
    Event,
    Handshake,
    ListRequested,
    OpenRequested,
    RefusalCode,
)
from millpond.nbd.limits import NbdLimits
from millpond.nbd.listener import listen_tcp, listen_unix, prepare_tcp
from millpond.store.address import Address
from millpond.store.unixsocket import SocketFile

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_REFUSALS: Final[dict[str, RefusalCode]] = {
    "unknown": "unknown",
    "busy": "policy",  # the protocol has no word for it; the message says who holds it
    "policy": "policy",
    "away": "platform",  # nor for this one: the message says that it may pass
    "platform": "platform",
    "shutdown": "shutdown",
}


class NbdServer:
    """All NBD listeners of a process.

    engine_connections: how many connections the engine holds now; they count towards
    limits.connections_max.  Without it only handshakes are bounded here.
    """

    def __init__(
        self,
        exports: Exports,
        *,
        limits: NbdLimits | None = None,
        engine_connections: Callable[[], int] = lambda: 0,
    ) -> None:
        self._exports = exports
        self._limits = limits or NbdLimits()
        self._engine_connections = engine_connections
        self._slots = asyncio.Semaphore(self._limits.handshakes_max)
        self._acceptors: list[asyncio.Task[None]] = []
        self._listeners: list[socket.socket] = []
        self._paths: list[SocketFile] = []
        self._handshakes: set[asyncio.Task[None]] = set()
        self._closing = False
        self.counts: Counter[str] = Counter()  # what happened to connections, by kind

    async def serve_unix(
        self, path: str, *, mode: int = 0o660, group: str | int | None = None
    ) -> None:
        """Listen on a unix socket; returns once clients can connect.  Raises ListenError."""
        assert not self._closing
        listener, bound = listen_unix(
            path, mode=mode, group=group, backlog=self._limits.listen_backlog
        )
        self._paths.append(bound)
        self.serve_socket(listener)

    async def serve_tcp(self, address: Address, *, insecure_listen: bool = False) -> Address:
        """Listen on TCP; returns the address with the port that was chosen where 0 was asked for.

        Loopback only, unless insecure_listen: nothing authenticates clients.  Raises ListenError.
        """
        assert not self._closing
        listeners = listen_tcp(
            address, insecure_listen=insecure_listen, backlog=self._limits.listen_backlog
        )
        for listener in listeners:
            self.serve_socket(listener)
        return Address(host=address.host, port=listeners[0].getsockname()[1])

    async def close(self) -> None:
        """Stop listening, let handshakes finish for a moment, cut the rest.  Twice is harmless."""
        self._closing = True
        acceptors, self._acceptors = self._acceptors, []
        for acceptor in acceptors:
            acceptor.cancel()
        await asyncio.gather(*acceptors, return_exceptions=True)
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        for bound in self._paths:
            bound.remove()
        self._paths.clear()
        if self._handshakes:
            await asyncio.wait(self._handshakes, timeout=self._limits.drain_timeout_s)
        late = list(self._handshakes)
        for handshake in late:
            handshake.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    def serve_socket(self, listener: socket.socket) -> None:
        """Accept on a listening, non-blocking socket of any stream family; owns it."""
        self._listeners.append(listener)
        self._acceptors.append(asyncio.create_task(self._accept_forever(listener)))

    async def _accept_forever(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._slots.acquire()
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:
                self._slots.release()
                self._note("cannot accept", f"cannot accept: {error}")
                await asyncio.sleep(self._limits.accept_pause_s)
                continue
            except BaseException:
                self._slots.release()
                raise
            task = asyncio.create_task(self._connection(sock))
            self._handshakes.add(task)
            task.add_done_callback(self._connection_done)

    def _connection_done(self, task: asyncio.Task[None]) -> None:
        self._handshakes.discard(task)
        self._slots.release()

    async def _connection(self, sock: socket.socket) -> None:
        """One client, until the engine has it or it is gone.  Never raises but CancelledError."""
        try:
            sock.setblocking(False)
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                prepare_tcp(sock)
            if self._engine_connections() + len(self._handshakes) > self._limits.connections_max:
                raise ProtocolError("too many connections", str(self._limits.connections_max))
            self.counts[await _Negotiation(self._exports, self._limits, sock).run()] += 1
        except ProtocolError as error:
            self._note(error.kind, str(error))
        except TimeoutError:
            limit_s = self._limits.client_timeout_s
            self._note("client too slow", f"client too slow: no export within {limit_s} s")
        except (BrokenPipeError, ConnectionResetError):
            self.counts["client left"] += 1  # a probe of the port, a killed tool: not worth a line
        except OSError as error:
            self._note("socket failed", f"socket failed: {error}")
        except Exception:
            # One guest's bad luck with a bug of ours must not end the listener of the others.
            self.counts["internal error"] += 1
            _log.exception("internal error in an NBD handshake; the connection is closed")
        finally:
            sock.close()  # of a socket that was handed over, and so detached: does nothing

    def _note(self, kind: str, text: str) -> None:
        """Count; log the first of a kind.  A client can repeat its mistake a million times."""
        self.counts[kind] += 1
        if self.counts[kind] == 1:
            _log.warning("NBD listener: %s (more of this kind are counted, not logged)", text)


class _Negotiation:
    """One client's handshake over its socket."""

    def __init__(self, exports: Exports, limits: NbdLimits, sock: socket.socket) -> None:
        self._exports = exports
        self._limits = limits
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._handshake = Handshake(limits)
        self._budget_s = limits.client_timeout_s

    async def run(self) -> str:
        """Returns, as a key for counting, how it ended: handed over, or without an export."""
        while True:
            event = self._handshake.next_event()
            if event is None:
                await self._send()
                if not await self._receive():
                    return "client left"
            elif isinstance(event, Ended):
                await self._send()
                return event.reason
            elif await self._answer(event):
                return "negotiated"

    async def _answer(self, event: Event) -> bool:
        """Answer an event; True: it was the last one, the engine has the socket."""
        try:
            if isinstance(event, OpenRequested):
                await self._hand_over(await self._export(self._exports.open(event.name)))
                return True
            if isinstance(event, DescribeRequested):
                export = await self._export(self._exports.describe(event.name))
                self._handshake.answer_describe(export)
            elif isinstance(event, ContextsRequested):
                await self._export(self._exports.describe(event.name))
                self._handshake.answer_contexts()
            elif isinstance(event, ListRequested):
                self._handshake.answer_list(self._exports.names())
        except ExportError as error:
            self._handshake.refuse(_REFUSALS[error.code], error.message)
        # Before the next event: what a client can make us hold stays one answer.
        await self._send()
        return False

    async def _hand_over(self, opened: OpenExport) -> None:
        """Tell the client that it is in, and give its socket away."""
        try:
            leftover = self._handshake.answer_open(opened.export)
            await self._send()
        except BaseException:
            await opened.release()
            raise
        opened.handover(self._sock, leftover, self._handshake.agreed)
        assert self._sock.fileno() == -1, "handover must detach the socket"

    async def _export(self, call: Awaitable[_T]) -> _T:
        """Wait for the cache, and behind it perhaps for a store."""
        try:
            async with asyncio.timeout(self._limits.export_timeout_s):
                return await call
        except TimeoutError:
            message = "the volume's store did not answer in time; try again"
            raise ExportError("away", message) from None

    async def _send(self) -> None:
        if output := self._handshake.take_output():
            await self._client(self._loop.sock_sendall(self._sock, output))

    async def _receive(self) -> bool:
        """Feed the handshake; False: the client is gone, and nothing is half said."""
        data = await self._client(self._loop.sock_recv(self._sock, self._limits.receive_bytes))
        if data:
            self._handshake.receive(data)
        elif not self._handshake.idle:
            raise ProtocolError("left inside an option")
        return bool(data)

    async def _client(self, call: Awaitable[_T]) -> _T:
        """Wait for the client, on its budget.  Raises TimeoutError when that is spent."""
        started_s = self._loop.time()
        async with asyncio.timeout(max(self._budget_s, 0)):
            result = await call
        self._budget_s -= self._loop.time() - started_s
        return result
