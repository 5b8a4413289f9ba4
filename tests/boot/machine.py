"""A guest that boots an image three times: to its own end, or to the moment the power goes.

Software emulation, so that it is the same everywhere.  Failure modes: "GUEST failed" on the
console, qemu's end without the awaited word, or no end in time: AssertionError with the console.
"""

import subprocess
import time
from pathlib import Path

from demo.guest import QEMU, Report, parse
from demo.kernel import Kernel

TIMEOUT_S = 900  # a hang, not slowness
CONSOLE_LINES = 250


class Machine:
    """One image, one kernel."""

    def __init__(self, work: Path, kernel: Kernel, initramfs: Path, image: Path) -> None:
        self._work = work
        drive = f"file={image},format=raw,if=none,id=root,cache=writeback,discard=unmap"
        self._command = [
            *(QEMU, "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1024"),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
            *("-kernel", str(kernel.image), "-initrd", str(initramfs)),
            *("-drive", drive, "-device", "virtio-blk-pci,drive=root"),
        ]

    def boot(self, phase: str, *, until: str, cut: bool = False) -> Report:
        """Boot; its last word is `until`.  cut: the power goes at that word."""
        log = self._work / f"{phase}.log"
        words = "console=ttyS0 quiet loglevel=4 panic=-1 systemd.show_status=false"
        arguments = ["-serial", f"file:{log}", "-append", f"{words} millpond.boot={phase}"]
        process = subprocess.Popen(self._command + arguments, stderr=subprocess.PIPE, text=True)
        begin = time.perf_counter()
        trouble = ""
        try:
            while process.poll() is None and not (cut and said(log, until)):
                if time.perf_counter() - begin > TIMEOUT_S:
                    trouble = f"no end after {TIMEOUT_S} s"
                    break
                time.sleep(0.2)
        finally:
            process.kill()
            trouble += process.communicate()[1]
        console = log.read_text(errors="replace") if log.exists() else ""
        report = parse(console)
        if not report.said(until) or report.said("failed"):
            last = "\n".join(console.splitlines()[-CONSOLE_LINES:])
            raise AssertionError(f"{phase}: never said {until!r}: {trouble}\n{last}")
        return report


def said(log: Path, word: str) -> bool:
    """Whether the console has this word already, or the guest has failed."""
    report = parse(log.read_text(errors="replace")) if log.exists() else Report()
    return report.said(word) or report.said("failed")
