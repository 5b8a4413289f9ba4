"""What a crash may leave of a simulated disk, against a plain model of all states it may be in.

Happy path: what a SYNC covered is there.  Failure modes: the daemon dies (all that completed
stays), the power fails (unsynced changes survive or not; in order: a prefix; torn: by sectors),
a SYNC fails.
"""

import errno
import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driver_support import BLOCK, Harness, block
from millpond.native.drivers import Op, Sim, SimOptions

PAGES = 8
SECTOR = 512
SECTORS = PAGES * BLOCK // SECTOR
PER_PAGE = BLOCK // SECTOR

State = tuple[int, ...]  # a token per sector; 0: zeroes


@dataclass(frozen=True)
class Change:
    """A WRITE (token > 0) or PUNCH (token 0) of some pages."""

    token: int
    first: int
    count: int

    def apply(self, state: State) -> State:
        """The state after the whole of it."""
        begin, end = self.first * PER_PAGE, (self.first + self.count) * PER_PAGE
        return state[:begin] + (self.token,) * (end - begin) + state[end:]

    def covers(self, sector: int) -> bool:
        """Whether it touches the sector."""
        return self.first * PER_PAGE <= sector < (self.first + self.count) * PER_PAGE


@dataclass
class Model:
    """What is known of a disk: durable, then changes in order of completion, then in flight."""

    durable: State = (0,) * SECTORS
    unsynced: list[Change] = field(default_factory=list)
    in_flight: dict[int, Change | int] = field(default_factory=dict)  # int: a SYNC covers so many
    synced: int = 0  # completed changes that are durable

    def submitted(self, cookie: int, change: Change | None) -> None:
        """A change, or None: a SYNC of what has completed by now."""
        self.in_flight[cookie] = change or self.synced + len(self.unsynced)

    def completed(self, cookie: int) -> None:
        """In the order of the events."""
        what = self.in_flight.pop(cookie)
        if isinstance(what, Change):
            self.unsynced.append(what)
            return
        while self.synced < what:
            self.durable = self.unsynced.pop(0).apply(self.durable)
            self.synced += 1

    def flying(self) -> list[Change]:
        """Changes in flight, in order of submission."""
        return [what for what in self.in_flight.values() if isinstance(what, Change)]

    def now(self) -> State:
        """What is read."""
        state = self.durable
        for change in self.unsynced:
            state = change.apply(state)
        return state


def subsets(start: set[State], changes: list[Change]) -> set[State]:
    """Every state that some of the changes make, in order."""
    states = start
    for change in changes:
        states = states | {change.apply(state) for state in states}
    return states


def is_torn(state: State, before: State, change: Change) -> bool:
    """Whether each sector is as before or as the change makes it."""
    after = change.apply(before)
    return all(s in (b, a) for s, b, a in zip(state, before, after, strict=True))


def allowed(model: Model, options: SimOptions, state: State) -> bool:
    """Whether a crash under these options may leave this state."""
    flying = model.flying()
    if options.lose_unsynced and not options.reorder:
        before = model.durable
        for change in [*model.unsynced, *flying]:
            if state == before or (options.tear and is_torn(state, before, change)):
                return True
            before = change.apply(before)
        return state == before
    base = model.durable if options.lose_unsynced else model.now()
    maybe = [*model.unsynced, *flying] if options.lose_unsynced else flying
    if options.tear:
        choices = [
            {base[s]} | {change.token for change in maybe if change.covers(s)}
            for s in range(SECTORS)
        ]
        return all(s in choice for s, choice in zip(state, choices, strict=True))
    kept = subsets({base}, model.unsynced) if options.lose_unsynced else {base}
    return any(state in subsets(kept, list(p)) for p in itertools.permutations(flying))


def read_state(sim: Sim) -> State:
    """Tokens of the disk now; a sector that is none of ours fails."""
    data = sim.peek(offset_bytes=0, length_bytes=PAGES * BLOCK)
    tokens = []
    for at in range(0, len(data), SECTOR):
        sector = data[at : at + SECTOR]
        token = int.from_bytes(sector[:8], "little")
        assert sector == block(token)[:SECTOR]
        tokens.append(token)
    return tuple(tokens)


def submit(disk: Harness, model: Model, cookie: int, step: tuple[str, int, int]) -> None:
    """Submit one step to both."""
    kind, first, count = step
    count = min(count, PAGES - first)
    if kind == "sync":
        model.submitted(cookie, None)
        disk.queue(cookie, Op.SYNC)
    else:
        change = Change(cookie if kind == "write" else 0, first, count)
        model.submitted(cookie, change)
        op = Op.WRITE if kind == "write" else Op.PUNCH
        data = block(cookie) * count if kind == "write" else b""
        disk.queue(cookie, op, offset=first * BLOCK, data=data, length=count * BLOCK)
    disk.submit()


def turn(disk: Harness, model: Model) -> None:
    """One turn, in which the model follows."""
    disk.wait()
    for event in disk.take():
        assert event.result >= 0
        model.completed(event.cookie)


def settle(disk: Harness, model: Model, at_most: int) -> None:
    """Turn until at most so many are in flight."""
    while len(model.in_flight) > at_most:
        turn(disk, model)


