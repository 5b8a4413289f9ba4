"""A guest on a simulated NBD connection: keeps requests in flight, holds every reply to the model.

Happy path: attach() to a connection, then send() and collect() in turns until it is done().
What is unanswered when a connection dies may or may not have happened; the model knows.
Failure modes: Illegal, when a read shows what no disk may show, or a request gets an error.
"""

import struct
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from millpond.native.drivers import Sim
from sim.history import Kind, Op
from sim.oracle import Disk, Illegal, Mutation, ReadTicket

REQUEST = struct.Struct(">IHHQQI")
REPLY = struct.Struct(">IIQ")
REQUEST_MAGIC, REPLY_MAGIC, FUA = 0x25609513, 0x67446698, 1


@dataclass(slots=True)
class InFlight:
    """A request without its reply."""

    op: Op
    sent: int
    mutations: list[Mutation] = field(default_factory=list)
    ticket: ReadTicket | None = None


class Peer(Protocol):
    """Where a connection leads."""

    def push(self, socket: int, data: bytes) -> object:
        """Send."""

    def pop(self, socket: int) -> bytes:
        """What came; b"" when nothing."""


def _none_was_due(op: Op, error: int) -> None:
    raise Illegal(f"a {op.kind.name} got error {error}; none was due")


class Guest:
    """One connection at a time."""

    def __init__(self, disk: Disk, ops: Iterable[Op], *, depth: int) -> None:
        self.disk = disk
        self.depth = depth
        self.ops = deque(ops)
        self.in_flight: dict[int, InFlight] = {}
        self.pausing = False
        self.acknowledged: Callable[[], None] = lambda: None  # a mutation was, just now
        self.failed: Callable[[Op, int], None] = _none_was_due
        self.answered = 0
        self._sim: Peer | None = None
        self._socket = 0
        self._received = bytearray()
        self._cookie = 0

    @property
    def is_done(self) -> bool:
        """Everything was asked and answered."""
        return not self.ops and not self.in_flight

    def detach(self) -> None:
        """The connection is dead."""
        self._sim = None
        self.in_flight.clear()

    def attach(self, sim: Peer, socket: int) -> None:
        """A new connection; what the old one left unanswered stays so."""
        self._sim, self._socket = sim, socket
        self._received.clear()
        self.in_flight.clear()

    def send(self) -> None:
        """Fill up what may be in flight, in one piece."""
        if self._sim is None:
            return
        out: list[bytes] = []
        while self.ops and len(self.in_flight) < self.depth and not self.pausing:
            if self.ops[0].kind is Kind.PAUSE:
                self.pausing = True
                break
            out += self._request(self.ops.popleft())
        if out:
            self._sim.push(self._socket, b"".join(out))

    def end_pause(self) -> None:
        """Time has passed."""
        self.pausing = False
        self.ops.popleft()

    def _request(self, op: Op) -> tuple[bytes, bytes]:
        disk = self.disk
        flight = InFlight(op, disk.now)
        if op.kind is Kind.WRITE:
            flight.mutations = disk.write(op.offset_bytes, op.data)
        elif op.kind is Kind.TRIM or op.kind is Kind.ZERO:
            flight.mutations = disk.zero(op.offset_bytes, op.length_bytes)
        elif op.kind is Kind.READ:
            flight.ticket = disk.sent_read(op.offset_bytes, op.length_bytes)
        self._cookie += 1
        self.in_flight[self._cookie] = flight
        flags = FUA if op.fua else 0
        header = REQUEST.pack(
            REQUEST_MAGIC, flags, op.kind, self._cookie, op.offset_bytes, op.length_bytes
        )
        return header, op.data

    def collect(self) -> int:
        """Take what came; the number of replies."""
        assert self._sim is not None
        data = self._sim.pop(self._socket)
        if not data:
            return 0
        self._received += data
        count, at = 0, 0
        while len(self._received) - at >= REPLY.size:
            magic, error, cookie = REPLY.unpack_from(self._received, at)
            if magic != REPLY_MAGIC or cookie not in self.in_flight:
                raise Illegal(f"not a reply: magic {magic:#x}, cookie {cookie}")
            flight = self.in_flight[cookie]
            length = flight.op.length_bytes if flight.ticket is not None and not error else 0
            if len(self._received) - at < REPLY.size + length:
                break
            at += REPLY.size + length
            del self.in_flight[cookie]
            if error:
                self.failed(flight.op, error)
            else:
                self._answered(flight, bytes(self._received[at - length : at]))
            count += 1
        del self._received[:at]
        self.answered += count
        return count

    def _answered(self, flight: InFlight, data: bytes) -> None:
        if flight.ticket is not None:
            self.disk.check_read(flight.ticket, data)
        elif flight.op.kind is Kind.FLUSH:
            self.disk.flushed(flight.sent)
        else:
            self.disk.acknowledge(flight.mutations, durable=flight.op.fua)
            self.acknowledged()


def read_image(sim: Sim, socket: int, size_bytes: int, turn: Callable[[], None]) -> bytes:
    """The whole disk through a connection, a few requests at a time."""
    step = 64 * 4096
    offsets = range(0, size_bytes, step)
    pieces: dict[int, bytes] = {}
    received = bytearray()
    for offset in offsets:
        length = min(step, size_bytes - offset)
        sim.push(socket, REQUEST.pack(REQUEST_MAGIC, 0, Kind.READ, offset, offset, length))
    for _ in range(100_000):
        received += sim.pop(socket)
        while len(received) >= REPLY.size:
            magic, error, offset = REPLY.unpack_from(received)
            length = min(step, size_bytes - offset)
            assert magic == REPLY_MAGIC
            if error:
                raise Illegal(f"a read after recovery got error {error}")
            if len(received) < REPLY.size + length:
                break
            pieces[offset] = bytes(received[REPLY.size : REPLY.size + length])
            del received[: REPLY.size + length]
        if len(pieces) == len(offsets):
            return b"".join(pieces[offset] for offset in offsets)
        turn()
    raise Illegal("reads after recovery hang")
