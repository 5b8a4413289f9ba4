"""A guest: qemu, a real kernel, and what it says on its serial console.

KVM is used when it boots our kernel, not when /dev/kvm merely exists: there are nested
machines whose KVM runs a boot sector and then hangs in the kernel. Otherwise qemu's software
emulation is used.

Happy path: boot, lines "GUEST word key=value", power off. Failure modes: a line "GUEST
failed", a kernel panic (-no-reboot ends qemu), or no end within the time limit: each ends
the demo with the last lines of the console.
"""

import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from demo.kernel import Kernel

QEMU = "qemu-system-x86_64"
KVM_PROBE_S = 10  # emulation needs 3 s for the same boot, a working KVM 1 s


@dataclass
class Report:
    """What one boot said: word -> its keys and values, in the order of the lines."""

    lines: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def value(self, word: str, key: str, **where: str) -> int:
        """The number a line carries, e.g. value("verified", "files", what="image")."""
        for seen, values in self.lines:
            if seen == word and all(values.get(k) == v for k, v in where.items()):
                return int(values[key])
        raise SystemExit(f"demo: the guest never said {word!r} {where}")

    def said(self, word: str) -> bool:
        """Whether a line with this word came."""
        return any(seen == word for seen, _ in self.lines)


def machine(*, kernel: Kernel, initramfs: Path, which: str, accel: str, log: Path) -> list[str]:
    """qemu's command line for everything but the disk; the console goes to log."""
    command = [QEMU, "-accel", accel, "-m", "256", "-smp", "2", "-nodefaults", "-no-reboot"]
    command += ["-display", "none", "-serial", f"file:{log}", "-no-user-config"]
    command += ["-kernel", str(kernel.image), "-initrd", str(initramfs)]
    return [*command, "-append", f"console=ttyS0 quiet panic=-1 millpond.boot={which}"]


def accelerator(*, kernel: Kernel, initramfs: Path, log: Path) -> str:
    """kvm when it boots our kernel, else tcg."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    log.unlink(missing_ok=True)
    command = machine(kernel=kernel, initramfs=initramfs, which="probe", accel="kvm", log=log)
    try:
        subprocess.run(command, capture_output=True, timeout=KVM_PROBE_S, check=False)
    except subprocess.TimeoutExpired:
        return "tcg"
    return "kvm" if log.exists() and parse(log.read_text(errors="replace")).said("alive") else "tcg"


def disk(socket: Path, export: str) -> list[str]:
    """qemu's arguments for a volume of ours as a virtio disk."""
    backend = f"driver=nbd,node-name=disk,server.type=unix,server.path={socket},export={export}"
    backend += ",reconnect-delay=30,discard=unmap,detect-zeroes=unmap,cache.direct=on"
    return ["-blockdev", backend, "-device", "virtio-blk-pci,drive=disk"]


def parse(console: str) -> Report:
    """The GUEST lines of a serial console."""
    report = Report()
    for word, rest in re.findall(r"GUEST (\w+)([^\r\n]*)", console):
        report.lines.append((word, dict(re.findall(r"(\w+)=(\S+)", rest))))
    return report


def boot(
    command: list[str], *, socket: Path, export: str, log: Path, timeout_s: float = 150
) -> Report:
    """Boot to power off; the console is in log. Raises SystemExit when the guest failed."""
    log.unlink(missing_ok=True)
    try:
        done = subprocess.run(
            command + disk(socket, export), capture_output=True, timeout=timeout_s, check=False
        )
        trouble = done.stderr.decode(errors="replace").strip()
    except subprocess.TimeoutExpired:
        trouble = f"no end after {timeout_s:.0f} s"
    console = log.read_text(errors="replace") if log.exists() else ""
    report = parse(console)
    if not report.said("done") or report.said("failed"):
        last = "\n".join(console.splitlines()[-15:])
        raise SystemExit(f"demo: the guest failed: {trouble}\n{last}")
    return report
