"""A small raw NBD client for tests: synchronous calls, pipelining with cookies, raw bytes.

It checks nothing that a server should check, so that it can send what is wrong.  It never
deadlocks on a full socket: while sending would block it reads replies.  One thread per client.

    with connect(uri) as client:                 # "nbd+unix:///name?socket=PATH", "nbd://host:port"
        client.write(4096, b"x" * 4096, fua=True)
        assert client.read(4096, 4096) == b"x" * 4096

    cookies = [client.submit_write(n * 4096, block) for n in range(1000)]
    for reply in client.replies(): ...           # in the server's order, until nothing is in flight

Failure modes:
    an error reply from a synchronous call   -> NbdReplyError, .error is the wire's number
    the connection ends                      -> ConnectionLost; .in_flight says what was unanswered
    no progress for timeout_s                -> TimeoutError
    a reply that makes no sense              -> AssertionError
"""

import select
import socket
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

from millpond.nbd import wire
from millpond.nbd.wire import (
    Command,
    CommandFlag,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)
from nbdchunks import Chunked, Reply, Request

__all__ = ["Reply", "Request"]

_RECEIVE_BYTES = 1 << 20


class NbdReplyError(Exception):
    """The server answered a request with an error."""

    def __init__(self, request: "Request", error: int) -> None:
        super().__init__(f"{request}: error {error}")
        self.request = request
        self.error = error


class OptionRefused(Exception):
    """The server answered an option with an error."""

    def __init__(self, reply: int, message: str) -> None:
        super().__init__(f"{reply:#x}: {message}")
        self.reply = reply
        self.message = message


class ConnectionLost(Exception):
    """The connection ended while something was expected on it."""


@dataclass(frozen=True)
class Address:
    """Where a URI points to."""

    family: socket.AddressFamily
    address: str | tuple[str, int]
    export: str


def parse_uri(uri: str) -> Address:
    """nbd+unix:///export?socket=PATH, nbd://host[:port]/export."""
    parts = urlsplit(uri)
    export = unquote(parts.path.removeprefix("/"))
    if parts.scheme == "nbd+unix":
        return Address(socket.AF_UNIX, parse_qs(parts.query)["socket"][0], export)
    assert parts.scheme == "nbd" and parts.hostname is not None, uri
    family = socket.AF_INET6 if ":" in parts.hostname else socket.AF_INET
    return Address(family, (parts.hostname, parts.port or 10809), export)


