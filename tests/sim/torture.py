"""Torture: a simulated site, everything of a plan goes wrong, and people put it right again.

    python -m sim.torture SEED [ENGINE_FAULTS STORE_FAULTS] [--kinds A,B]    one world, again
    python -m sim.torture --seeds 1000 [--first 1]              many, on all processors

Happy path: guests do their histories while a plan's events come; what fell is started, what is
broken replaced, a loss accepted where there is no other way; at the end all guests are done, the
store has everything, nothing is dirty, and the volumes are given back.
Failure modes: Illegal: a guest saw, or a store holds, what no disk may show; a request or a volume
failed without a reason; something hangs.
"""

import argparse
import logging
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from millpond.cache.volumes import State as VolumeState
from sim.happenings import Happenings
from sim.loop import NS_PER_S
from sim.machines import Box, CannotStart, Host, Machine
from sim.many import run_many
from sim.oracle import Illegal
from sim.plan import Kind, Plan, make_plan
from sim.site import Site
from sim.tenant import Loss, State

WAIT_S = 150.0  # of virtual time, with everything well: longer than any time-out
LOOK_FIRST_S, LOOK_MAX_S = 0.001, 0.1  # between two looks; longer while nothing happens
RESCUES_MAX = 6  # replaced devices, in one world
NO_HOLDER = bytes(16)


WELL = "all is well"


class Enough(Exception):
    """A damaged disk ends this world early, and legally: somebody would restore a backup."""


@dataclass(slots=True)
class Outcome:
    """What a world came to."""

    seed: int
    requests: int = 0
    falls: int = 0
    rescues: int = 0
    virtual_s: float = 0.0
    end: str = WELL
    error: str = ""
    trace: list[str] = field(default_factory=list)