steps = st.one_of(
    st.tuples(st.just("write"), st.integers(0, PAGES - 1), st.integers(1, 3)),
    st.tuples(st.just("punch"), st.integers(0, PAGES - 1), st.integers(1, 3)),
    st.just(("sync", 0, 0)),
    st.just(("turn", 0, 0)),
)
worlds = st.builds(
    SimOptions,
    seed=st.integers(0, 2**64 - 1),
    device_bytes=st.just(PAGES * BLOCK),
    lose_unsynced=st.booleans(),
    tear=st.booleans(),
    reorder=st.booleans(),
    latency_ns=st.sampled_from([0, 1000]),
)


@settings(max_examples=300, deadline=None)
@given(worlds, st.lists(steps, max_size=14), st.integers(0, 3))
def test_a_crash_leaves_a_state_that_the_model_allows(
    options: SimOptions, script: list[tuple[str, int, int]], flying: int
) -> None:
    with Sim(options) as sim:
        disk, model = Harness(sim.driver()), Model()
        for cookie, step in enumerate(script, start=1):
            if step[0] == "turn":
                turn(disk, model)
            else:
                settle(disk, model, at_most=2)
                submit(disk, model, cookie, step)
            assert read_state(sim) == model.now()
        settle(disk, model, at_most=flying)
        sim.crash()
        assert disk.wait() == -errno.ESHUTDOWN
        disk.close()
        state = read_state(sim)
        assert allowed(model, options, state)
        if options.lose_unsynced:
            sim.driver()
            sim.crash()
            assert read_state(sim) == state, "what survived a loss of power is durable"


@pytest.mark.parametrize("lose_unsynced", [False, True])
def test_all_outcomes_of_one_write_in_flight_are_met(lose_unsynced: bool) -> None:
    seen = set()
    for seed in range(80):
        options = SimOptions(
            seed=seed, device_bytes=BLOCK * PAGES, lose_unsynced=lose_unsynced, tear=True,
            reorder=True, crash_after_io=3,
        )  # fmt: skip
        with Sim(options) as sim:
            disk = Harness(sim.driver())
            assert disk.write(0, block(1)) == BLOCK
            assert disk.sync() == 0
            assert disk.write(0, block(2)) == -errno.ESHUTDOWN
            assert sim.crashed and sim.io_count == 3
            disk.close()
            seen.add(frozenset(read_state(sim)[:PER_PAGE]))
    assert seen == {frozenset({1}), frozenset({2}), frozenset({1, 2})}


def test_crash_after_every_io_keeps_what_was_synced() -> None:
    for n in range(1, 41):
        options = SimOptions(
            seed=n, device_bytes=BLOCK * PAGES, lose_unsynced=True, reorder=True, tear=True,
            crash_after_io=n,
        )  # fmt: skip
        with Sim(options) as sim:
            disk, promised, count = Harness(sim.driver()), 0, 0
            while not disk.ended:
                count += 1
                if disk.write(count % PAGES * BLOCK, block(count)) == BLOCK and disk.sync() == 0:
                    promised = count
            assert sim.io_count == n and promised == (n - 1) // 2
            disk.close()
            state = read_state(sim)
            for token in range(max(1, promised - PAGES + 2), promised + 1):
                first = token % PAGES * PER_PAGE
                if (promised + 1) % PAGES != token % PAGES:
                    assert set(state[first : first + PER_PAGE]) == {token}


@pytest.mark.parametrize("reorder", [False, True])
def test_exactly_the_possible_states_of_overlapping_writes_are_met(reorder: bool) -> None:
    """Pages 0 and 1, then 1 and 2; in order, the second is never there without the first."""
    expected = {(9, 9, 9, 9), (1, 1, 9, 9), (1, 2, 2, 9)} | ({(9, 2, 2, 9)} if reorder else set())
    seen = set()
    for seed in range(60):
        options = SimOptions(
            seed=seed, device_bytes=BLOCK * PAGES, lose_unsynced=True, reorder=reorder
        )
        with Sim(options) as sim:
            disk = Harness(sim.driver())
            disk.write(0, block(9) * 4)
            disk.sync()
            disk.write(0, block(1) * 2)
            disk.write(BLOCK, block(2) * 2)
            sim.crash()
            disk.close()
            seen.add(read_state(sim)[: 4 * PER_PAGE : PER_PAGE])
    assert seen == expected


def test_a_sync_does_not_cover_what_completed_after_it_was_submitted() -> None:
    kept = set()
    for seed in range(200):
        options = SimOptions(
            seed=seed, device_bytes=BLOCK * PAGES, lose_unsynced=True, reorder=True
        )
        with Sim(options) as sim:
            disk = Harness(sim.driver())
            disk.write(0, block(1))
            disk.queue(7, Op.SYNC)
            disk.queue(8, Op.WRITE, offset=BLOCK, data=block(2))
            disk.submit()
            order = [event.cookie for event in disk.collect(2)]
            sim.crash()
            disk.close()
            state = read_state(sim)
            assert state[0] == 1
            if order == [8, 7]:
                kept.add(state[PER_PAGE])
    assert kept == {0, 2}


