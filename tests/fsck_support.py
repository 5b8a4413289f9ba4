"""A check of a simulated store, and the proof that it wrote nothing."""

from dataclasses import dataclass

from millpond.native import lib
from millpond.native.drivers import SimOptions
from millpond.native.storefsck import Finding, FsckKind, StoreCheck, Summary
from store_support import World


@dataclass(frozen=True)
class Checked:
    """What a check found."""

    findings: tuple[Finding, ...]
    summary: Summary

    @property
    def kinds(self) -> set[FsckKind]:
        """Of the findings."""
        return {finding.kind for finding in self.findings}

    def only(self, kind: FsckKind) -> Finding:
        """The one finding there is."""
        assert [finding.kind for finding in self.findings] == [kind], self.findings
        return self.findings[0]

    def of(self, kind: FsckKind) -> list[Finding]:
        """All of one kind."""
        return [finding for finding in self.findings if finding.kind is kind]


def check(world: World, *, memory_bytes: int = 1 << 20) -> Checked:
    """Check a store that is shut; it is as shut afterwards."""
    assert world.core is None and world.driver is None, "somebody serves it"
    world.sim.set(SimOptions(latency_ns=1000))
    driver = world.sim.driver()
    made = StoreCheck(driver, memory_bytes=memory_bytes)
    try:
        findings = tuple(made.findings())
        summary = made.summary()
    finally:
        made.close()
        lib.mp_driver_destroy(driver)
    assert world.sim.io_count == 0, "the check changed the disk"
    assert summary.findings == len(findings)
    return Checked(findings, summary)


def check_clean(world: World, *, memory_bytes: int = 1 << 20) -> Summary:
    """Check a store that is shut and has no fault."""
    checked = check(world, memory_bytes=memory_bytes)
    assert not checked.findings, checked.findings
    assert checked.summary.compared
    return checked.summary