class Torture:
    """One world."""

    def __init__(
        self,
        plan: Plan,
        *,
        engine_faults: int = 0,
        store_faults: int = 0,
        cut: str = "",
        cut_after: int = 0,
    ) -> None:
        """cut: "cache" or "store", which ends after so many sends of the whole site."""
        self.plan = plan
        self.site = Site(plan, engine_faults=engine_faults, store_faults=store_faults)
        self.outcome = Outcome(plan.seed)
        self._rng = random.Random(f"torture {plan.seed}")
        self._start_ns: dict[str, int] = {}
        self.cures: list[tuple[int, Callable[[], None]]] = []
        self._well_since_ns = self.site.loop.now_ns
        self._served_ns: dict[str, int] = {}
        self._answered: dict[str, int] = {}
        self._tried: dict[str, int] = {}
        self._events = Happenings(self)
        if cut:
            cut_machine = self.site.box if cut == "store" else self.site.hosts[0]
            cut_machine.set_faults(lose_unsynced=cut_after % 2 == 1, tear=cut_after % 2 == 1)
            self.site.network.stop_after = cut_after
            self.site.network.stop = cut_machine.sim.crash

    def run(self) -> Outcome:
        """Live it.  Illegal."""
        begin_ns = self.site.loop.now_ns
        try:
            self.site.loop.run_until_complete(self._play())
        except Enough as end:
            self.outcome.end = str(end)
        finally:
            self.outcome.virtual_s = (self.site.loop.now_ns - begin_ns) / NS_PER_S
            self.outcome.requests = self.site.answered
            self.site.close()
        return self.outcome

    def note(self, what: str) -> None:
        at_s = self.site.loop.now_ns / NS_PER_S
        self.outcome.trace.append(f"{at_s:.6f} after {self.site.answered} requests: {what}")

    # -- the play

    async def _play(self) -> None:
        for machine in self.site.machines:
            await self.site.start(machine)
        for happening in self.plan.happenings:
            await self._until(self._moment(happening.at), "the guests go on")
            self.note(happening.kind.value)
            await self._events.happen(happening)
        await self._until(lambda: not self.cures, "everything is well again")
        await self._until(self._guests_done, "the guests finish")
        await self._settle()

    def _moment(self, at: int) -> Callable[[], bool]:
        return lambda: self.site.answered >= at or self._guests_done()

    def _guests_done(self) -> bool:
        return all(
            tenant.state is State.RUNNING and tenant.guest.is_done for tenant in self.site.tenants
        )

    async def _settle(self) -> None:
        """Everything arrives at the store, a last look from the guests, all given back."""
        for tenant in self.site.tenants:
            tenant.leave(Loss.NOTHING)
        await self._until(self._guests_done, "a last look")
        self.site.closing = True
        for tenant in self.site.tenants:
            tenant.leave(Loss.NOTHING)
        await self._until(self._given_back, "the volumes are given back")
        await self.site.check_store()
        for tenant in self.site.tenants:
            state = self.site.box.core.volume(tenant.volume)
            assert state is not None
            if state.applied_sequence != len(tenant.disk.mutations):
                raise Illegal(
                    f"{tenant.name} was given back at {state.applied_sequence} of"
                    f" {len(tenant.disk.mutations)}"
                )

    def _given_back(self) -> bool:
        if not self.site.box.is_up or self.site.box.has_fallen:
            return False
        states = [self.site.box.core.volume(tenant.volume) for tenant in self.site.tenants]
        return all(
            state is not None and state.open_holder == state.dirty_holder == NO_HOLDER
            for state in states
        )

    async def _until(self, true: Callable[[], bool], what: str) -> None:
        begin_ns = max(self.site.loop.now_ns, self._well_since_ns)
        patience_s = LOOK_FIRST_S
        while not true():
            await self._look_after()
            answered = self.site.answered
            await self.site.pass_time(patience_s)
            patience_s = min(2 * patience_s, LOOK_MAX_S)
            if self.site.answered != answered:
                patience_s = LOOK_FIRST_S
            begin_ns = max(begin_ns, self._well_since_ns)
            if self._progress():
                begin_ns = self.site.loop.now_ns
            if self.site.loop.now_ns - begin_ns > 2 * WAIT_S * NS_PER_S:
                self._give_up(f"never happened: {what}")

    def _progress(self) -> bool:
        moved = False
        for tenant in self.site.tenants:
            answered = tenant.guest.answered
            idle = tenant.state is State.RUNNING and (tenant.guest.is_done or tenant.guest.pausing)
            if answered != self._answered.get(tenant.name) or idle:
                moved |= not idle
                self._answered[tenant.name] = answered
                self._served_ns[tenant.name] = self.site.loop.now_ns
                if answered % 50 == 49:
                    self._tried[tenant.name] = 0
        return moved

    def _give_up(self, why: str) -> None:
        if self.plan.may_fail:
            raise Enough(why)
        raise Illegal(why)

    # -- people

    async def _look_after(self) -> None:
        """Cure what is due, start what fell, replace what does not come back."""
        now_ns = self.site.loop.now_ns
        due = [cure for at_ns, cure in self.cures if at_ns <= now_ns]
        self.cures = [entry for entry in self.cures if entry[0] > now_ns]
        for cure in due:
            cure()
        for machine in self.site.machines:
            await self._look_after_machine(machine)
        held = any(machine.process.held_until_ns > now_ns for machine in self.site.machines)
        if held or self.cures or not all(machine.is_up for machine in self.site.machines):
            self._well_since_ns = self.site.loop.now_ns
            return
        for tenant in self.site.tenants:
            since_ns = max(self._well_since_ns, self._served_ns.get(tenant.name, 0))
            if now_ns - since_ns > WAIT_S * NS_PER_S and not self.site.closing:
                await self._escalate(tenant.name)

    async def _look_after_machine(self, machine: Machine) -> None:
        if machine.has_fallen:
            await self.fall(machine, power=False)
        if machine.is_up:
            self._check_volumes(machine)
            return
        if self._start_ns.get(machine.name, 0) > self.site.loop.now_ns:
            return
        try:
            await self.site.start(machine)
        except CannotStart as error:
            await self._does_not_start(machine, error)

    async def _does_not_start(self, machine: Machine, error: CannotStart) -> None:
        if machine.sim.crashed:  # a second time, while it recovered
            await self.fall(machine, power=False)
            return
        self.note(f"{machine.name} does not start: {error}")
        if isinstance(machine, Host) and self.plan.damages_cache:
            await self.replace(machine)
        elif isinstance(machine, Box) and self.plan.damages_store:
            raise Enough(f"the store does not start: {error}") from None
        elif self.plan.may_fail and self._tries(machine.name) < 3:
            self._start_ns[machine.name] = self.site.loop.now_ns + NS_PER_S
        else:
            raise Illegal(f"{machine.name} does not start: {error}") from None

    def _tries(self, name: str) -> int:
        self._tried[name] = self._tried.get(name, 0) + 1
        return self._tried[name]

    def _check_volumes(self, machine: Machine) -> None:
        if not isinstance(machine, Host) or machine.daemon is None:
            return
        for tenant in self.site.tenants:
            volume = machine.daemon.volumes.get(tenant.volume)
            if volume is None or self.site.home[tenant.name] is not machine:
                continue
            if volume.state is VolumeState.FAILED and not self.plan.may_fail:
                raise Illegal(f"{tenant.name} failed: {volume.problem}")

    async def _escalate(self, name: str) -> None:
        """A guest is not served: restart its cache; then replace the device."""
        host = self.site.home[name]
        tenant = next(tenant for tenant in self.site.tenants if tenant.name == name)
        why = tenant.refusal or f"{name} hangs ({tenant.state}, {tenant.guest.in_flight})"
        self._served_ns[name] = self.site.loop.now_ns
        if not self.plan.may_fail:
            raise Illegal(f"{name} is not served: {why}")
        if self._tries(name) == 1:
            self.note(f"restart of {host.name}: {why}")
            await self.fall(host, power=False)
        elif self.plan.damages_cache:
            self.note(f"replacement of {host.name}: {why}")
            await self.replace(host)
        else:
            raise Enough(f"{name} is not served: {why}")

    async def replace(self, host: Host) -> None:
        self.outcome.rescues += 1
        if self.outcome.rescues > RESCUES_MAX:
            raise Enough("devices are replaced again and again")
        await self._until_store_is_up()
        await self.site.lose_cache(host)
        self._events.forget_copy(host)
        self._start_ns[host.name] = self.site.loop.now_ns

    async def _until_store_is_up(self) -> None:
        box = self.site.box
        box.process.held_until_ns = 0
        while not box.is_up or box.has_fallen:
            await self._look_after_machine(box)
            await self.site.pass_time(0.01)

    async def fall(self, machine: Machine, *, power: bool) -> None:
        self.outcome.falls += 1
        self.note(f"{machine.name} falls")
        await self.site.fall(machine, power=power)
        self._wait_for_start(machine)

    async def rest(self, host: Host) -> None:
        """Its process has ended as it should; guests wait for the next one."""
        self.note(f"{host.name} is between two processes")
        await host.fall(power=False)
        self._wait_for_start(host)

    def _wait_for_start(self, machine: Machine) -> None:
        delay_ns = self._rng.choice((1_000_000, 100_000_000, 2 * NS_PER_S, 20 * NS_PER_S))
        self._start_ns[machine.name] = self.site.loop.now_ns + self._rng.randrange(delay_ns)