def test_after_a_crash_of_the_daemon_the_power_may_still_fail() -> None:
    """What completed survives the daemon, but nobody has synced it yet."""
    lost = 0
    for seed in range(20):
        options = SimOptions(seed=seed, device_bytes=BLOCK * PAGES)
        with Sim(options) as sim:
            disk = Harness(sim.driver())
            disk.write(0, block(1))
            sim.crash()
            disk.close()
            assert read_state(sim)[0] == 1
            disk = Harness(sim.driver())
            sim.set(SimOptions(seed=seed, lose_unsynced=True))
            sim.crash()
            disk.close()
            lost += read_state(sim)[0] == 0
    assert 0 < lost < 20


def test_a_failed_sync_is_never_made_good_by_a_later_one() -> None:
    """What it covered stays in doubt; what was written after it can be synced."""
    outcomes = set()
    for seed in range(40):
        options = SimOptions(
            seed=seed, device_bytes=BLOCK * PAGES, lose_unsynced=True, reorder=seed % 2 == 0,
            fail_op=Op.SYNC, fail_io=1,
        )  # fmt: skip
        with Sim(options) as sim:
            disk = Harness(sim.driver())
            disk.write(0, block(1) * 3)
            assert disk.sync() == -errno.EIO
            disk.write(BLOCK, block(2))
            assert disk.sync() == 0
            assert disk.read(0, 4 * BLOCK) == block(1) + block(2) + block(1) + bytes(BLOCK)
            sim.crash()
            disk.close()
            outcomes.add(read_state(sim)[: 3 * PER_PAGE : PER_PAGE])
    assert outcomes == {(0, 2, 0), (1, 2, 1)}


def test_allocate_and_punch_are_durable_only_after_a_sync() -> None:
    outcomes = set()
    for seed in range(40):
        options = SimOptions(seed=seed, lose_unsynced=True, reorder=True)
        with Sim(options) as sim:
            disk = Harness(sim.driver())
            assert disk.do(Op.CREATE, file=1) == 0
            disk.write(0, block(1) * 2, file=1)
            disk.sync(file=1)
            disk.do(Op.PUNCH, file=1, length=BLOCK)
            disk.do(Op.ALLOCATE, file=1, offset=2 * BLOCK, length=2 * BLOCK)
            if seed == 0:
                disk.sync(file=1)
            sim.crash()
            disk.close()
            disk = Harness(sim.driver())
            length = disk.length(1)
            head = sim.peek(file=1, offset_bytes=0, length_bytes=2 * BLOCK)
            assert head in (block(1) * 2, bytes(BLOCK) + block(1))
            outcome = (length // BLOCK, head[:BLOCK] == bytes(BLOCK), sim.allocated_bytes // BLOCK)
            if seed == 0:
                assert outcome == (4, True, 3)
            outcomes.add(outcome)
            disk.close()
    assert outcomes == {(4, True, 3), (4, False, 4), (2, True, 1), (2, False, 2)}


def test_a_file_has_at_least_its_synced_length() -> None:
    lengths = set()
    for seed in range(20):
        options = SimOptions(seed=seed, lose_unsynced=True, reorder=True, tear=True)
        with Sim(options) as sim:
            disk = Harness(sim.driver())
            disk.do(Op.CREATE, file=1)
            disk.write(0, block(1), file=1)
            disk.sync(file=1)
            disk.write(4 * BLOCK, block(2), file=1)
            sim.crash()
            disk.close()
            disk = Harness(sim.driver())
            lengths.add(disk.length(1) // BLOCK)
            assert disk.read(0, BLOCK, file=1) == block(1)
            disk.close()
    assert lengths == {1, 5}


@pytest.mark.parametrize("op", [Op.CREATE, Op.REMOVE])
def test_create_and_remove_are_durable_when_done_and_open_in_flight(op: Op) -> None:
    seen = set()
    for seed in range(20):
        options = SimOptions(seed=seed, lose_unsynced=True, reorder=True)
        with Sim(options) as sim:
            disk = Harness(sim.driver())
            assert disk.do(Op.CREATE, file=1) == 0
            assert disk.do(Op.CREATE, file=2) == 0
            assert disk.do(Op.REMOVE, file=2) == 0
            disk.queue(1, op, file=1 if op == Op.REMOVE else 3)
            disk.submit()
            sim.crash()
            disk.close()
            disk = Harness(sim.driver())
            seen.add(tuple(disk.list()))
            disk.close()
    assert seen == ({(1,), (1, 3)} if op == Op.CREATE else {(1,), ()})


def test_sockets_die_with_the_process() -> None:
    with Sim(SimOptions(device_bytes=BLOCK)) as sim:
        disk = Harness(sim.driver())
        number = sim.socket()
        assert disk.send(number, b"said") == 4
        sim.crash()
        assert disk.receive(number) == disk.send(number, b"x") == -errno.ESHUTDOWN
        disk.close_socket(number)
        disk.close()
        assert sim.pop(number) == b"said"
        with pytest.raises(BrokenPipeError):
            sim.pop(number)
