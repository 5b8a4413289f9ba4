"""The simulated network: connections between processes, whose bytes come late, in pieces, or not.

A connection has two ends, each in somebody's hands (sockets.py): a transport of asyncio, a plain
socket while NBD shakes hands, a socket of a core's driver after that, the guest.  A descriptor (of
nobody) stands for an end that may be handed over: whoever duplicates it, adopt() finds the end.
A process that gives an end back (keep) may die: the end is in nobody's hands until adopted again.

Happy path: listen(), connect(), send(); turn() moves what is due.
Failure modes, on purpose: cut() breaks a connection with bytes still under way; a process that is
held (Process.held_until_ns) is silent for a while; who connects to nobody is refused.
"""

import asyncio
import os
import random
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from millpond.native.drivers import Sim
from sim.process import Process

LATENCY_NS = 60_000


def _nothing_more(error: Exception | None) -> None:
    """Whoever would hear of it is gone."""


def _nothing() -> bytes:
    return b""


def _nobody() -> None:
    """Nobody waits for room."""


class End:
    """One end of a connection; whoever holds it sets the four calls."""

    def __init__(self, owner: Process | None) -> None:
        self.owner = owner
        self.peer: End
        self.holder: object = None
        self.descriptor = socket.socket(socket.AF_UNIX).detach()  # connected to nobody
        self.incoming: deque[tuple[int, bytes]] = deque()  # (due, bytes)
        self.incoming_bytes = 0
        self.is_closed = False  # by its holder: nothing more is sent, what comes is dropped
        self.is_shut = False  # by its holder: nothing more is sent
        self.is_cut = False
        self.is_kept = False  # for the next process: nothing is delivered meanwhile
        self.take: Callable[[bytes], bool] = lambda data: False  # False: not now
        self.ended: Callable[[Exception | None], None] = _nothing_more
        self.fetch: Callable[[], bytes | None] = _nothing  # what a core has sent; None: closed
        self.drained: Callable[[], None] = _nobody  # the peer took some of what was sent

    @property
    def held_until_ns(self) -> int:
        """Its process, or the other one, is silent until then."""
        here, there = self.owner, self.peer.owner
        return max(here.held_until_ns if here else 0, there.held_until_ns if there else 0)

    @property
    def is_idle(self) -> bool:
        """Nothing to do in this turn."""
        return (
            not self.incoming
            and self.fetch is _nothing
            and not (self.is_cut or self.is_closed or self.peer.is_closed or self.peer.is_shut)
            and self.peer.drained is _nobody
        )

    def give_back(self, data: bytes) -> None:
        """Bytes that the holder does not want after all come again, first."""
        if data:
            self.incoming.appendleft((0, data))
            self.incoming_bytes += len(data)


