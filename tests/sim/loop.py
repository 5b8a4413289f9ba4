"""asyncio in virtual time: the event loop under which the shipped control plane is simulated.

Where a real loop sleeps in its selector, this one lets the world take a turn: turn(limit_s) lets at
most that much time pass (None: as much as it likes; 0: there is work to do at once).  Connections
and listening sockets are the network's (network.py); of the real machine only the self-pipe is
touched.  Tasks and timers belong to the process that made them (process.py).
Failure modes: whatever turn() raises leaves run_until_complete().
"""

import asyncio
import selectors
from collections.abc import Callable
from typing import Any

from sim import process
from sim.network import LATENCY_NS, Listener, Network
from sim.sockets import PlainSocket, SimTransport

NS_PER_S = 1_000_000_000
BEGIN_NS = 1000 * NS_PER_S


class _Selector(selectors.SelectSelector):
    """Waiting is a turn of the world."""

    turn: Callable[[float | None], None]

    def select(self, timeout: float | None = None) -> list[Any]:
        self.turn(timeout)
        return []


class SimLoop(asyncio.SelectorEventLoop):
    """See the module."""

    def __init__(self, network: Network) -> None:
        self.now_ns = BEGIN_NS
        self._network = network
        self._readers: dict[int, Callable[[], object]] = {}
        self._turns = _Selector()
        self.set_turn(lambda limit_s: None)
        super().__init__(self._turns)
        self.set_task_factory(_make_task)

    def set_turn(self, turn: Callable[[float | None], None]) -> None:
        """What happens instead of sleeping."""
        self._turns.turn = turn

    def time(self) -> float:
        """Virtual seconds."""
        return self.now_ns / NS_PER_S

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Any = None
    ) -> Any:
        owner = process.current()
        if owner is None:
            return super().call_at(when, callback, *args, context=context)

        def fire() -> None:
            if not owner.is_dead:
                callback(*args)

        return super().call_at(when, fire, context=context)

    # -- a core's notifications, for which a real loop watches an eventfd

    def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:  # type: ignore[override]
        owner = process.current()
        assert owner is not None
        self._readers[fd] = lambda: owner.run(callback, *args)

    def remove_reader(self, fd: Any) -> bool:
        return self._readers.pop(fd, None) is not None

    def notify(self, fd: int) -> None:
        """As if the descriptor became readable."""
        if fd in self._readers:
            self._readers[fd]()

    # -- connections

    async def create_connection(  # type: ignore[override]
        self, protocol_factory: Any, host: Any, port: Any
    ) -> Any:
        await asyncio.sleep(2 * LATENCY_NS / NS_PER_S)
        end = self._network.connect(f"{host}:{port}", process.current())
        protocol = protocol_factory()
        return SimTransport(self._network, end, protocol), protocol

    async def create_server(  # type: ignore[override]
        self, protocol_factory: Any, host: Any, port: Any, **options: Any
    ) -> Any:
        listener = self._network.listen(f"{host}:{port}", process.current())
        listener.accept = lambda end: SimTransport(self._network, end, protocol_factory())
        return listener

    async def sock_accept(self, sock: Any) -> Any:
        assert isinstance(sock, Listener)
        return PlainSocket(self._network, await sock.next_end()), None

    async def sock_recv(self, sock: Any, n: int) -> bytes:
        assert isinstance(sock, PlainSocket)
        return await sock.receive(n)

    async def sock_sendall(self, sock: Any, data: Any) -> None:
        assert isinstance(sock, PlainSocket)
        sock.send(bytes(data))


def _make_task(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> Any:
    task: asyncio.Task[object] = asyncio.Task(work, loop=loop, **options)
    owner = process.current()
    if owner is not None:
        owner.own(task)
    return task
