"""A guest of the simulated site: connects as qemu would, again and again, and checks what it sees.

States: away (no connection), in a handshake, looking (the whole disk is read and compared with the
model before the guest goes on), running.  What the last end of the cache may have taken is kept
until the comparison: nothing but what was unanswered, what was not flushed, or all that the store
does not have.
Failure modes: Illegal.  An error of a request is legal only where the site says that a disk was
damaged; the guest goes away then, and comes back.
"""

import random
import struct
from collections.abc import Callable
from enum import IntEnum, StrEnum

from sim.guest import Guest
from sim.history import BLOCK, Kind, Op
from sim.network import Network
from sim.oracle import Disk, Illegal, Mutation, is_acknowledged, is_durable, never
from sim.sockets import GuestSocket

OPTION_MAGIC = 0x49484156454F5054
REPLY_MAGIC = 0x3E889045565A9
OPT_GO, REP_ACK, REP_ERROR = 7, 1, 1 << 31
REQUEST, REPLY = struct.Struct(">IHHQQI"), struct.Struct(">IIQ")
OPTION_REPLY = struct.Struct(">QIII")
GREETING_BYTES = 18
LOOK_BYTES = 64 * BLOCK
EIO = 5
PAUSES_NS = (*(1_000_000 * 7**number for number in range(6)), 8_000_000_000)


class Loss(IntEnum):
    """What the last end of the cache may have taken, from little to much."""

    NOTHING = 0  # the connection only
    UNANSWERED = 1  # a crash of the daemon
    UNFLUSHED = 2  # a loss of power
    UNSHIPPED = 3  # the device is gone


_PROMISES: dict[Loss, Callable[[Mutation], bool]] = {
    Loss.NOTHING: is_acknowledged,
    Loss.UNANSWERED: is_acknowledged,
    Loss.UNFLUSHED: is_durable,
    Loss.UNSHIPPED: never,
}


class State(StrEnum):
    """Of the connection."""

    AWAY = "away"
    SHAKING = "shaking hands"
    LOOKING = "looking"
    RUNNING = "running"


class _Wire:
    """A socket as Guest wants it of a Sim."""

    def __init__(self, socket: GuestSocket) -> None:
        self._socket = socket

    def push(self, _: int, data: bytes) -> None:
        self._socket.push(data)

    def pop(self, _: int) -> bytes:
        return self._socket.pop()