@dataclass(frozen=True, slots=True)
class Case:
    """A seed, and deliberate faults in the code."""

    seed: int
    engine_faults: int = 0
    store_faults: int = 0
    kinds: tuple[Kind, ...] = ()  # what happens; none: chosen by the seed
    cut: str = ""  # who ends after cut_after sends, and nothing else happens
    cut_after: int = 0

    @property
    def command(self) -> str:
        """Repeats it, exactly."""
        words = ["PYTHONHASHSEED=0 PYTHONSAFEPATH=1 PYTHONPATH=tests .venv/bin/python"]
        words.append(f"-m sim.torture {self.seed}")
        if self.engine_faults or self.store_faults:
            words.append(f"{self.engine_faults} {self.store_faults}")
        if self.kinds:
            words.append(f"--kinds {','.join(kind.name for kind in self.kinds)}")
        if self.cut:
            words.append(f"--cut {self.cut} --cut-after {self.cut_after}")
        return " ".join(words)


def run_case(case: Case) -> Outcome:
    """One world; what was wrong with it is in its `error`."""
    plan = make_plan(case.seed, case.kinds)
    if case.cut:
        plan = replace(plan, happenings=())
    torture = Torture(
        plan,
        engine_faults=case.engine_faults,
        store_faults=case.store_faults,
        cut=case.cut,
        cut_after=case.cut_after,
    )
    try:
        return torture.run()
    except Exception as error:
        torture.outcome.error = f"{type(error).__name__}: {error}"
        return torture.outcome


def run_seeds(first: int, count: int) -> list[Outcome]:
    """Many worlds; failures are printed as they come, each with the command that repeats it."""
    outcomes = []
    for outcome in run_many(run_case, [Case(seed) for seed in range(first, first + count)]):
        outcomes.append(outcome)
        if outcome.error:
            print(f"seed {outcome.seed}: {outcome.error}\n  again: {Case(outcome.seed).command}")
            sys.stdout.flush()
    return outcomes


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line for people."""
    failed = sum(bool(outcome.error) for outcome in outcomes)
    early = sum(outcome.end != WELL and not outcome.error for outcome in outcomes)
    return (
        f"{len(outcomes)} worlds, {sum(o.requests for o in outcomes)} requests,"
        f" {sum(o.falls for o in outcomes)} crashes, {sum(o.rescues for o in outcomes)} devices"
        f" replaced, {early} ended early by a damaged disk,"
        f" {sum(o.virtual_s for o in outcomes) / 3600:.1f} virtual hours: {failed} failed"
    )


def main() -> int:
    """See the module."""
    logging.disable(logging.CRITICAL)
    parser = argparse.ArgumentParser(prog="python -m sim.torture")
    parser.add_argument("seed", nargs="?", type=int, help="one world, with its story")
    parser.add_argument("faults", nargs="*", type=int, help="deliberate: of engine, of store")
    parser.add_argument("--kinds", default="", help="only these happen")
    parser.add_argument("--cut", default="", help="cache or store: it ends after so many sends")
    parser.add_argument("--cut-after", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=0, help="so many worlds")
    parser.add_argument("--first", type=int, default=1, help="the first seed of many")
    chosen = parser.parse_args()
    if chosen.seed is None:
        outcomes = run_seeds(chosen.first, chosen.seeds)
        print(summary(outcomes))
        return any(outcome.error for outcome in outcomes)
    kinds = tuple(Kind[name] for name in chosen.kinds.split(",") if name)
    engine_faults, store_faults = [*chosen.faults, 0, 0][:2]
    outcome = run_case(
        Case(chosen.seed, engine_faults, store_faults, kinds, chosen.cut, chosen.cut_after)
    )
    print("\n".join(outcome.trace))
    print(f"seed {outcome.seed}: {outcome.error or outcome.end}")
    print(summary([outcome]))
    return bool(outcome.error)


if __name__ == "__main__":
    sys.exit(main())
