"""`make demo`: import an image, boot a guest from it, kill the cache with -9, boot again.

Runs the installed command `millpond` only, as an operator would; prints one line per step
with its duration, then the two figures: hit rate of the second boot, bytes at the store
against bytes in the guest. Ends with a non-zero code and one reason when a step fails.
"""

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from daemon import Daemon, number
from demo import guest, image, initramfs, kernel

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / ".run"
WORK = RUN / "demo-work"
MIB = 1 << 20


@contextmanager
def step(what: str) -> Iterator[list[str]]:
    """Print what, then its duration and the notes that the body added."""
    print(f"* {what} ...", end="", flush=True)
    notes: list[str] = []
    begin = time.perf_counter()
    yield notes
    print(f" {time.perf_counter() - begin:.1f} s" + "".join(f", {note}" for note in notes))


def disk_bytes(directory: Path) -> int:
    """What the file system gave to the files below directory."""
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


def hit_rate(before: Any, after: Any) -> tuple[int, int]:
    """(hits, all lookups) between two statuses, as the engine counts them."""
    hits, misses = (
        number(after["engine"], key) - number(before["engine"], key) for key in ("hits", "misses")
    )
    return hits, hits + misses


class Demo:
    """One run: its server, its guest, and what the steps hand on."""

    def __init__(self, millpond: Path) -> None:
        arguments = ["--size", "1GiB", "--cache-size", "512MiB"]
        self.server = Daemon(millpond, RUN / "demo", arguments, WORK / "millpond.log")
        self.initramfs = WORK / "initramfs.cpio"
        self.kernel: kernel.Kernel
        self.accel = "tcg"

    def prepare(self) -> image.Image:
        """Image, kernel and initramfs: nothing of Millpond yet."""
        for directory in (WORK, self.server.directory):
            shutil.rmtree(directory, ignore_errors=True)
        WORK.mkdir(parents=True)
        with step("make a 1 GiB ext4 image of real files") as notes:
            built = image.build(WORK, size_bytes=1024 * MIB, data_bytes=128 * MIB)
            notes.append(f"{built.file_count} files, {built.data_bytes // MIB} MiB")
        self.kernel = kernel.ensure(RUN / "kernel")
        with step("prepare the guest's initramfs") as notes:
            initramfs.write(self.initramfs, self.kernel)
            self.accel = guest.accelerator(
                kernel=self.kernel, initramfs=self.initramfs, log=WORK / "probe.log"
            )
            notes.append(self.kernel.version)
            notes.append("KVM" if self.accel == "kvm" else "no working KVM, software emulation")
        return built

    def serve(self, built: image.Image) -> None:
        """Start Millpond and import the image."""
        with step("start millpond up") as notes:
            self.server.start()
            notes.append(f"pid {self.server.pid}")
        with step("import the image") as notes:
            self.server.run("volume", "import", str(built.path), self.server.export)
            notes.append(f"{built.path.stat().st_blocks * 512 // MIB} MiB allocated in it")

    def boot(self, which: str) -> guest.Report:
        """Boot the guest once; its report."""
        log = WORK / f"{which}.log"
        command = guest.machine(
            kernel=self.kernel, initramfs=self.initramfs, which=which, accel=self.accel, log=log
        )
        with step(f"boot the guest, {which} time") as notes:
            report = guest.boot(
                command, socket=self.server.socket, export=self.server.export, log=log
            )
            notes.append(f"{report.value('verified', 'files', what='image')} checksums right")
            if which == "first":
                notes.append(f"{report.value('written', 'files')} new files written and synced")
            else:
                notes.append(f"{report.value('verified', 'files', what='new')} new files right")
        return report

    def run(self) -> None:
        """The whole story."""
        built = self.prepare()
        with closing(self.server):
            self.serve(built)
            self.boot("first")
            with step(f"kill -9 {self.server.pid} and start again") as notes:
                self.server.kill()
                notes.append(f"ready after {self.server.start():.2f} s")
            before = self.server.status()
            report = self.boot("second")
            hits, reads = hit_rate(before, self.server.status())
            with step("wait until everything is destaged"):
                self.server.wait_destaged()
            on_disk = disk_bytes(self.server.directory / "store")
            stored = number(json.loads(self.server.run("volume", "list", "--json")), "stored_bytes")
            with step("stop millpond up with SIGTERM"):
                self.server.stop()
        used_bytes = report.value("used", "kib") * 1024
        if reads == 0:
            raise SystemExit("demo: status counts no reads of the second boot")
        print(f"\nhit rate of the second boot: {hits / reads:.1%} ({hits} of {reads})")
        print(
            f"bytes at the store: {stored / MIB:.0f} MiB for {used_bytes / MIB:.0f} MiB in the "
            f"guest ({stored / used_bytes:.2f}); {on_disk / MIB:.0f} MiB of its disk, with what is "
            "overwritten and not cleaned yet, and the space allocated ahead"
        )


def main() -> None:
    """Run the demo with the command that is installed beside this Python."""
    begin = time.perf_counter()
    millpond = Path(sys.executable).with_name("millpond")
    if not millpond.exists():
        raise SystemExit(f"demo: {millpond} is missing: run make build")
    Demo(millpond).run()
    print(f"demo: all good after {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
