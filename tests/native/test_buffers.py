"""The buffer pool: alignment, budget, reuse, and memory that is not touched before it is needed."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from millpond.native import ffi, lib

SIZES = [4096 << 2 * n for n in range(5)]
LENGTHS = st.sampled_from([0, 1, 4096, 4097, 16384, 65536, 65537, 262144, 262145, 1048576])


def new(budget_bytes: int) -> Any:
    """A pool that frees itself."""
    pool = lib.mp_buffers_new(budget_bytes)
    assert pool != ffi.NULL
    return ffi.gc(pool, lib.mp_buffers_free)


def rounded(length_bytes: int) -> int:
    """The size that serves this length."""
    return next(size for size in SIZES if length_bytes <= size)


def resident_bytes(address: int, length_bytes: int) -> int:
    """How much of this range the kernel has backed with memory (pagemap: bit 63 of 64)."""
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        pagemap.seek(address // 4096 * 8)
        entries = pagemap.read(length_bytes // 4096 * 8)
    assert len(entries) == length_bytes // 4096 * 8
    return 4096 * sum(entries[at] >> 7 for at in range(7, len(entries), 8))


class BuffersMachine(RuleBasedStateMachine):
    """Get and put in any order; what is out keeps its content and overlaps nothing."""

    @initialize(budget_bytes=st.integers(4096, 4 * 2**20))
    def create(self, budget_bytes: int) -> None:
        """A pool of a few buffers."""
        self.budget_bytes = budget_bytes
        self.pool = new(budget_bytes)
        self.out: list[tuple[Any, int, int]] = []  # buffer, length, mark
        self.mark = 0

    def used_bytes(self) -> int:
        """What the model says is out."""
        return sum(rounded(length) for _, length, _ in self.out)

    @rule(length=LENGTHS)
    def get(self, length: int) -> None:
        """Served exactly when the budget allows."""
        buffer = lib.mp_buffers_get(self.pool, length)
        fits = self.used_bytes() + rounded(length) <= self.budget_bytes
        assert (buffer != ffi.NULL) == fits
        if fits:
            self.mark = (self.mark + 1) % 256
            ffi.memmove(buffer, bytes([self.mark]) * rounded(length), rounded(length))
            self.out.append((buffer, length, self.mark))

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def put(self, data: st.DataObject) -> None:
        """Nobody wrote into it meanwhile."""
        at = data.draw(st.integers(0, len(self.out) - 1))
        buffer, length, mark = self.out.pop(at)
        assert bytes(ffi.buffer(buffer, rounded(length))) == bytes([mark]) * rounded(length)
        lib.mp_buffers_put(self.pool, buffer, length)

    @invariant()
    def counts(self) -> None:
        """Bytes out are exact; bytes that may be resident stay within the budget."""
        if not hasattr(self, "pool"):
            return
        assert lib.mp_buffers_used_bytes(self.pool) == self.used_bytes()
        assert lib.mp_buffers_resident_bytes(self.pool) <= self.budget_bytes
        addresses = sorted((int(ffi.cast("uintptr_t", b)), rounded(n)) for b, n, _ in self.out)
        assert all(address % 4096 == 0 for address, _ in addresses)
        for (low, size), (high, _) in zip(addresses, addresses[1:], strict=False):
            assert low + size <= high


BuffersMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBuffersMachine = BuffersMachine.TestCase


def test_longer_than_the_longest_is_refused() -> None:
    """NULL, whatever the budget."""
    pool = new(2**26)
    assert lib.mp_buffers_get(pool, 2**20 + 1) == ffi.NULL
    assert lib.mp_buffers_get(pool, 2**64 - 1) == ffi.NULL
    assert lib.mp_buffers_used_bytes(pool) == 0


def test_memory_given_out_and_never_written_stays_with_the_kernel() -> None:
    """64 MiB go out and come back; not even the free list touches them."""
    pool = new(2**26)
    buffers = [lib.mp_buffers_get(pool, 2**20) for _ in range(64)]
    first = min(int(ffi.cast("uintptr_t", b)) for b in buffers)
    assert resident_bytes(first, 2**26) == 0
    for buffer in buffers:
        lib.mp_buffers_put(pool, buffer, 2**20)
    assert resident_bytes(first, 2**26) == 0
    assert lib.mp_buffers_get(pool, 1) != ffi.NULL


def test_a_change_of_fashion_gives_memory_back() -> None:
    """The whole budget as 4 KiB, then as 1 MiB: the first lot's pages are returned."""
    pool = new(2**24)
    small = [lib.mp_buffers_get(pool, 4096) for _ in range(4096)]
    assert lib.mp_buffers_get(pool, 1) == ffi.NULL
    for buffer in small:
        ffi.memmove(buffer, b"x", 1)
    first = min(int(ffi.cast("uintptr_t", b)) for b in small)
    assert resident_bytes(first, 2**24) >= 2**24
    for buffer in small:
        lib.mp_buffers_put(pool, buffer, 4096)
    large = [lib.mp_buffers_get(pool, 2**20) for _ in range(16)]
    assert all(buffer != ffi.NULL for buffer in large)
    assert resident_bytes(first, 2**24) == 0
    for buffer in large:
        lib.mp_buffers_put(pool, buffer, 2**20)
    assert lib.mp_buffers_get(pool, 4096) != ffi.NULL


def test_the_warmest_buffer_comes_first() -> None:
    """What was just put back is in the processor's cache."""
    pool = new(2**20)
    first, second = lib.mp_buffers_get(pool, 4096), lib.mp_buffers_get(pool, 4096)
    lib.mp_buffers_put(pool, first, 4096)
    lib.mp_buffers_put(pool, second, 4096)
    assert lib.mp_buffers_get(pool, 100) == second


def test_free_reports_what_is_still_out() -> None:
    """A leak, or a simulated crash: the caller knows which."""
    pool = lib.mp_buffers_new(2**20)
    lib.mp_buffers_get(pool, 5000)
    assert lib.mp_buffers_free(pool) == 16384
    assert lib.mp_buffers_free(ffi.NULL) == 0


def test_a_budget_below_one_buffer_is_refused() -> None:
    """NULL, not a pool that never serves."""
    assert lib.mp_buffers_new(4095) == ffi.NULL


@pytest.mark.parametrize(
    "mistake",
    [
        "lib.mp_buffers_put(p, b, 4096); lib.mp_buffers_put(p, b, 4096)",
        "lib.mp_buffers_put(p, b, 8192)",
        "lib.mp_buffers_put(p, ffi.cast('char *', b) + 512, 4096)",
        "lib.mp_buffers_put(p, ffi.cast('char *', b) + 4096, 4096)",
        "lib.mp_buffers_put(p, ffi.new('char[64]'), 4096)",
    ],
)
def test_putting_what_is_not_out_asserts(mistake: str) -> None:
    """Our own error stops the process: memory handed out twice would corrupt a disk."""
    code = (
        "from millpond.native import ffi, lib\n"
        "p = lib.mp_buffers_new(1 << 20); b = lib.mp_buffers_get(p, 4096)\n" + mistake
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode < 0
    assert b"Assertion" in done.stderr