class Tenant:
    """See the module."""

    def __init__(
        self,
        name: str,
        volume: bytes,
        ops: tuple[Op, ...],
        *,
        blocks: int,
        depth: int,
        network: Network,
        rng: random.Random,
    ) -> None:
        self.name = name
        self.volume = volume
        self.disk = Disk(blocks)
        self.guest = Guest(self.disk, ops, depth=depth)
        self.guest.failed = self._failed
        self.state = State.AWAY
        self.loss = Loss.NOTHING
        self.refusal = ""  # of the last handshake
        self.refusals = 0  # since it was served last
        self.errors = 0  # of requests, since it was served last
        self.may_fail: Callable[[], bool] = lambda: False
        self.sequence: Callable[[], int] = lambda: 0  # where the engine stands
        self.confirmed: Callable[[], int] = lambda: 0  # and not before this: the store has it
        self._network = network
        self._rng = rng
        self._socket: GuestSocket | None = None
        self._received = bytearray()
        self._again_ns = self._pause_until_ns = 0
        self._image: dict[int, bytes | None] = {}

    # -- the connection

    def leave(self, loss: Loss, *, again: bool = False) -> None:
        """The connection is over; again: there is another at once."""
        self.loss = max(self.loss, loss)
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self.guest.detach()
        self.guest.pausing = False
        self._pause_until_ns = 0
        self.state = State.AWAY
        pause_ns = 0 if again else self._rng.randrange(400_000_000)
        self._again_ns = self._network.now_ns + pause_ns

    def turn(self, address: str, *, may_connect: Callable[[], bool]) -> None:
        """Whatever there is to do."""
        if self.state is State.AWAY:
            if self._network.now_ns >= self._again_ns and may_connect():
                self._connect(address)
            return
        assert self._socket is not None
        if self.state is State.RUNNING:
            if self.guest.in_flight:
                self.guest.collect()
            if self.guest.pausing and not self.guest.in_flight:
                self._pause()
            if self.errors:
                if not self.guest.in_flight:
                    self.leave(Loss.NOTHING)
                return
            self.guest.send()
        else:
            self._received += self._socket.pop()
            self._shake() if self.state is State.SHAKING else self._look()
        if self._socket is not None and self._socket.is_over:
            self.leave(Loss.NOTHING)

    def _connect(self, address: str) -> None:
        try:
            end = self._network.connect(address, None)
        except ConnectionRefusedError:
            self._again_ns = self._network.now_ns + 50_000_000
            return
        self._socket = GuestSocket(self._network, end)
        self._received.clear()
        self.state = State.SHAKING
        name = self.name.encode()
        payload = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        option = struct.pack(">QII", OPTION_MAGIC, OPT_GO, len(payload)) + payload
        self._socket.push(struct.pack(">I", 3) + option)

    def _shake(self) -> None:
        at = GREETING_BYTES
        while len(self._received) >= at + OPTION_REPLY.size:
            magic, _, kind, length = OPTION_REPLY.unpack_from(self._received, at)
            if magic != REPLY_MAGIC:
                raise Illegal("not a reply to an option")
            at += OPTION_REPLY.size + length
            if len(self._received) < at:
                return
            if kind == REP_ACK:
                del self._received[:at]
                self._begin_look()
                return
            if kind & REP_ERROR:
                self.refusal = bytes(self._received[at - length : at]).decode()
                self.refusals += 1
                self.leave(Loss.NOTHING)
                return

    # -- looking

    def _begin_look(self) -> None:
        assert self._socket is not None
        self.state = State.LOOKING
        self._image.clear()
        size_bytes = len(self.disk.blocks) * BLOCK
        for offset in range(0, size_bytes, LOOK_BYTES):
            length = min(LOOK_BYTES, size_bytes - offset)
            self._ask(offset, length)

    def _ask(self, offset: int, length: int) -> None:
        assert self._socket is not None
        self._image[offset << 32 | length] = None
        cookie = offset << 32 | length
        self._socket.push(REQUEST.pack(0x25609513, 0, Kind.READ, cookie, offset, length))

    def _look(self) -> None:
        at = 0
        while len(self._received) - at >= REPLY.size:
            _, error, cookie = REPLY.unpack_from(self._received, at)
            length = 0 if error else cookie & 0xFFFFFFFF
            if len(self._received) - at < REPLY.size + length:
                break
            at += REPLY.size + length
            self._looked(cookie, error, bytes(self._received[at - length : at]))
        del self._received[:at]
        if all(data is not None for data in self._image.values()):
            self._compare()

    def _looked(self, cookie: int, error: int, data: bytes) -> None:
        offset, length = cookie >> 32, cookie & 0xFFFFFFFF
        if not error:
            self._image[cookie] = data
            return
        if not self.may_fail():
            raise Illegal(f"{self.name}: a read after recovery got error {error}")
        if length == BLOCK:
            self._image[cookie] = b""  # unreadable
            return
        del self._image[cookie]
        for block in range(offset, offset + length, BLOCK):
            self._ask(block, BLOCK)

    def _compare(self) -> None:
        image = bytearray(len(self.disk.blocks) * BLOCK)
        unreadable = set()
        for cookie, data in self._image.items():
            offset = cookie >> 32
            if data:
                image[offset : offset + len(data)] = data
            else:
                unreadable.add(offset // BLOCK)
        sequence = self.sequence()
        if sequence < self.confirmed():
            raise Illegal(f"{self.name} is back at {sequence}, the store had {self.confirmed()}")
        self.disk.recovered(
            bytes(image),
            sequence,
            _PROMISES[self.loss],
            durable=self.loss > Loss.NOTHING,
            unknown=unreadable,
        )
        self.loss = Loss.NOTHING
        self.refusals = self.errors = 0
        self.state = State.RUNNING
        assert self._socket is not None
        self._socket.push(b"")
        self.guest.attach(_Wire(self._socket), 0)

    # -- running

    def _pause(self) -> None:
        """Mostly short; now and then long enough for the cache to think that all is done."""
        now_ns = self._network.now_ns
        if self._pause_until_ns == 0:
            self._pause_until_ns = now_ns + self._rng.choice(PAUSES_NS)
        elif now_ns >= self._pause_until_ns:
            self._pause_until_ns = 0
            self.guest.end_pause()

    def _failed(self, op: Op, error: int) -> None:
        """A request got an error."""
        if error != EIO or not self.may_fail():
            raise Illegal(f"{self.name}: a {op.kind.name} got error {error}; none was due")
        if op.kind is not Kind.READ:
            self.errors += 1
