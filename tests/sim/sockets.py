"""Who holds an end of a simulated connection: transports, plain sockets, the guest.

Each stands for what the shipped code gets from asyncio or the kernel.  Failure modes: theirs.
"""

import asyncio
import os
import socket
from typing import Any, cast

from sim.network import End, Network

HIGH_BYTES, LOW_BYTES = 4 << 20, 1 << 20


class _Descriptor:
    """What a transport says of its socket."""

    family = socket.AF_UNIX  # no TCP options

    def __init__(self, end: End) -> None:
        self._end = end

    def fileno(self) -> int:
        return self._end.descriptor


class SimTransport(asyncio.Transport):
    """A stream transport of a BufferedProtocol."""

    def __init__(self, network: Network, end: End, protocol: asyncio.BufferedProtocol) -> None:
        super().__init__()
        self._loop = asyncio.get_event_loop()
        self._network = network
        self._end = end
        self._protocol = protocol
        self._reading = True
        self._paused = False
        self._is_lost = False
        self._high_bytes, self._low_bytes = HIGH_BYTES, LOW_BYTES
        end.holder = self
        end.take, end.ended = self._take, self._ended
        protocol.connection_made(self)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return _Descriptor(self._end) if name == "socket" else default

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high is not None and low is not None
        self._high_bytes, self._low_bytes = high, low

    def write(self, data: Any) -> None:
        if self._end.is_closed or self._end.is_shut:
            return
        self._network.send(self._end, bytes(data))
        if self._end.peer.incoming_bytes > self._high_bytes and not self._paused:
            self._paused = True
            self._end.drained = self._drained
            self._protocol.pause_writing()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self._end.is_shut = True

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True

    def is_closing(self) -> bool:
        return self._is_lost

    def close(self) -> None:
        self._lose(None)

    def abort(self) -> None:
        self._lose(None)

    def _lose(self, error: Exception | None) -> None:
        """Done with it; the connection goes on if somebody else has taken the end."""
        if self._is_lost:
            return
        self._is_lost = True
        if self._end.holder is self:
            self._end.is_closed = True
        self._loop.call_soon(self._protocol.connection_lost, error)

    # -- the network's calls

    def _take(self, data: bytes) -> bool:
        if not self._reading or self._is_lost:
            return self._is_lost
        self._run(self._feed, data)
        return True

    def _feed(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest and self._end.holder is self:
            if not self._reading or self._is_lost:
                break
            buffer = memoryview(cast(Any, self._protocol.get_buffer(len(rest))))
            count = min(len(buffer), len(rest))
            buffer[:count] = rest[:count]
            rest = rest[count:]
            self._protocol.buffer_updated(count)
        if not self._is_lost or self._end.holder is not self:
            self._end.give_back(bytes(rest))

    def _ended(self, error: Exception | None) -> None:
        if not self._is_lost:
            self._run(self._lose, error)

    def _drained(self) -> None:
        if self._paused and self._end.peer.incoming_bytes <= self._low_bytes:
            self._paused = False
            self._run(self._protocol.resume_writing)

    def _run(self, call: Any, *args: Any) -> None:
        owner = self._end.owner
        assert owner is not None
        if not owner.is_dead:
            owner.run(call, *args)


class PlainSocket:
    """A connected socket of the NBD server, until the engine has it."""

    family = socket.AF_UNIX

    def __init__(self, network: Network, end: End) -> None:
        self._network = network
        self._end = end
        self._received = bytearray()
        self._is_over = False
        self._waiter: asyncio.Future[None] | None = None
        end.holder = self
        end.take, end.ended = self._take, self._ended

    def setblocking(self, blocking: bool) -> None:
        """Never."""

    def fileno(self) -> int:
        return self._end.descriptor if self._end.holder is self else -1

    def detach(self) -> int:
        """A descriptor that means this end; what was not read stays in it."""
        self._end.holder = None
        self._end.give_back(bytes(self._received))
        return os.dup(self._end.descriptor)

    def close(self) -> None:
        if self._end.holder is self:
            self._end.holder = None
            self._end.is_closed = True

    def send(self, data: bytes) -> None:
        """All of it."""
        if self._is_over:
            raise BrokenPipeError(32, "Broken pipe")
        self._network.send(self._end, data)

    async def receive(self, size_bytes: int) -> bytes:
        """Some bytes; b"" at the end."""
        while not self._received and not self._is_over:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        data = bytes(self._received[:size_bytes])
        del self._received[:size_bytes]
        return data

    def _take(self, data: bytes) -> bool:
        self._received += data
        self._wake()
        return True

    def _ended(self, error: Exception | None) -> None:
        self._is_over = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class GuestSocket:
    """A guest's end: what it sends goes out, what came is taken when it looks."""

    def __init__(self, network: Network, end: End) -> None:
        self._network = network
        self._end = end
        self._received = bytearray()
        self.is_over = False
        end.holder = self
        end.take, end.ended = self._take, self._ended

    def push(self, data: bytes) -> None:
        """Send."""
        self._network.send(self._end, data)

    def pop(self) -> bytes:
        """What came since; b"" is nothing, see is_over."""
        data = bytes(self._received)
        self._received.clear()
        return data

    def close(self) -> None:
        """The guest goes away."""
        self._end.is_closed = True

    def _take(self, data: bytes) -> bool:
        self._received += data
        return True

    def _ended(self, error: Exception | None) -> None:
        self.is_over = True
