"""A whole site in virtual time: guests, hypervisors with the shipped cache daemon, a store's box.

The world's turn takes the place of the event loop's sleep: time passes a little, cores step, bytes
arrive, guests act.  What people do (start what fell, replace what is broken, accept a loss) is
play()'s, in torture.py.
Failure modes: Illegal, from any of them.
"""

import asyncio
import random
from collections.abc import Callable

from millpond.native.engine import EngineOptions
from millpond.native.store import StoreOptions, VolumeState
from sim.history import BLOCK, SHAPES, make_history
from sim.loop import NS_PER_S, SimLoop
from sim.machines import Box, Host, Machine
from sim.network import Network
from sim.nodes import MIB
from sim.oracle import Illegal, is_acknowledged
from sim.plan import Plan
from sim.tenant import Loss, Tenant

STORE_ADDRESS = "127.0.0.1:7450"
NBD_ADDRESSES = ("127.0.0.1:10809", "127.0.0.1:10810")
QUANTUM_NS = (20_000, 100_000, 400_000)  # of a turn while something is under way
IDLE_NS = 20_000_000
STILL_TURNS = 30  # without a byte that arrives: longer ones after so many
BUSY_NS = 2_000  # while Python has work
LIMIT_S = 400.0  # virtual; longer than every time-out


