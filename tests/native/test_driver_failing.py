"""The disk that fails on demand: which operations, how, and what a failed sync leaves behind.

Over the simulated disk, so that what is on it can be looked at.
"""

import errno
from collections.abc import Iterator
from typing import Any

import pytest

from driver_support import BLOCK, Harness, block
from millpond.native import ffi, lib
from millpond.native.drivers import Op, Sim, SimOptions

EVERYWHERE = (0, (1 << 64) - 1)


class FailingDisk(Harness):
    """A device of 64 blocks."""

    def __init__(self, sim: Sim) -> None:
        super().__init__(lib.mp_driver_failing(sim.driver()))

    def fail(self, op: Op, *, skip: int = 0, count: int = 1, **fields: Any) -> None:
        """Set the rule."""
        rule = {"op": op, "error": errno.EIO, "skip": skip, "count": count}
        area = {"first_byte": EVERYWHERE[0], "end_byte": EVERYWHERE[1]}
        lib.mp_driver_failing_set(
            self.driver, ffi.new("struct mp_failing_rule *", rule | area | fields)
        )

    @property
    def failed(self) -> int:
        """Under the rule in force."""
        return lib.mp_driver_failing_count(self.driver)


@pytest.fixture
def disk() -> Iterator[FailingDisk]:
    with Sim(SimOptions(device_bytes=64 * BLOCK)) as sim:
        harness = FailingDisk(sim)
        yield harness
        harness.close()


def test_nothing_fails_without_a_rule(disk: FailingDisk) -> None:
    assert disk.write(0, block(1) + block(2)) == 2 * BLOCK
    assert disk.sync() == 0
    assert disk.read(BLOCK, BLOCK) == block(2)
    assert disk.failed == 0


def test_as_many_fail_as_the_rule_says_and_only_of_its_kind_and_place(disk: FailingDisk) -> None:
    disk.fail(Op.READ, skip=1, count=2, first_byte=8 * BLOCK, end_byte=16 * BLOCK)
    assert disk.read(0, BLOCK) == bytes(BLOCK)
    assert disk.write(8 * BLOCK, block(1)) == BLOCK
    results = [disk.read(8 * BLOCK, BLOCK) for _ in range(4)]
    assert results == [block(1), -errno.EIO, -errno.EIO, block(1)]
    assert disk.failed == 2


def test_every_other_write_that_fails_has_happened(disk: FailingDisk) -> None:
    disk.fail(Op.WRITE, count=2)
    assert disk.write(0, block(1)) == -errno.EIO
    assert disk.write(BLOCK, block(2)) == -errno.EIO
    assert disk.read(0, 2 * BLOCK) == bytes(BLOCK) + block(2)


def test_what_a_failed_sync_covered_is_gone_with_the_next_one(disk: FailingDisk) -> None:
    disk.write(0, block(1))
    assert disk.sync() == 0
    disk.write(BLOCK, block(2))
    disk.write(2 * BLOCK, block(3))
    disk.fail(Op.SYNC)
    assert disk.sync() == -errno.EIO
    assert disk.read(0, 3 * BLOCK) == block(1) + block(2) + block(3), "as from a page cache"
    disk.write(2 * BLOCK, block(4))
    assert disk.sync() == 0
    assert disk.read(0, 3 * BLOCK) == block(1) + bytes(BLOCK) + block(4)
    assert disk.sync() == 0
    assert disk.read(0, 3 * BLOCK) == block(1) + bytes(BLOCK) + block(4)


def test_full_disk_is_an_error_like_any_other(disk: FailingDisk) -> None:
    disk.fail(Op.ALLOCATE, error=errno.ENOSPC)
    assert disk.do(Op.ALLOCATE, length=BLOCK) == -errno.ENOSPC
    assert disk.do(Op.ALLOCATE, length=BLOCK) == 0