class Listener:
    """A listening socket, as the daemons use one."""

    def __init__(self, address: str, owner: Process) -> None:
        self.address = address
        self.owner = owner
        self.is_closed = False
        self.accept: Callable[[End], object] = self._wait
        self._ends: deque[End] = deque()
        self._waiter: asyncio.Future[None] | None = None

    @property
    def sockets(self) -> "list[Listener]":
        """As asyncio.Server has them."""
        return [self]

    def getsockname(self) -> tuple[str, int]:
        """Host and port."""
        host, _, port = self.address.rpartition(":")
        return host, int(port)

    def close(self) -> None:
        """Accept nobody any more."""
        self.is_closed = True

    async def wait_closed(self) -> None:
        """As asyncio.Server."""

    async def next_end(self) -> End:
        """Accept a connection."""
        while not self._ends:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._ends.popleft()

    def _wait(self, end: End) -> None:
        self._ends.append(end)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Network:
    """See the module."""

    def __init__(self, rng: random.Random) -> None:
        self.now_ns = 0
        self.sends = self.moves = 0
        self.overheard: Callable[[End, bytes], None] = lambda end, data: None
        self.stop_after = 0  # sends; then:
        self.stop: Callable[[], None] = lambda: None
        self._rng = rng
        self._listeners: dict[str, Listener] = {}
        self._ends: list[End] = []
        self._by_inode: dict[int, End] = {}
        self._by_number: dict[tuple[Sim, int], End] = {}  # sockets of cores

    def free(self) -> None:
        """Give the descriptors back."""
        for end in self._ends:
            os.close(end.descriptor)
        self._ends.clear()

    # -- making and ending connections

    def listen(self, address: str, owner: Process | None) -> Listener:
        """Whoever listened there before is gone."""
        assert owner is not None
        self._listeners[address] = Listener(address, owner)
        return self._listeners[address]

    def connect(self, address: str, owner: Process | None) -> End:
        """The caller's end.  ConnectionRefusedError."""
        listener = self._listeners.get(address)
        if listener is None or listener.is_closed or listener.owner.is_dead:
            raise ConnectionRefusedError(111, "Connection refused")
        ours, theirs = End(owner), End(listener.owner)
        ours.peer, theirs.peer = theirs, ours
        for end in (ours, theirs):
            self._ends.append(end)
            self._by_inode[os.fstat(end.descriptor).st_ino] = end
        listener.owner.run(listener.accept, theirs)
        return ours

    def adopt(self, descriptor: int, sim: Sim) -> int:
        """A descriptor becomes a socket of a core's driver: its number there."""
        end = self._end_of(descriptor)
        os.close(descriptor)
        number = sim.socket()

        def fetch() -> bytes | None:
            try:
                return sim.pop(number)
            except BrokenPipeError:
                return None

        def take(data: bytes) -> bool:
            with suppress(BrokenPipeError):  # closed by the core; fetch tells
                sim.push(number, data)
            return True

        end.holder, end.is_closed, end.is_kept = sim, False, False
        self._by_number[sim, number] = end
        end.take, end.fetch = take, fetch
        end.ended = lambda error: sim.hangup(number)
        end.drained = _nobody
        return number

    def keep(self, sim: Sim, number: int) -> int:
        """A core has given this socket back: a descriptor for whoever adopts it next.

        What the core sent goes out; what it did not receive comes again.
        """
        end = self._by_number.pop((sim, number))
        self._pull(end)
        end.give_back(sim.take_back(number))
        end.holder, end.owner, end.is_kept = None, None, True
        end.take, end.fetch = lambda data: False, _nothing
        return os.dup(end.descriptor)

    def give(self, descriptor: int, owner: Process) -> None:
        """A kept end is another process's from here: it dies with that."""
        self._end_of(descriptor).owner = owner

    def drop(self, descriptor: int) -> None:
        """Nobody goes on with a kept end."""
        end = self._end_of(descriptor)
        os.close(descriptor)
        end.is_kept, end.is_closed = False, True
        end.take, end.ended = lambda data: True, _nothing_more

    def _end_of(self, descriptor: int) -> End:
        return self._by_inode[os.fstat(descriptor).st_ino]

    def cut(self, end: End) -> None:
        """The connection breaks, in the middle of a frame perhaps."""
        for one in (end, end.peer):
            kept = b""
            if one.incoming and self._rng.randrange(2):
                kept = one.incoming[0][1]
                kept = kept[: self._rng.randrange(len(kept) + 1)]
            one.incoming.clear()
            one.incoming_bytes = 0
            one.give_back(kept)
            one.is_cut = True

    def cut_some(self, owner: Process) -> None:
        """Some of a process's connections, or all."""
        mercy = self._rng.randrange(3)
        for end in self._ends:
            if end.owner is owner and not end.is_cut and self._rng.randrange(3) >= mercy:
                self.cut(end)

    def kill(self, owner: Process) -> None:
        """Its connections end, as when a kernel closes them, and nobody is there."""
        for end in self._ends:
            if end.owner is owner:
                self.cut(end)
                end.incoming.clear()
                end.is_kept = False
                end.take, end.ended, end.fetch = lambda data: True, _nothing_more, _nothing
                end.drained = _nobody

    # -- moving bytes

    def send(self, end: End, data: bytes) -> None:
        """From this end to the other."""
        if not data or end.is_cut or end.peer.is_closed:
            return
        self.sends += 1
        self.overheard(end, data)
        peer = end.peer
        peer.incoming_bytes += len(data)
        due_ns = self.now_ns + LATENCY_NS // 2 + self._rng.randrange(LATENCY_NS)
        if peer.incoming:
            due_ns = max(due_ns, peer.incoming[-1][0])
        if len(data) > 1 and self._rng.randrange(6) == 0:
            at = self._rng.randrange(1, len(data))
            peer.incoming.append((due_ns, data[:at]))
            due_ns, data = due_ns + self._rng.randrange(4 * LATENCY_NS), data[at:]
        peer.incoming.append((due_ns, data))
        if self.sends == self.stop_after:
            self.stop()

    @property
    def next_due_ns(self) -> int | None:
        """When something arrives; None: nothing is under way."""
        return min((end.incoming[0][0] for end in self._ends if end.incoming), default=None)

    def turn(self, now_ns: int) -> None:
        """Whatever is due arrives."""
        self.now_ns = now_ns
        for end in list(self._ends):
            if not (end.is_idle or end.is_kept) and end.held_until_ns <= now_ns:
                self._pull(end)
                self._deliver(end)
        over = [end for end in self._ends if end.ended is _nothing_more is end.peer.ended]
        for end in over:
            del self._by_inode[os.fstat(end.descriptor).st_ino]
            os.close(end.descriptor)
        if over:
            self._ends = [end for end in self._ends if end not in over]

    def _pull(self, end: End) -> None:
        while (data := end.fetch()) is not None:
            if not data:
                return
            self.send(end, data)
        end.fetch = _nothing
        end.is_closed = True

    def _deliver(self, end: End) -> None:
        while end.incoming and end.incoming[0][0] <= self.now_ns:
            _, data = end.incoming.popleft()
            end.incoming_bytes -= len(data)
            self.moves += 1
            if not end.is_closed and not end.take(data):
                end.give_back(data)
                return
        end.peer.drained()
        if end.incoming:
            return
        if end.is_cut or end.is_closed or end.peer.is_closed or end.peer.is_shut:
            ended, end.ended = end.ended, _nothing_more
            ended(ConnectionResetError(104, "Connection reset by peer") if end.is_cut else None)
