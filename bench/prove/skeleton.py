"""make prove WHAT=skeleton: a guest's disk end to end, survives kill -9.

The paths of tests named here are agreed: a test that moves takes its line with it.
"""

import re
import shutil
import sys
import time

from prove.runner import ROOT, WORK, Outcome, Registry, main, run, tests

registry = Registry("skeleton")
DEMO_LIMIT_S = 180
HIT_LIMIT_PERCENT = 95.0  # "its reads are hits"; what no boot has read yet misses once


@registry.line("demo", "make demo on a fresh clone: boots, kill -9, boots again, in 3 minutes")
def demo() -> Outcome:
    """Clone, install, then time the demo alone."""
    clone = WORK / "clone"
    command = "git clone . .run/prove/clone && make -C .run/prove/clone demo"
    shutil.rmtree(clone, ignore_errors=True)
    for install in (
        ["git", "clone", "-q", str(ROOT), str(clone)],
        ["make", "-C", str(clone), "build"],
    ):
        code, text = run(install, "demo-install")
        if code:
            return Outcome(command, text.strip().splitlines()[-1], passed=False)
    begin = time.perf_counter()
    code, text = run(["make", "-C", str(clone), "demo"], "demo")
    seconds = time.perf_counter() - begin
    shutil.rmtree(clone)
    figures = re.findall(r"^(?:hit rate|bytes at).*$", text, re.MULTILINE)
    if code or len(figures) != 2:
        return Outcome(command, f"exit code {code}: .run/prove/demo.log", passed=False)
    hits = float(figures[0].partition(": ")[2].partition("%")[0])
    passed = seconds < DEMO_LIMIT_S and hits >= HIT_LIMIT_PERCENT
    return Outcome(command, f"{seconds:.0f} s; " + "; ".join(figures), passed)


@registry.line("clients", "nbdinfo, nbdcopy, qemu-img, qemu-io, fio --verify against our server")
def clients() -> Outcome:
    """Real clients, each as its own test."""
    return tests("clients", "tests/interop")


@registry.line("kill", "kill -9 during verified load, 50 times: nothing acknowledged is lost")
def kill() -> Outcome:
    """The schedule is printed by the test."""
    return tests("kill", "tests/torture/test_kill.py")


@registry.line("crash", "history cut after every Nth I/O of cache and store: every block is legal")
def crash() -> Outcome:
    """Simulated: with and without loss, tearing and reordering."""
    return tests(
        "crash",
        "tests/sim/test_crash_sweep.py",
        "tests/sim/test_rescue.py",
        "tests/sim/test_regressions.py",
        "tests/store/test_core_crash.py",
    )


@registry.line("faults", "twelve deliberate faults in the code are each caught")
def faults() -> Outcome:
    """Each switch on makes the sweep fail."""
    return tests(
        "faults",
        "tests/sim/test_faults.py",
        "tests/sim/test_fault_scenarios.py",
        "tests/sim/test_reconnect.py",
        "tests/cache/test_volumes.py",
        "tests/store/test_core_faults.py",
    )


@registry.line("gil", "the GIL held for 5 s under load: hits and writes go on without a pause")
def gil() -> Outcome:
    """The longest pause is the figure."""
    return tests("gil", "tests/torture/test_gil.py")


@registry.line("bits", "one flipped bit in slot, log and segment: refetched, EIO, EIO; counted")
def bits() -> Outcome:
    """Flipped on the device, seen in status."""
    return tests("bits", "tests/torture/test_bitflip.py", "tests/sim/test_bit_flips.py")


@registry.line("lost", "the cache device thrown away under load, 20 times: an exact earlier state")
def lost() -> Outcome:
    """Sequence-stamped blocks tell which state."""
    return tests("lost", "tests/torture/test_lost_cache.py", "tests/sim/test_lost_cache.py")


@registry.line("shaping", "60 s at ten times the average: within 5 %, never above the peak")
def shaping() -> Outcome:
    """Destaged bytes per second, then kill -9."""
    return tests("shaping", "tests/torture/test_shaping.py")


@registry.line(
    "hostile", "hostile bytes everywhere: the protocol's error or one line, nothing lost"
)
def hostile() -> Outcome:
    """Handshake, requests, records, superblocks, segments; second process; versions; missing."""
    return tests(
        "hostile",
        "tests/hostile",
        "tests/nbd",
        "tests/native/test_frame.py",
        "tests/native/test_record.py",
        "tests/native/test_batch.py",
        "tests/store/test_wire.py",
        "tests/store/test_server.py",
        "tests/store/test_core_refused.py",
        "tests/store/test_core_damage.py",
        "tests/cli/test_format.py",
        "tests/torture/test_refusals.py",
    )


if __name__ == "__main__":
    sys.exit(main(registry))
