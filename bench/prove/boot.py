"""make prove WHAT=boot: a host that boots, its guests' disks, and what systemd and libvirt say.

make prove WHAT=attach shows these lines, too.
"""

import sys

from prove.runner import Outcome, Registry, main, tests

registry = Registry("boot")


@registry.line("units", "systemd-analyze verify is clean, security at most 4.0 for each unit")
def units() -> Outcome:
    """And make install puts them where systemd looks."""
    return tests("units", "tests/cli/test_units.py", "tests/cli/test_install.py")


@registry.line("notify", "readiness, watchdog, and a listening socket that outlives the daemon")
def notify() -> Outcome:
    """The service manager is played by the tests."""
    return tests("notify", "tests/cli/test_notify.py")


@registry.line("tab", "map and unmap: idempotent, one line per failure, waits for cache and store")
def tab() -> Outcome:
    """Against a played cache, and a real one whose store comes late; a real kernel: `systemd`."""
    return tests("tab", *(f"tests/cli/test_{name}.py" for name in ("tab", "map", "device")))


@registry.line("libvirt", "the disk's XML passes virt-xml-validate; the hook with recorded XML")
def libvirt() -> Outcome:
    """By libvirt's own schema."""
    return tests("libvirt", "tests/cli/test_devicexml.py", "tests/cli/test_hook.py")


@registry.line("vhost", "what a guest syncs over vhost-user-blk reaches us")
def vhost() -> Outcome:
    """With the arguments of our unit, from a real guest kernel."""
    return tests("vhost", "tests/interop/test_storage_daemon.py", "tests/boot/test_vhost_user.py")


@registry.line(
    "systemd", "Debian with systemd: reboot and power cut with a dirty log; mounted, resumed"
)
def systemd() -> Outcome:
    """Installed with make install into a debootstrap of Debian 12, booted in emulation."""
    return tests("systemd", "tests/boot/test_systemd.py")


if __name__ == "__main__":
    sys.exit(main(registry))
