"""make prove WHAT=attach: volumes as /dev/nbdX of a real kernel, and a daemon that dies under them.

The paths of tests named here are agreed: a test that moves takes its line with it.
"""

import sys

from prove.boot import registry as boot
from prove.runner import Outcome, Registry, main, tests

registry = Registry("attach")
ATTACH = "tests/kernel/test_attach.py"


@registry.line("basics", "attach, mkfs.ext4 and xfs, mount, fio with verify, fstrim, detach")
def basics() -> Outcome:
    """On Debian 12's kernel."""
    return tests(
        "attach-basics", f"{ATTACH}::test_file_systems_and_verified_load_on_an_attached_volume"
    )


@registry.line("restart", "kill -9 and restart ten times under load: no I/O error, no mismatch")
def restart() -> Outcome:
    """Two volumes at once, a file system on one of them."""
    return tests(
        "attach-restart", f"{ATTACH}::test_daemon_is_killed_ten_times_under_two_devices_with_load"
    )


@registry.line("newer", "the same on a newer kernel, Debian 13's")
def newer() -> Outcome:
    """Its file systems, and the kills."""
    return tests("attach-newer", f"{ATTACH}::test_newer_kernel")


@registry.line("pause", "no pause longer than the process's own start in that guest plus 1.5 s")
def pause() -> Outcome:
    """The installed command, ten kills."""
    return tests(
        "attach-pause", f"{ATTACH}::test_pause_is_the_start_of_the_command_and_little_more"
    )


@registry.line("memory", "2 GiB through the page cache of a guest of 512 MiB: no deadlock")
def memory() -> Outcome:
    """Onto a device that the same guest serves."""
    return tests("attach-memory", f"{ATTACH}::test_four_times_the_memory_through_the_page_cache")


@registry.line("mistakes", "each mistake a clear line and a clean state; nbd-client; resize")
def mistakes() -> Outcome:
    """No module, no right, busy, unknown, mounted, open, lost while attaching."""
    return tests(
        "attach-mistakes",
        f"{ATTACH}::test_mistakes_are_one_line_and_leave_nothing",
        "tests/nbd/test_devices.py",
    )


@registry.line("qemu", "the same restarts through qemu's NBD client; planned ones keep connections")
def qemu() -> Outcome:
    """The listening socket outlives the daemon."""
    return tests(
        "attach-qemu",
        "tests/kernel/test_qemu_client.py",
        "tests/torture/test_restart.py",
        "tests/sim/test_leave.py",
        "tests/cache/test_handover.py",
    )


registry.lines += boot.lines

if __name__ == "__main__":
    sys.exit(main(registry))
