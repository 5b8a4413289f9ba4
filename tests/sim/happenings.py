"""What goes wrong in a simulated site: one method for each kind of event of a plan.

Each acts on the site at once, or leaves a cure for later (Torture.cures).  Failure modes: an event
whose machine is down already does nothing.
"""

import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from millpond.native import lib
from millpond.native.drivers import Op
from millpond.store import wire
from sim.loop import NS_PER_S
from sim.machines import Host, Machine
from sim.network import End
from sim.nodes import DEVICE_BYTES, KIB
from sim.plan import Happening, Kind
from sim.site import STORE_ADDRESS
from sim.sockets import GuestSocket
from sim.tenant import Loss

if TYPE_CHECKING:
    from sim.torture import Torture

BATCHES_KEPT = 16
FOR_EVER = 1 << 62
_FRAME_MAGIC = wire.encode_frame(lib.MP_FRAME_BATCH, b"")[:4]


class Happenings:
    """See the module."""

    def __init__(self, torture: "Torture") -> None:
        self._torture = torture
        self._site = torture.site
        self._batches: list[bytes] = []
        self._copies: dict[str, bytes] = {}
        self._site.network.overheard = self._overhear
        self._calls: dict[Kind, Callable[[Machine, random.Random], Awaitable[None]]] = {
            Kind.KILL_CACHE: self._kill,
            Kind.KILL_STORE: self._kill,
            Kind.POWER_CACHE: self._power,
            Kind.POWER_STORE: self._power,
            Kind.POWER_BOTH: self._power_both,
            Kind.STOP_CACHE: self._stop_cache,
            Kind.STOP_STORE: self._stop_store,
            Kind.CUT_CACHE: self._cut,
            Kind.CUT_STORE: self._cut,
            Kind.HOLD_CACHE: self._hold,
            Kind.HOLD_STORE: self._hold,
            Kind.SEND_AGAIN: self._send_again,
            Kind.STORE_FULL: self._fill,
            Kind.CACHE_EIO: self._fail_io,
            Kind.STORE_EIO: self._fail_io,
            Kind.CACHE_FLIP: self._flip_cache,
            Kind.STORE_FLIP: self._flip_store,
            Kind.CACHE_MISDIRECT: self._misdirect,
            Kind.STORE_MISDIRECT: self._misdirect,
            Kind.CACHE_GONE: self._vanish,
            Kind.CACHE_OLD: self._restore,
            Kind.MOVE: self._move,
            Kind.KILL_GUEST: self._kill_guest,
            Kind.RESTART_CACHE: self._restart_cache,
        }

    async def happen(self, happening: Happening) -> None:
        """One event."""
        site, dice = self._site, random.Random(happening.dice)
        host = site.home[site.tenants[dice.randrange(len(site.tenants))].name]
        machine: Machine = site.box if "STORE" in happening.kind.name else host
        if machine.is_up and not machine.has_fallen:
            await self._calls[happening.kind](machine, dice)

    def forget_copy(self, host: Host) -> None:
        """Its device was replaced."""
        self._copies.pop(host.name, None)

    # -- processes and machines

    async def _kill(self, machine: Machine, dice: random.Random) -> None:
        await self._crash(machine, dice, power=False)

    async def _power(self, machine: Machine, dice: random.Random) -> None:
        await self._crash(machine, dice, power=True)

    async def _power_both(self, host: Machine, dice: random.Random) -> None:
        await self._crash(dice.choice((host, self._site.box)), dice, power=True)
        for other in (self._site.box, host):
            if other.is_up:
                await self._torture.fall(other, power=True)

    async def _crash(self, machine: Machine, dice: random.Random, *, power: bool) -> None:
        """Between any two I/Os; an idle disk does not wait for ever."""
        most = 60 if isinstance(machine, Host) else 12
        machine.set_faults(crash_after_io=1 + dice.randrange(most), lose_unsynced=power, tear=power)
        for _ in range(200):
            if machine.has_fallen:
                break
            await self._site.pass_time(0.005)
        await self._torture.fall(machine, power=power)
        if dice.randrange(3) == 0:  # again, while it comes up
            machine.set_faults(crash_after_io=1 + dice.randrange(12))

    async def _stop_cache(self, host: Machine, dice: random.Random) -> None:
        assert isinstance(host, Host)
        clean = await host.stop()
        self._torture.note(f"stopped, clean={clean}")
        await self._torture.fall(host, power=False)

    async def _restart_cache(self, host: Machine, dice: random.Random) -> None:
        """Some guests die while nobody serves them."""
        assert isinstance(host, Host)
        kept = await host.restart()
        self._torture.note(f"stopped, {kept} connections kept")
        if host.sim.crashed or not host.is_freed:
            await self._torture.fall(host, power=False)
            return
        await self._torture.rest(host)
        if dice.randrange(2):
            dice.choice(self._site.tenants).leave(Loss.NOTHING, again=True)

    async def _stop_store(self, box: Machine, dice: random.Random) -> None:
        await self._site.box.stop()
        await self._torture.fall(box, power=False)

    async def _hold(self, machine: Machine, dice: random.Random) -> None:
        duration_s = dice.choice((0.05, 1.0, 12.0, 100.0)) * (0.5 + dice.random())
        machine.process.held_until_ns = self._site.loop.now_ns + int(duration_s * NS_PER_S)

    async def _move(self, host: Machine, dice: random.Random) -> None:
        tenant = dice.choice(self._site.tenants)
        tenant.leave(Loss.NOTHING)
        here = self._site.home[tenant.name]
        self._site.home[tenant.name] = next(h for h in self._site.hosts if h is not here)

    async def _kill_guest(self, host: Machine, dice: random.Random) -> None:
        """With whatever it has in flight; the next one looks while that may still happen."""
        dice.choice(self._site.tenants).leave(Loss.NOTHING, again=True)

    # -- connections

    async def _cut(self, machine: Machine, dice: random.Random) -> None:
        self._site.network.cut_some(machine.process)

    def _overhear(self, end: End, data: bytes) -> None:
        is_frame = len(data) > wire.HEADER_BYTES and data[:4] == _FRAME_MAGIC
        if is_frame and int.from_bytes(data[6:8], "little") == lib.MP_FRAME_BATCH:
            self._batches = [*self._batches[1 - BATCHES_KEPT :], data]

    async def _send_again(self, box: Machine, dice: random.Random) -> None:
        """A batch that was sent before, of whichever epoch, on a connection of its own."""
        if not self._batches:
            return
        hello = wire.Hello(
            role="destage",
            wire_version=wire.WIRE_VERSION,
            client_id=bytes(range(16)).hex(),
            client_name="a wire that stutters",
        )
        try:
            end = self._site.network.connect(STORE_ADDRESS, None)
        except ConnectionRefusedError:
            return
        socket = GuestSocket(self._site.network, end)
        socket.push(wire.encode_json(wire.HELLO, hello))
        socket.push(dice.choice(self._batches))
        for _ in range(10):
            await self._site.pass_time(0.005)
        socket.close()

    # -- disks

    def _cure_later(self, duration_s: float, cure: Callable[[], None]) -> None:
        at_ns = self._site.loop.now_ns + int(duration_s * NS_PER_S)
        self._torture.cures.append((at_ns, cure))

    async def _fill(self, box: Machine, dice: random.Random) -> None:
        capacity = box.sim.allocated_bytes + dice.randrange(8) * 64 * KIB
        box.set_faults(capacity_bytes=max(capacity, 1))
        self._cure_later(dice.choice((0.5, 5.0, 30.0)), box.no_faults)

    async def _fail_io(self, machine: Machine, dice: random.Random) -> None:
        machine.set_faults(
            fail_op=dice.choice((Op.READ, Op.WRITE, Op.SYNC)),
            fail_io=1 + dice.randrange(12),
            fail_count=dice.choice((1, 1, 2, 5)),
        )
        self._cure_later(4.0, lambda: machine.set_faults(fail_op=None, fail_io=0))

    async def _misdirect(self, machine: Machine, dice: random.Random) -> None:
        machine.set_faults(misdirect_io=1 + dice.randrange(20))

    async def _flip_cache(self, host: Machine, dice: random.Random) -> None:
        _flip(host, 0, dice.randrange(DEVICE_BYTES))

    async def _flip_store(self, box: Machine, dice: random.Random) -> None:
        for _ in range(200):  # until it is a file, and in it
            try:
                _flip(box, dice.randrange(24), dice.randrange(dice.choice((8192, 1 << 20))))
            except OSError:
                continue
            return

    async def _vanish(self, host: Machine, dice: random.Random) -> None:
        assert isinstance(host, Host)
        host.set_faults(fail_io=1, fail_count=FOR_EVER)
        for _ in range(dice.randrange(1000)):
            await self._site.pass_time(0.005)
        await self._torture.replace(host)

    async def _restore(self, host: Machine, dice: random.Random) -> None:
        """The first time a copy is taken; then it takes the device's place."""
        copy = self._copies.pop(host.name, None)
        if copy is None:
            self._copies[host.name] = host.sim.peek(offset_bytes=0, length_bytes=DEVICE_BYTES)
            return
        assert isinstance(host, Host)
        await self._torture.fall(host, power=True)
        host.sim.poke(offset_bytes=0, data=copy)
        self._site.guests_leave(host, Loss.UNSHIPPED)


def _flip(machine: Machine, file: int, offset: int) -> None:
    """One bit."""
    (byte,) = machine.sim.peek(file=file, offset_bytes=offset, length_bytes=1)
    machine.sim.poke(file=file, offset_bytes=offset, data=bytes([byte ^ (1 << offset % 8)]))