class Site:
    """See the module."""

    def __init__(self, plan: Plan, *, engine_faults: int = 0, store_faults: int = 0) -> None:
        self.plan = plan
        self.rng = random.Random(f"site {plan.seed}")
        self.network = Network(random.Random(f"network {plan.seed}"))
        self.loop = SimLoop(self.network)
        self.network.now_ns = self.loop.now_ns
        self.box = Box(
            self.loop,
            self.network,
            address=STORE_ADDRESS,
            options=StoreOptions(
                segment_bytes=MIB,
                checkpoint_every_bytes=plan.checkpoint_bytes,
                test_faults=store_faults,
            ),
        )
        chance = random.Random(f"chance {plan.seed}")
        self.hosts = [
            Host(
                f"cache {number}",
                self.loop,
                self.network,
                token_bytes=chance.randbytes,
                store_address=STORE_ADDRESS,
                nbd_address=address,
                confirmed=self._confirm,
                options=EngineOptions(
                    checkpoint_every_bytes=plan.checkpoint_bytes, test_faults=engine_faults
                ),
            )
            for number, address in enumerate(NBD_ADDRESSES)
        ]
        self.machines: list[Machine] = [self.box, *self.hosts]
        for number, machine in enumerate(self.machines):
            machine.faults = type(machine.faults)(seed=plan.seed * 8 + number)
            machine.latency_ns = plan.latency_ns
            machine.no_faults()
        self.tenants = [
            Tenant(
                f"disk {number}",
                b"volume %d of test" % number,
                make_history(plan.seed * 16 + number, SHAPES[shape]),
                blocks=SHAPES[shape].blocks,
                depth=SHAPES[shape].depth or plan.depth,
                network=self.network,
                rng=random.Random(f"tenant {plan.seed} {number}"),
            )
            for number, shape in enumerate(plan.shapes)
        ]
        self.home: dict[str, Host] = {tenant.name: self.hosts[0] for tenant in self.tenants}
        self.closing = False  # guests stay away
        self._still = self._moves = 0
        self.confirmed = {tenant.name: 0 for tenant in self.tenants}  # applied, as a cache heard
        for tenant in self.tenants:
            tenant.may_fail = lambda: plan.may_fail
            tenant.sequence = self._sequence_of(tenant)
            tenant.guest.acknowledged = self._dirty_check_of(tenant)
            tenant.confirmed = lambda name=tenant.name: self.confirmed[name]  # type: ignore[misc]
        self.box.create(
            *(
                VolumeState(
                    id=tenant.volume,
                    name=tenant.name,
                    size_bytes=len(tenant.disk.blocks) * BLOCK,
                )
                for tenant in self.tenants
            )
        )
        self.loop.set_turn(self._turn)

    def close(self) -> None:
        """Give everything back, whatever state it is in."""
        self.loop.set_turn(lambda limit_s: None)
        for task in asyncio.all_tasks(self.loop):  # whoever played, too: it may not have ended
            task.cancel()
        for host in self.hosts:
            host.free_kept()
        for machine in self.machines:
            machine.sim.crash()
            self.network.kill(machine.process)
            self.loop.run_until_complete(machine.process.kill_at_once())
            machine.free()
            machine.sim.close()
        self.box.give_back()
        self.network.free()
        self.loop.close()

    # -- the world's turn

    def _turn(self, limit_s: float | None) -> None:
        self.loop.now_ns += self._duration_ns(limit_s)
        now_ns = self.loop.now_ns
        for machine in self.machines:
            machine.step(now_ns)
        self.network.turn(now_ns)
        for tenant in self.tenants:
            host = self.home[tenant.name]
            tenant.turn(host.nbd_address, may_connect=self._permission_of(tenant))

    def _duration_ns(self, limit_s: float | None) -> int:
        if limit_s == 0:
            return BUSY_NS
        limit_ns = IDLE_NS if limit_s is None else int(limit_s * NS_PER_S) + 1
        moves = self.network.moves
        self._still = self._still + 1 if moves == self._moves else 0
        self._moves = moves
        quantum_ns = self.rng.choice(QUANTUM_NS) << min(self._still // STILL_TURNS, 8)
        return min(limit_ns, quantum_ns, IDLE_NS)

    def _confirm(self, volume: bytes, sequence: int) -> None:
        """A cache has heard that the store has everything up to here."""
        name = next(tenant.name for tenant in self.tenants if tenant.volume == volume)
        self.confirmed[name] = max(self.confirmed[name], sequence)

    def _permission_of(self, tenant: Tenant) -> Callable[[], bool]:
        return lambda: self._may_connect(tenant)

    def _may_connect(self, tenant: Tenant) -> bool:
        """Its last connection is over everywhere: what that asked for has happened, or never."""
        if self.closing:
            return False
        for host in self.hosts:
            daemon = host.daemon
            if daemon is None or not host.is_up:
                continue
            volume = daemon.volumes.get(tenant.volume)
            if volume is not None and volume.connections:
                return False
        return True

    def _sequence_of(self, tenant: Tenant) -> Callable[[], int]:
        def sequence() -> int:
            status = self.home[tenant.name].known(tenant.volume)
            assert status is not None
            return status.last_sequence

        return sequence

    def _dirty_check_of(self, tenant: Tenant) -> Callable[[], None]:
        """Nothing is acknowledged that only a cache has, before that is on the store's record."""

        def check() -> None:
            host = self.home[tenant.name]
            if self.box.daemon is None or not self.box.is_up or host.is_freed:
                return
            state = self.box.core.volume(tenant.volume)
            if state is None or state.dirty_holder == host.engine.cache_id:
                return
            acknowledged = sum(map(is_acknowledged, tenant.disk.mutations))
            if acknowledged > state.applied_sequence:
                raise Illegal(
                    f"{tenant.name}: a write was acknowledged before 'dirty' was on record"
                )

        return check

    # -- for whoever plays

    @property
    def answered(self) -> int:
        """Requests of all guests."""
        return sum(tenant.guest.answered for tenant in self.tenants)

    async def fall(self, machine: Machine, *, power: bool) -> None:
        """A machine's process ends, with or without the machine."""
        # A damaged end of the log looks like that of a power cut: recovery cannot know better.
        lost = power or machine.faults.lose_unsynced or self.plan.damages_cache
        await machine.fall(power=power)
        if isinstance(machine, Host):
            machine.free_kept()
            self.guests_leave(machine, Loss.UNFLUSHED if lost else Loss.UNANSWERED)

    def guests_leave(self, host: Host, loss: Loss) -> None:
        """What served them is gone."""
        for tenant in self.tenants:
            if self.home[tenant.name] is host:
                tenant.leave(loss)

    async def start(self, machine: Machine) -> None:
        """Start what is down; a store shows that it kept what it acknowledged.  CannotStart."""
        await machine.start()
        if isinstance(machine, Box):
            try:
                await self.check_store()
                await machine.listen()
            except Fallen:
                return  # once more

    async def check_store(self) -> None:
        """Every volume's image is the disk at the store's position."""
        for tenant in self.tenants:
            await self.check_image(tenant)

    async def check_image(self, tenant: Tenant) -> None:
        """One volume's."""
        state = self.box.core.volume(tenant.volume)
        if state is None:
            raise Illegal(f"the store does not know {tenant.name} any more")
        if state.applied_sequence < self.confirmed[tenant.name]:
            raise Illegal(
                f"{tenant.name}: the store is at {state.applied_sequence}, but acknowledged"
                f" {self.confirmed[tenant.name]}"
            )
        reader = self.box.reader()
        image = await reader.image(tenant.volume, len(tenant.disk.blocks), self._until_read)
        if reader.unreadable and not self.plan.damages_store:
            raise Illegal(f"{tenant.name}: the store cannot read {sorted(reader.unreadable)}")
        tenant.disk.check_position(image, state.applied_sequence, reader.unreadable)

    async def _until_read(self, true: Callable[[], bool], what: str) -> None:
        for _ in range(200_000):
            if true():
                return
            if self.box.has_fallen:
                raise Fallen
            await self.pass_time(0.0002)
        raise Illegal(f"never happened: {what}")

    async def pass_time(self, duration_s: float) -> None:
        """Let the world go on."""
        wake = self.loop.create_future()
        self.loop.call_later(duration_s, wake.set_result, None)
        await wake

    async def lose_cache(self, host: Host) -> None:
        """The device is replaced; the operator accepts what the store has."""
        if host.is_up:
            await host.fall(power=True)
        host.free_kept()
        host.format()
        host.no_faults()
        self.guests_leave(host, Loss.UNSHIPPED)
        for tenant in self.tenants:
            if self.home[tenant.name] is host:
                await self.check_image(tenant)
                await self.accept_loss(tenant)

    async def accept_loss(self, tenant: Tenant) -> None:
        """As `millpond up --accept-loss`: a new epoch, closed again."""
        daemon = self.box.daemon
        assert daemon is not None
        state = daemon.catalogue.get(tenant.volume)
        operator = b"an operator of t"
        work = daemon.catalogue.open(
            tenant.volume,
            cache_id=operator,
            lineage=self.rng.getrandbits(63) + 1,
            first_sequence=None,
            expected_epoch=state.epoch,
            accept_loss=True,
        )
        opened = await self.box.process.run(lambda: self.loop.create_task(work))
        work = daemon.catalogue.close(tenant.volume, epoch=opened.epoch, cache_id=operator)
        await self.box.process.run(lambda: self.loop.create_task(work))


class Fallen(Exception):
    """The store fell while it was looked at."""
