"""The slot table against its model, and the promises that the engine builds on.

The machine drives the C table and the model through the same steps; the model checks every
answer.  Below it: memory, scan resistance, fading, bounded work, hostile checkpoints.
"""

import random
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from millpond.native import ffi, lib
from models.slots_model import PINS_BUSY, SlotsModel, kept

UINT64_MAX = 2**64 - 1
ORIGINS = st.integers(1, 2)
BLOCKS = st.integers(0, 23)
COUNTS = st.integers(0, 40) | st.just(UINT64_MAX)
# Near every value that means something in a block's word, and any other.
CHECKSUMS = st.sampled_from(
    [base + n for base in (0, 2**31, 2**32 - 6) for n in range(6)] + [2**31 - 1, 0x12345678]
)


def find(table: Any, origin: int, block: int) -> tuple[int, int, bool] | None:
    """mp_slots_find as (slot, checksum, restored), or None."""
    checksum, restored = ffi.new("uint32_t *"), ffi.new("int *")
    slot = lib.mp_slots_find(table, origin, block, checksum, restored)
    return None if slot < 0 else (slot, checksum[0], bool(restored[0]))


def counters(table: Any) -> Any:
    """A fresh struct mp_slots_counters."""
    out = ffi.new("struct mp_slots_counters *")
    lib.mp_slots_counters(table, out)
    return out


def new(slot_count: int, slot_blocks: int = 1, seed: int = 1) -> Any:
    """A table that frees itself."""
    table = lib.mp_slots_new(slot_count, slot_blocks, seed)
    assert table != ffi.NULL
    return ffi.gc(table, lib.mp_slots_free)


def saved(table: Any, slot_count: int, step: int = 3) -> bytes:
    """The whole checkpoint, taken in slices."""
    entry_bytes = lib.mp_slots_entry_bytes(table)
    out = bytearray(b"\xee" * entry_bytes * slot_count)
    view = ffi.from_buffer(out)
    for first in range(0, slot_count, step):
        count = min(step, slot_count - first)
        lib.mp_slots_save(table, first, count, view + first * entry_bytes)
    return bytes(out)


def load(table: Any, data: bytes, slot_count: int, step: int = 2) -> None:
    """A whole checkpoint back, in other slices, from a copy that ends where it must."""
    entry_bytes = lib.mp_slots_entry_bytes(table)
    assert len(data) == entry_bytes * slot_count
    for first in range(0, slot_count, step):
        count = min(step, slot_count - first)
        part = data[first * entry_bytes : (first + count) * entry_bytes]
        lib.mp_slots_load(table, first, count, ffi.from_buffer(part))


def access(table: Any, block: int, origin: int = 1) -> bool:
    """One access as the engine makes it: hit, or fill if admitted.  True: hit."""
    lib.mp_slots_touch(table, origin, block)
    if find(table, origin, block) is not None:
        return True
    slot = lib.mp_slots_reserve(table, origin, block)
    if slot >= 0:
        lib.mp_slots_install(table, slot, block, block & 0xFFFFFFFF)
        lib.mp_slots_unpin(table, slot)
    return False


