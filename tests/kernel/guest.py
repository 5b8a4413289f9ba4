"""A guest with a real kernel that runs one script of `inside/`, with this checkout as its program.

The kernel is Debian's, the root file system the host's own, read-only over 9p: what is built and
installed here runs there as it is.  Software emulation, so that it is the same on every machine.

Happy path: run("basics.py") -> what the script said on its console, when it ended with code 0.
Failure modes: the script failed, the kernel panicked (qemu ends), or no end in time: AssertionError
with the last lines of the console.
"""

import compileall
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo import initramfs, kernel

ROOT = Path(__file__).resolve().parents[2]
QEMU = "qemu-system-x86_64"
DISK_BYTES = 6 << 30  # sparse
# In this order; what they need comes with them.
DISKS = ("virtio_pci", "virtio_blk")
MODULES = (*DISKS, "9pnet_virtio", "9p", "overlay", "crc32c_generic", "ext4", "xfs", "nbd")
# A hang, not slowness: two busy cores need half a minute for the longest script.
TIMEOUT_S = 600
BOOT_TIMEOUT_S = 90  # three seconds, when nothing else runs
BOOTS = 3
FIRST_WORD = "GUEST alive"  # bench/demo/prologue.sh


@dataclass(frozen=True)
class Console:
    """What a guest said."""

    text: str

    @property
    def figures(self) -> list[str]:
        """Of its lines `FIGURE ...`."""
        return re.findall(r"^FIGURE ([^\r\n]*)", self.text, re.MULTILINE)

    def kernel_complaints(self) -> list[str]:
        """Lines of the kernel that mean lost or hanging I/O."""
        wrong = (
            r"I/O error|Buffer I/O|blocked for more than|EXT4-fs error|XFS.*[Cc]orrupt|BUG:|Oops"
        )
        return [line.strip() for line in self.text.splitlines() if re.search(wrong, line)]


class Guests:
    """What all guests of a test run share: kernel and first file system."""

    def __init__(self, work: Path, release: str | None = None) -> None:
        """release: whose kernel, if not this machine's."""
        place = "guest-kernel" if release is None else f"guest-kernel-{release}"
        self.kernel = kernel.ensure(ROOT / ".run" / place, kernel.GENERIC, release)
        self._initramfs = work / "initramfs.cpio"
        self._work = work
        init = Path(__file__).with_name("init.sh")
        initramfs.write(self._initramfs, self.kernel, wanted=MODULES, init=init)
        for room in ("native", "store", "cache", "nbd", "cli", "tests/kernel"):
            compileall.compile_dir(ROOT / room, quiet=1)  # no guest should have to

    def log_of(self, script: str) -> Path:
        """Its console, while it runs."""
        return self._work / f"{script}.log"

    def run(
        self,
        script: str,
        *arguments: str,
        memory_mib: int = 1024,
        without: str = "",
        devices: Sequence[str] = (),
    ) -> Console:
        """Boot, run inside/SCRIPT with its arguments (no spaces in them), power off.

        without: a module that the script loads itself, from /run/modules.  devices: more of qemu's
        arguments.
        """
        log = self.log_of(script)
        disk = self._work / f"{script}.disk"
        with disk.open("wb") as file:
            file.truncate(DISK_BYTES)
        words = [
            "console=ttyS0 quiet loglevel=5 panic=-1 init_on_alloc=0 mitigations=off nokaslr",
            f"millpond.root={ROOT}",
        ]
        words.append(f"millpond.run={script}")
        words += [f"millpond.argument={each}" for each in arguments]
        if without:
            words.append(f"millpond.later={without}")
        share = "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"
        command = [QEMU, "-accel", "tcg,thread=multi", "-cpu", "Nehalem", "-smp", "2"]
        command += ["-m", str(memory_mib), "-nodefaults", "-no-user-config", "-no-reboot"]
        command += ["-display", "none", "-serial", f"file:{log}"]
        command += ["-kernel", str(self.kernel.image), "-initrd", str(self._initramfs)]
        command += ["-append", " ".join(words)]
        command += ["-fsdev", share, "-device", "virtio-9p-pci,fsdev=root,mount_tag=host"]
        drive = f"file={disk},format=raw,if=none,id=disk,cache=unsafe,discard=unmap"
        command += ["-drive", drive, "-device", "virtio-blk-pci,drive=disk"]
        command += devices
        try:
            trouble = _boot(command, log)
        finally:
            disk.unlink()
        console = log.read_text(errors="replace") if log.exists() else ""
        if "GUEST ended code=0" not in console:
            last = "\n".join(console.splitlines()[-60:])
            raise AssertionError(f"the guest failed in {script}: {trouble}\n{last}")
        return Console(console)


def _boot(command: list[str], log: Path) -> str:
    """Run it to its end; what the emulator says of it.

    An emulated kernel with two processors stands, now and then, before its first program begins,
    with both busy and nothing read from the host: nothing of ours has run, and it is booted again.
    """
    for _ in range(BOOTS):
        log.unlink(missing_ok=True)
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                return process.communicate(timeout=BOOT_TIMEOUT_S)[1].strip()
            except subprocess.TimeoutExpired:
                if FIRST_WORD not in log.read_text(errors="replace"):
                    continue
                try:
                    return process.communicate(timeout=TIMEOUT_S - BOOT_TIMEOUT_S)[1].strip()
                except subprocess.TimeoutExpired:
                    return f"no end after {TIMEOUT_S} s"
            finally:
                process.kill()
    return f"its kernel did not come to its first program, {BOOTS} times"