def connect_socket(uri: str, *, timeout_s: float = 30.0) -> socket.socket:
    """A connected socket before the first byte of the handshake."""
    where = parse_uri(uri)
    sock = socket.socket(where.family, socket.SOCK_STREAM)
    try:
        if where.family == socket.AF_UNIX:
            sock.connect(where.address)  # with a timeout, a full backlog would be EAGAIN at once
            sock.settimeout(timeout_s)
        else:
            sock.settimeout(timeout_s)
            sock.connect(where.address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock


def connect(
    uri: str,
    *,
    export: str | None = None,
    option: Literal["go", "export_name"] = "go",
    structured: bool = False,
    allocation: bool = False,
    timeout_s: float = 30.0,
) -> "NbdClient":
    """Connect and negotiate one export; the URI's, unless named."""
    name = parse_uri(uri).export if export is None else export
    sock = connect_socket(uri, timeout_s=timeout_s)
    try:
        negotiation = Negotiation(sock)
        negotiation.greet()
        if structured or allocation:
            negotiation.structured_replies()
        if allocation:
            assert negotiation.set_contexts(name, "base:allocation") == {"base:allocation": 1}
        if option == "go":
            negotiation.go(name)
        else:
            negotiation.export_name(name)
        return NbdClient(sock, negotiation, timeout_s=timeout_s)
    except BaseException:
        sock.close()
        raise


class Negotiation:
    """The option phase, blocking; what it learns about the export stays in its attributes."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.zeroes = True
        self.structured = False
        self.size_bytes = 0
        self.flags = TransmissionFlag(0)
        self.name: str | None = None
        self.description: str | None = None
        self.block_sizes: tuple[int, int, int] | None = None  # minimum, preferred, max payload

    def receive(self, length_bytes: int) -> bytes:
        """Exactly so many bytes."""
        data = bytearray()
        while len(data) < length_bytes:
            piece = self._sock.recv(length_bytes - len(data))
            if not piece:
                raise ConnectionLost(f"{len(data)} of {length_bytes} bytes, then the end")
            data += piece
        return bytes(data)

    def greet(self, flags: int = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES) -> None:
        """Read the greeting, send the client's flags."""
        magic, option_magic, server_flags = wire.GREETING.unpack(self.receive(wire.GREETING.size))
        assert (magic, option_magic) == (wire.GREETING_MAGIC, wire.OPTION_MAGIC)
        assert server_flags & HandshakeFlag.FIXED_NEWSTYLE
        self._sock.sendall(wire.CLIENT_FLAGS.pack(flags))
        self.zeroes = not flags & HandshakeFlag.NO_ZEROES

    def send_option(self, option: int, data: bytes = b"") -> None:
        """Send an option, wait for nothing."""
        self._sock.sendall(wire.OPTION_HEADER.pack(wire.OPTION_MAGIC, option, len(data)) + data)

    def receive_reply(self, option: int) -> tuple[int, bytes]:
        """One reply to an option: its type and data."""
        header = self.receive(wire.OPTION_REPLY_HEADER.size)
        magic, echoed, reply, length_bytes = wire.OPTION_REPLY_HEADER.unpack(header)
        assert magic == wire.OPTION_REPLY_MAGIC
        assert echoed == option
        return reply, self.receive(length_bytes)

    def structured_replies(self) -> None:
        """STRUCTURED_REPLY, acknowledged."""
        self.send_option(Option.STRUCTURED_REPLY)
        assert list(self._until_ack(Option.STRUCTURED_REPLY, OptionReply.INFO)) == []
        self.structured = True

    def set_contexts(self, name: str, *queries: str) -> dict[str, int]:
        """SET_META_CONTEXT: names and numbers of the selected ones."""
        return self._contexts(Option.SET_META_CONTEXT, name, queries)

    def list_contexts(self, name: str, *queries: str) -> list[str]:
        """LIST_META_CONTEXT: the names."""
        return list(self._contexts(Option.LIST_META_CONTEXT, name, queries))

    def _contexts(self, option: Option, name: str, queries: tuple[str, ...]) -> dict[str, int]:
        self.send_option(option, contexts_data(name, *queries))
        found = {}
        for data in self._until_ack(option, OptionReply.META_CONTEXT):
            (found[data[4:].decode()],) = wire.CONTEXT_ID.unpack_from(data)
        return found

    def list_exports(self) -> list[str]:
        """The names of all exports."""
        self.send_option(Option.LIST)
        names = []
        for data in self._until_ack(Option.LIST, OptionReply.SERVER):
            (length_bytes,) = wire.NAME_LENGTH.unpack_from(data)
            names.append(data[4 : 4 + length_bytes].decode())
        return names

    def info(self, name: str) -> None:
        """INFO: what is learnt is in the attributes."""
        self._describe(Option.INFO, name)

    def go(self, name: str) -> None:
        """GO: the transmission phase begins."""
        self._describe(Option.GO, name)

    def export_name(self, name: str) -> None:
        """EXPORT_NAME: the transmission phase begins, or the connection ends."""
        self.send_option(Option.EXPORT_NAME, name.encode())
        size_bytes, flags = wire.EXPORT_NAME_REPLY.unpack(self.receive(wire.EXPORT_NAME_REPLY.size))
        self.size_bytes, self.flags = size_bytes, TransmissionFlag(flags)
        if self.zeroes:
            assert self.receive(len(wire.EXPORT_NAME_ZEROES)) == wire.EXPORT_NAME_ZEROES

    def abort(self) -> None:
        """ABORT, acknowledged."""
        self.send_option(Option.ABORT)
        assert list(self._until_ack(Option.ABORT, OptionReply.INFO)) == []

    def _describe(self, option: Option, name: str) -> None:
        self.send_option(option, info_data(name, *Info))
        seen = set()
        for data in self._until_ack(option, OptionReply.INFO):
            (kind,) = wire.INFO_KIND.unpack_from(data)
            assert kind not in seen, f"information {kind} came twice"
            seen.add(kind)
            if kind == Info.EXPORT:
                _, self.size_bytes, flags = wire.INFO_EXPORT.unpack(data)
                self.flags = TransmissionFlag(flags)
            elif kind == Info.NAME:
                self.name = data[2:].decode()
            elif kind == Info.DESCRIPTION:
                self.description = data[2:].decode()
            elif kind == Info.BLOCK_SIZE:
                self.block_sizes = wire.INFO_BLOCK_SIZE.unpack(data)[1:]
        assert Info.EXPORT in seen, "the protocol demands INFO_EXPORT"

    def _until_ack(self, option: int, expected: OptionReply) -> Iterator[bytes]:
        while True:
            reply, data = self.receive_reply(option)
            if reply == OptionReply.ACK:
                assert data == b""
                return
            if reply & 1 << 31:
                raise OptionRefused(reply, data.decode())
            assert reply == expected
            yield data


def info_data(name: str, *kinds: int) -> bytes:
    """The data of INFO and GO."""
    encoded = name.encode()
    data = wire.NAME_LENGTH.pack(len(encoded)) + encoded + wire.INFO_COUNT.pack(len(kinds))
    return data + b"".join(wire.INFO_KIND.pack(kind) for kind in kinds)


def contexts_data(name: str, *queries: str) -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    strings = [text.encode() for text in (name, *queries)]
    counted = [wire.NAME_LENGTH.pack(len(text)) + text for text in strings]
    counted.insert(1, wire.QUERY_COUNT.pack(len(queries)))
    return b"".join(counted)


class NbdClient:
    """A connection in its transmission phase."""

    def __init__(
        self, sock: socket.socket, negotiation: Negotiation, *, timeout_s: float = 30.0
    ) -> None:
        self.socket = sock
        self.size_bytes = negotiation.size_bytes
        self.flags = negotiation.flags
        self.structured = negotiation.structured
        self.block_sizes = negotiation.block_sizes
        self.name = negotiation.name
        self.timeout_s = timeout_s
        self.in_flight: dict[int, deque[Request]] = {}  # by cookie; a test may use one twice
        self.ended = False  # the server has closed its side
        self._cookie = 0
        self._received = bytearray()
        self._replies: deque[Reply] = deque()
        self._chunked: dict[int, Chunked] = {}  # structured replies that are not whole yet
        sock.setblocking(False)

    def __enter__(self) -> "NbdClient":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # One request at a time.

    def read(self, offset: int, length_bytes: int, *, flags: int = 0) -> bytes:
        """Read and wait."""
        return self._call(Command.READ, offset, length_bytes, flags).data

    def write(self, offset: int, payload: bytes, *, fua: bool = False, flags: int = 0) -> None:
        """Write and wait."""
        flags |= _fua(fua)
        self.wait(self.submit(Command.WRITE, offset, len(payload), flags=flags, payload=payload))

    def flush(self) -> None:
        """Flush and wait."""
        self._call(Command.FLUSH, 0, 0, 0)

    def trim(self, offset: int, length_bytes: int, *, fua: bool = False) -> None:
        """Trim and wait."""
        self._call(Command.TRIM, offset, length_bytes, _fua(fua))

    def zeroes(
        self, offset: int, length_bytes: int, *, fua: bool = False, no_hole: bool = False
    ) -> None:
        """Write zeroes and wait."""
        flags = _fua(fua) | (CommandFlag.NO_HOLE if no_hole else 0)
        self._call(Command.WRITE_ZEROES, offset, length_bytes, flags)

    def cache(self, offset: int, length_bytes: int) -> None:
        """Prefetch and wait."""
        self._call(Command.CACHE, offset, length_bytes, 0)

    def block_status(
        self, offset: int, length_bytes: int, *, req_one: bool = False
    ) -> tuple[tuple[int, int], ...]:
        """Extents of base:allocation: length and flags."""
        flags = CommandFlag.REQ_ONE if req_one else 0
        return self._call(Command.BLOCK_STATUS, offset, length_bytes, flags).extents

    # Many requests at a time.

    def submit(
        self,
        command: int,
        offset: int = 0,
        length_bytes: int = 0,
        *,
        flags: int = 0,
        payload: bytes = b"",
        cookie: int | None = None,
    ) -> int:
        """Send a request of any kind, right or wrong; returns its cookie."""
        if cookie is None:
            self._cookie += 1
            cookie = self._cookie
        request = Request(cookie, command, offset, length_bytes, flags, payload)
        if command != Command.DISC:
            self.in_flight.setdefault(cookie, deque()).append(request)
        self.send(request_bytes(request) + payload)
        return cookie

    def submit_read(self, offset: int, length_bytes: int) -> int:
        """Send a read."""
        return self.submit(Command.READ, offset, length_bytes)

    def submit_write(self, offset: int, payload: bytes, *, fua: bool = False) -> int:
        """Send a write."""
        flags = _fua(fua)
        return self.submit(Command.WRITE, offset, len(payload), flags=flags, payload=payload)

    def submit_flush(self) -> int:
        """Send a flush."""
        return self.submit(Command.FLUSH)

    def expect(self, request: Request) -> None:
        """A reply is due for a request that is (or will be) sent as raw bytes."""
        self.in_flight.setdefault(request.cookie, deque()).append(request)

    def wait(self, cookie: int) -> Reply:
        """The reply to one request; others that come first are kept.  Raises NbdReplyError."""
        reply = self.result(cookie)
        if reply.error:
            raise NbdReplyError(reply.request, reply.error)
        return reply

    def result(self, cookie: int) -> Reply:
        """The reply to one request, with or without an error."""
        while True:
            for reply in self._replies:
                if reply.request.cookie == cookie:
                    self._replies.remove(reply)
                    return reply
            self._receive_more()

    def next_reply(self) -> Reply:
        """The next reply in the server's order."""
        while not self._replies:
            self._receive_more()
        return self._replies.popleft()

    def replies(self) -> Iterator[Reply]:
        """All replies until nothing is in flight."""
        while self._replies or self.in_flight:
            yield self.next_reply()

    def arrived(self) -> list[Reply]:
        """The replies that are here already; never waits.  A lost connection shows in .ended."""
        while not self.ended and self._receive_now():
            pass
        arrived = list(self._replies)
        self._replies.clear()
        return arrived

    # Raw bytes and the end.

    def send(self, data: bytes) -> None:
        """Send bytes as they are, reading replies while the socket is full."""
        view = memoryview(data)
        while view:
            try:
                view = view[self.socket.send(view) :]
            except BlockingIOError:
                self._poll(select.POLLOUT if self.ended else select.POLLIN | select.POLLOUT)
                if not self.ended:
                    self._receive_now()
            except (BrokenPipeError, ConnectionResetError) as error:
                self.arrived()
                raise ConnectionLost("while sending") from error

    def wait_for_end(self) -> list[Reply]:
        """The replies until the server closes the connection."""
        while not self.ended:
            if not self._receive_now():
                self._poll(select.POLLIN)
        assert not self._received, "the server closed inside a reply"
        return self.arrived()

    def half_close(self) -> None:
        """Send no more; replies still arrive."""
        self.socket.shutdown(socket.SHUT_WR)

    def disconnect(self) -> list[Reply]:
        """DISC, then the replies until the server closes."""
        self.submit(Command.DISC)
        return self.wait_for_end()

    def close(self) -> None:
        """Close without a word; requests in flight are abandoned."""
        self.socket.close()

    def reset(self) -> None:
        """Close at once, unread replies lost; over TCP with a reset."""
        if self.socket.family != socket.AF_UNIX:
            linger = struct.pack("ii", 1, 0)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.socket.close()

    def _call(self, command: int, offset: int, length_bytes: int, flags: int) -> Reply:
        return self.wait(self.submit(command, offset, length_bytes, flags=flags))

    def _receive_more(self) -> None:
        """Wait until something arrived."""
        if self.ended:
            raise ConnectionLost(f"{sum(map(len, self.in_flight.values()))} requests unanswered")
        if not self._receive_now():
            self._poll(select.POLLIN)

    def _receive_now(self) -> bool:
        """Read once without waiting; False: nothing was there."""
        try:
            data = self.socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            data = b""
        if not data:
            self.ended = True
            return True
        self._received += data
        self._parse()
        return True

    def _parse(self) -> None:
        """Whole replies, and whole chunks, out of what was received."""
        start = 0
        while len(self._received) - start >= wire.SIMPLE_REPLY.size:
            (magic,) = struct.unpack_from(">I", self._received, start)
            assert magic in (wire.SIMPLE_REPLY_MAGIC, wire.CHUNK_MAGIC), f"reply magic {magic:#x}"
            parse = self._parse_chunk if magic == wire.CHUNK_MAGIC else self._parse_simple
            end = parse(start)
            if end is None:
                break
            start = end
        del self._received[:start]

    def _parse_simple(self, start: int) -> int | None:
        """Where the next reply begins; None: this one is not whole."""
        header = wire.SIMPLE_REPLY
        _, error, cookie = header.unpack_from(self._received, start)
        request = self._request_of(cookie)
        end = start + header.size
        if request.command == Command.READ and not error:
            end += request.length_bytes
        if len(self._received) < end:
            return None
        assert not self.structured or request.command not in (Command.READ, Command.BLOCK_STATUS)
        self._finish(Reply(request, error, bytes(self._received[start + header.size : end])))
        return end

    def _parse_chunk(self, start: int) -> int | None:
        header = wire.CHUNK
        if len(self._received) - start < header.size:
            return None
        _, flags, kind, cookie, length_bytes = header.unpack_from(self._received, start)
        end = start + header.size + int(length_bytes)
        assert self.structured and length_bytes < 80 << 20
        if len(self._received) < end:
            return None
        request = self._request_of(cookie)
        chunked = self._chunked.setdefault(cookie, Chunked(request))
        chunked.add(kind, bytes(self._received[start + header.size : end]))
        if flags & wire.CHUNK_DONE:
            self._finish(self._chunked.pop(cookie).reply())
        return end

    def _request_of(self, cookie: int) -> Request:
        assert cookie in self.in_flight, f"a reply to nothing: cookie {cookie}"
        return self.in_flight[cookie][0]

    def _finish(self, reply: Reply) -> None:
        self._replies.append(reply)
        cookie = reply.request.cookie
        self.in_flight[cookie].popleft()
        if not self.in_flight[cookie]:
            del self.in_flight[cookie]

    def _poll(self, events: int) -> None:
        poller = select.poll()
        poller.register(self.socket, events)
        if not poller.poll(self.timeout_s * 1000):
            raise TimeoutError(f"no progress for {self.timeout_s} s")


def request_bytes(request: Request, *, magic: int = wire.REQUEST_MAGIC) -> bytes:
    """A request's header as it goes on the wire."""
    return wire.REQUEST.pack(
        magic,
        request.flags,
        request.command,
        request.cookie,
        request.offset,
        request.length_bytes,
    )


def _fua(fua: bool) -> int:
    return CommandFlag.FUA if fua else 0