class SlotsMachine(RuleBasedStateMachine):
    """Everything the engine may do, in any order."""

    @initialize(
        slot_count=st.integers(1, 6) | st.just(30), slot_blocks=st.sampled_from([1, 2, 4, 16])
    )
    def create(self, slot_count: int, slot_blocks: int) -> None:
        """A table so small that it is full at once, or one with three slots of window."""
        self.slot_count, self.slot_blocks = slot_count, slot_blocks
        self.table = new(slot_count, slot_blocks, seed=slot_count)
        self.model = SlotsModel(slot_count, slot_blocks)
        self.fills: list[tuple[int, int]] = []  # (slot, block): reserved
        self.reads: list[int] = []  # slots: pinned by a reader

    @rule(origin=ORIGINS, block=BLOCKS)
    def look(self, origin: int, block: int) -> None:
        """A lookup answers what the model knows."""
        assert find(self.table, origin, block) == self.model.find(origin, block)

    @rule(origin=ORIGINS, block=BLOCKS)
    def touch(self, origin: int, block: int) -> None:
        """An access changes nothing but heat."""
        lib.mp_slots_touch(self.table, origin, block)

    @rule(origin=ORIGINS, block=BLOCKS)
    def reserve(self, origin: int, block: int) -> None:
        """Room for a block, or a reason why not."""
        got = lib.mp_slots_reserve(self.table, origin, block)
        self.model.reserve(origin, block, got)
        if got >= 0:
            self.fills.append((got, block))

    @precondition(lambda self: self.fills)
    @rule(data=st.data(), checksum=CHECKSUMS, fails=st.booleans())
    def complete_fill(self, data: st.DataObject, checksum: int, fails: bool) -> None:
        """A fill ends, well or not."""
        slot, block = self.fills.pop(data.draw(st.integers(0, len(self.fills) - 1)))
        if not fails:
            lib.mp_slots_install(self.table, slot, block, checksum)
            self.model.install(slot, block, checksum)
        lib.mp_slots_unpin(self.table, slot)
        self.model.unpin(slot)

    @rule(origin=ORIGINS, first=BLOCKS, count=st.integers(1, 6), checksum=CHECKSUMS)
    def fill(self, origin: int, first: int, count: int, checksum: int) -> None:
        """Whole fills, so that every run has blocks to lose."""
        for block in range(first, min(first + count, 24)):
            got = lib.mp_slots_reserve(self.table, origin, block)
            self.model.reserve(origin, block, got)
            if got >= 0:
                lib.mp_slots_install(self.table, got, block, checksum)
                self.model.install(got, block, checksum)
                lib.mp_slots_unpin(self.table, got)
                self.model.unpin(got)

    @rule(origin=ORIGINS, block=BLOCKS, pins=st.sampled_from([1, 1, 1, PINS_BUSY]))
    def start_read(self, origin: int, block: int, pins: int) -> None:
        """A hit pins."""
        for _ in range(pins):
            hit = find(self.table, origin, block)
            assert hit == self.model.find(origin, block)
            if hit is not None:
                lib.mp_slots_pin(self.table, hit[0])
                self.model.pin(hit[0])
                self.reads.append(hit[0])

    @precondition(lambda self: self.reads)
    @rule(data=st.data())
    def complete_read(self, data: st.DataObject) -> None:
        """A read ends, or all of them."""
        count = data.draw(st.sampled_from([1, len(self.reads)]))
        for _ in range(count):
            slot = self.reads.pop()
            lib.mp_slots_unpin(self.table, slot)
            self.model.unpin(slot)

    @rule(origin=ORIGINS, block=BLOCKS)
    def verify(self, origin: int, block: int) -> None:
        """A restored block proved good."""
        if (hit := find(self.table, origin, block)) is not None:
            lib.mp_slots_verified(self.table, hit[0], block)
            self.model.verified(hit[0], block)

    @rule(origin=ORIGINS, first=BLOCKS, count=COUNTS)
    def invalidate(self, origin: int, first: int, count: int) -> None:
        """A write or trim of a range, at once."""
        before = counters(self.table).invalidated
        lib.mp_slots_invalidate(self.table, origin, first, count)
        dropped = self.model.invalidate(origin, first, count)
        assert counters(self.table).invalidated == before + dropped

    @rule(origin=ORIGINS, first=BLOCKS, count=COUNTS, budget=st.integers(1, 4))
    def sweep(self, origin: int, first: int, count: int, budget: int) -> None:
        """The same in slices, which are as many as the shorter of range and table needs."""
        cursor, calls = 0, 0
        while cursor != UINT64_MAX:
            cursor = lib.mp_slots_sweep(self.table, origin, first, count, cursor, budget)
            calls += 1
        assert calls <= self.slot_count // budget + 1
        self.model.invalidate(origin, first, count)

    @rule()
    def restart(self) -> None:
        """Save, forget, load: valid blocks come back where they were, marked restored."""
        data = saved(self.table, self.slot_count)
        self.table = new(self.slot_count, self.slot_blocks, seed=99)
        load(self.table, data, self.slot_count)
        self.fills.clear()
        self.reads.clear()
        self.model.restart()
        assert self.all_found() == self.all_expected()

    def all_found(self) -> list[Any]:
        """Every block of the small universe, as the table has it."""
        return [find(self.table, o, b) for o in (1, 2) for b in range(24)]

    def all_expected(self) -> list[Any]:
        """Every block of the small universe, as the model has it."""
        return [self.model.find(o, b) for o in (1, 2) for b in range(24)]

    @invariant()
    def agree(self) -> None:
        """Answers, pins and counters are the model's."""
        assert self.all_found() == self.all_expected()
        for index, slot in self.model.slots.items():
            assert lib.mp_slots_pins(self.table, index) == slot.pins
        now = counters(self.table)
        assert now.used_slots == len(self.model.slots)
        assert now.valid_blocks == sum(len(s.valid_blocks()) for s in self.model.slots.values())


SlotsMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestSlotsMachine = SlotsMachine.TestCase


@pytest.mark.parametrize("slot_blocks", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("slot_count", [1, 1000, 65_536, 100_000, 131_071, 262_145, 1_000_003])
def test_memory_is_16_bytes_per_slot_and_4_per_block(slot_count: int, slot_blocks: int) -> None:
    """All of it, sketch and heads too; what does not grow with the slots is 16 KiB at most."""
    used = lib.mp_slots_memory_bytes(new(slot_count, slot_blocks))
    assert used <= (16 + 4 * slot_blocks) * slot_count + 16 * 1024


def test_pins_cost_memory_only_while_they_are_there() -> None:
    """Ten thousand slots pinned at once and let go in another order: pins and slots are right."""
    slot_count = 20_000
    table = new(slot_count)
    for block in range(slot_count):
        access(table, block)
    before = lib.mp_slots_memory_bytes(table)
    slots = [find(table, 1, block) for block in range(10_000)]
    held = [slot[0] for slot in slots if slot is not None]
    assert len(held) == 10_000
    for slot in held + held[::3]:
        lib.mp_slots_pin(table, slot)
    assert lib.mp_slots_memory_bytes(table) <= before + 10_000 * 8 * 4
    random.Random(1).shuffle(held)
    twice = {slots[n][0] for n in range(0, 10_000, 3)}  # type: ignore[index]
    for count, slot in enumerate(held):
        assert lib.mp_slots_pins(table, slot) == (2 if slot in twice else 1)
        lib.mp_slots_unpin(table, slot)
        assert lib.mp_slots_pins(table, slot) == (slot in twice)
        if count % 100 == 0:
            assert all(lib.mp_slots_pins(table, other) > 0 for other in held[count + 1 :: 97])


@pytest.mark.parametrize("checksum", [0, 1, 2, 3, 4, 5, 2**31, 2**31 + 3, 2**32, 2**63 + 2**31])
def test_a_checksum_never_reads_as_zeroes_and_zeroes_never_as_data(checksum: int) -> None:
    """Whatever the checksum of data is, what a slot keeps of it is not 0, and 0 stays 0."""
    table = new(4)
    of_data = lib.mp_slots_checksum(checksum)
    assert of_data == kept(checksum % 2**32 or 1)
    assert of_data == lib.mp_slots_checksum(of_data) != 0
    for block, told in ((1, of_data), (2, 0)):
        slot = lib.mp_slots_reserve(table, 1, block)
        lib.mp_slots_install(table, slot, block, told)
        lib.mp_slots_unpin(table, slot)
    again = new(4)
    load(again, saved(table, 4), 4)
    assert [found[1:] for n in (1, 2) if (found := find(table, 1, n))] == [
        (of_data, False),
        (0, False),
    ]
    assert [found[1:] for n in (1, 2) if (found := find(again, 1, n))] == [
        (of_data, True),
        (0, True),
    ]


def test_a_restored_block_verifies_after_it_was_invalidated() -> None:
    """Read, overwritten meanwhile, read completes: its slot is gone and that is no mistake."""
    table = new(2)
    access(table, 5)
    again = new(2)
    load(again, saved(table, 2), 2)
    slot = lib.mp_slots_reserve(again, 1, 6)
    lib.mp_slots_unpin(again, slot)
    hit = find(again, 1, 5)
    assert hit is not None
    assert hit[2]
    lib.mp_slots_pin(again, hit[0])
    lib.mp_slots_invalidate(again, 1, 5, 1)
    lib.mp_slots_unpin(again, hit[0])
    lib.mp_slots_verified(again, hit[0], 5)
    assert find(again, 1, 5) is None
    assert counters(again).used_slots == 0


@pytest.mark.parametrize("slot_blocks", [1, 16])
@pytest.mark.parametrize(("scan_tables", "hot_every"), [(5, 0), (30, 3)])
def test_a_long_scan_leaves_the_hot_set(slot_blocks: int, scan_tables: int, hot_every: int) -> None:
    """Five tables of scan with no hot access at all, or thirty with one in three."""
    slot_count = 1000
    table = new(slot_count, slot_blocks)
    hot = [n * slot_blocks for n in range(slot_count * 8 // 10)]
    for _ in range(6):
        for block in hot:
            access(table, block)
    stride = slot_blocks // 4 or 1
    for step in range(scan_tables * slot_count * slot_blocks // stride):
        access(table, 10**9 + step * stride)
        if hot_every and step % hot_every == 0:
            access(table, hot[step // hot_every % len(hot)])
    kept = sum(find(table, 1, block) is not None for block in hot)
    assert kept >= 0.95 * len(hot)


def test_a_formerly_hot_set_leaves() -> None:
    """Frequency fades: what was hot is gone after the new hot set was used for a while."""
    slot_count = 1000
    table = new(slot_count)
    old, fresh = range(0, 900), range(10_000, 10_900)
    for _ in range(30):
        for block in old:
            access(table, block)
    assert all(find(table, 1, block) for block in old)
    for _ in range(60):
        for block in fresh:
            access(table, block)
    kept_old = sum(find(table, 1, block) is not None for block in old)
    kept_fresh = sum(find(table, 1, block) is not None for block in fresh)
    assert kept_fresh >= 0.95 * len(fresh)
    assert kept_old <= slot_count - kept_fresh
    assert counters(table).ages >= 3


@pytest.mark.parametrize("heat_up", [0, 5])
def test_work_per_eviction_is_bounded_whatever_the_table_looks_like(heat_up: int) -> None:
    """Looks are counted, not time: at most 64 by CLOCK and 8 in the window, all hot or all cold."""
    slot_count = 4096
    table = new(slot_count)
    for _ in range(heat_up + 1):
        for block in range(slot_count):
            access(table, block)
    for block in range(10**6, 10**6 + 3 * slot_count):
        before = counters(table).looks
        access(table, block)
        assert counters(table).looks - before <= 64 + 8


def test_nothing_is_evicted_while_everything_is_pinned() -> None:
    """reserve says no, counts it, and works again after the first unpin."""
    table = new(40)
    slots = [lib.mp_slots_reserve(table, 1, block) for block in range(40)]
    assert sorted(slots) == list(range(40))
    before = counters(table).looks
    assert lib.mp_slots_reserve(table, 1, 99) == -1
    assert counters(table).looks - before <= 64 + 8
    assert counters(table).rejected == 1
    lib.mp_slots_unpin(table, slots[7])  # never installed: free again
    assert lib.mp_slots_reserve(table, 1, 99) == slots[7]


def test_invalidated_during_a_fill() -> None:
    """The fill is not installed, and no new one starts while the old one may be writing."""
    table = new(4, 4)
    slot = lib.mp_slots_reserve(table, 1, 5)
    lib.mp_slots_invalidate(table, 1, 5, 1)
    assert lib.mp_slots_reserve(table, 1, 5) == -1
    assert lib.mp_slots_reserve(table, 1, 6) == slot  # its neighbour is not concerned
    lib.mp_slots_install(table, slot, 5, 55)
    lib.mp_slots_install(table, slot, 6, 66)
    lib.mp_slots_unpin(table, slot)
    lib.mp_slots_unpin(table, slot)
    assert find(table, 1, 5) is None
    assert find(table, 1, 6) == (slot, 66, False)
    assert lib.mp_slots_reserve(table, 1, 5) == slot


def test_fill_into_a_restored_slot_leaves_its_other_blocks_restored() -> None:
    """What came from the checkpoint may be stale; what was filled since is not."""
    table = new(2, 4)
    for block in (0, 1):
        slot = lib.mp_slots_reserve(table, 1, block)
        lib.mp_slots_install(table, slot, block, 7)
        lib.mp_slots_unpin(table, slot)
    again = new(2, 4)
    load(again, saved(table, 2), 2)
    slot = lib.mp_slots_reserve(again, 1, 2)
    lib.mp_slots_install(again, slot, 2, 9)
    lib.mp_slots_unpin(again, slot)
    lib.mp_slots_verified(again, slot, 1)
    assert [find(again, 1, block) for block in range(4)] == [
        (slot, 7, True),
        (slot, 7, False),
        (slot, 9, False),
        None,
    ]


def entry(key: int, valid: int = 1, heat: int = 0, hole: int = 0, hole2: int = 0) -> bytes:
    """A checkpoint entry of a table with one block per slot."""
    return struct.pack("<QIHBBI", key, hole, valid, heat, hole2, 77)


@pytest.mark.parametrize(
    "bad",
    [
        entry((1 << 40) + 5, valid=2),
        entry((1 << 40) + 5, valid=0),
        entry((1 << 40) + 5, heat=0x04),
        entry((1 << 40) + 5, hole=1),
        entry((1 << 40) + 5, hole2=1),
        entry(UINT64_MAX),
        entry((1 << 40) + (1 << 37) + 7),  # beyond what a slot's key can name
        entry((1 << 40) + 1),  # the same key as the sound one before it
    ],
)
def test_malformed_checkpoint_entries_are_skipped(bad: bytes) -> None:
    """They become free slots; the sound ones around them are loaded."""
    table = new(4)
    load(table, entry((1 << 40) + 1) + bad + entry((2 << 40) + 9, heat=0xF3) + bytes(20), 4)
    assert counters(table).used_slots == 2
    assert find(table, 1, 1) == (0, 77, True)
    assert find(table, 2, 9) == (2, 77, True)
    assert {lib.mp_slots_reserve(table, 3, block) for block in (0, 1)} == {1, 3}


def test_frequencies_survive_a_restart() -> None:
    """A set that was hot before the restart resists a scan right after it."""
    slot_count = 1000
    table = new(slot_count)
    for _ in range(8):
        for block in range(800):
            access(table, block)
    again = new(slot_count, seed=5)
    load(again, saved(table, slot_count, step=100), slot_count, step=64)
    for step in range(5 * slot_count):
        access(again, 10**6 + step)
    assert sum(find(again, 1, block) is not None for block in range(800)) >= 760


def test_a_block_beyond_what_a_key_can_name_is_never_cached() -> None:
    """256 TiB at 4 KiB slots: a miss for ever, not another block's data."""
    table = new(4)
    access(table, 0)
    far = 1 << 36
    assert access(table, far) is False
    assert access(table, far) is False
    assert find(table, 1, 0) is not None
    lib.mp_slots_invalidate(table, 1, far, UINT64_MAX)
    assert find(table, 1, 0) is not None
    assert not access(table, far - 1)
    assert access(table, far - 1)
    assert access(table, far - 1, origin=0xFFFFFE) is False
    assert access(table, far - 1, origin=0xFFFFFE)


def test_what_is_stored_in_a_slot_is_what_can_be_found_in_it() -> None:
    """For who verifies: not zeroes, not what is being filled, nothing of a slot full of pins."""
    table = new(4, slot_blocks=4)
    for block, checksum in ((8, 0), (9, 0xDEADBEEF), (11, 7)):
        slot = lib.mp_slots_reserve(table, 3, block)
        lib.mp_slots_install(table, slot, block, checksum)
        lib.mp_slots_unpin(table, slot)
    assert lib.mp_slots_reserve(table, 3, 10) == slot  # claimed, and pinned

    def stored() -> tuple[int, int, int, list[int]]:
        origin, first = ffi.new("uint32_t *"), ffi.new("uint64_t *")
        checksums = ffi.new("uint32_t[4]")
        count = lib.mp_slots_stored(table, slot, origin, first, checksums)
        return count, origin[0], first[0], list(checksums)

    expected = [0, lib.mp_slots_checksum(0xDEADBEEF), 0, lib.mp_slots_checksum(7)]
    assert stored() == (2, 3, 8, expected)
    for _ in range(PINS_BUSY - 1):
        lib.mp_slots_pin(table, slot)
    assert stored()[0] == 0
    lib.mp_slots_unpin(table, slot)
    lib.mp_slots_invalidate(table, 3, 9, 1)
    assert stored() == (1, 3, 8, [0, 0, 0, expected[3]])


def test_same_seed_same_decisions() -> None:
    """Victims, ties and all: a simulated world can be replayed."""

    def run(seed: int) -> list[bool]:
        table = new(50, seed=seed)
        return [access(table, (step * step) % 211) for step in range(4000)]

    assert run(7) == run(7)


@pytest.mark.parametrize(
    "make",
    [
        lambda: lib.mp_slots_new(0, 1, 1),
        lambda: lib.mp_slots_new(2**31, 1, 1),
        lambda: lib.mp_slots_new(8, 0, 1),
        lambda: lib.mp_slots_new(8, 3, 1),
        lambda: lib.mp_slots_new(8, 32, 1),
    ],
)
def test_impossible_geometry_is_refused(make: Callable[[], Any]) -> None:
    """NULL, not a crash later."""
    assert make() == ffi.NULL
