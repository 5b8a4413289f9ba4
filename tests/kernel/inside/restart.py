"""In a guest: kill -9 and restart of the daemon under verified load, several times.

Arguments: the number of kills, and `real` for the installed command instead of a forked one.
Two volumes: on one fio writes and verifies, on the other a file system is in use.  A prober reads
one block directly every 20 ms: its longest read is the pause that a guest sees.
"""

import json
import mmap
import os
import sys
import threading
import time
from pathlib import Path

from kernel.inside.pond import MIB, Daemon, clean, devices, millpond, prepare, say, sh, start, until

KILLS = int(sys.argv[1])
REAL = "real" in sys.argv[2:]
# One tick of the kernel's timer for what was in flight, and the tick's own grain.
BEYOND_START_S = 1.5


class Prober:
    """Direct reads of one block; when each began and ended."""

    def __init__(self, device: str) -> None:
        self.reads: list[tuple[float, float]] = []
        self.error = ""
        self._stop = threading.Event()
        self._device = device
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def longest_s(self, begin_s: float, end_s: float) -> float:
        """Of the reads that overlap a time."""
        return max(e - b for b, e in self.reads if e > begin_s and b < end_s)

    def _run(self) -> None:
        descriptor = os.open(self._device, os.O_RDONLY | os.O_DIRECT)
        buffer = mmap.mmap(-1, 4096)
        try:
            while not self._stop.wait(0.02):
                begin = time.perf_counter()
                os.preadv(descriptor, [buffer], 64 * MIB)
                self.reads.append((begin, time.perf_counter()))
        except OSError as error:
            self.error = str(error)
        finally:
            os.close(descriptor)


if REAL:  # it takes longer to start here than the kernel lets a task wait in silence
    Path("/proc/sys/kernel/hung_task_timeout_secs").write_text("120")
prepare()
daemon = Daemon()
daemon.start(real=REAL)
millpond("volume", "create", "odd name/..".replace("/", "-"), "256MiB")
disk = millpond("attach", "disk").strip()
other = millpond("attach", "odd name-..", "--device", "/dev/nbd3").strip()
assert other == "/dev/nbd3"
assert os.readlink("/dev/millpond/odd\\x20name-..") == "../nbd3"
sh("mkfs.ext4", "-q", other)
os.makedirs("/run/other", exist_ok=True)
sh("mount", "-o", "errors=remount-ro", other, "/run/other")
say("attached two, one mounted")

prober = Prober(disk)
load = start(
    *("fio", "--name=v", f"--filename={disk}", "--rw=randwrite", "--bsrange=4k-64k"),
    *("--size=32M", "--ioengine=libaio", "--iodepth=8", "--direct=1", "--verify=crc32c"),
    *("--verify_fatal=1", "--do_verify=1", "--verify_backlog=256", "--fsync=16", "--randseed=7"),
    *("--time_based", "--runtime=3600", "--rate=4m"),
)


def grow(size_mib: int) -> None:
    """The volume under fio; the device follows."""
    millpond("volume", "resize", "disk", f"{size_mib}MiB")


def has_grown(size_mib: int) -> bool:
    """The kernel has heard of it."""
    return Path("/sys/block/nbd0/size").read_text().strip() == str(size_mib * MIB // 512)


# The daemon has just looked for growth: it will not see the next one before it is killed.
grow(1040)
until(lambda: has_grown(1040), "grown under load")
grow(1056)
pauses: list[tuple[float, float]] = []
for turn in range(KILLS):
    if turn:
        time.sleep(0.5)
        Path(f"/run/other/{turn}").write_bytes(bytes([turn]) * MIB)
    killed_s = time.perf_counter()
    daemon.kill()
    assert turn or not has_grown(1056), "this kill came too late"
    daemon.start(real=REAL)
    served = len(prober.reads)
    until(lambda: len(prober.reads) > served + 3, "reads after the restart")  # noqa: B023
    ended_s = time.perf_counter()
    pauses.append((prober.longest_s(killed_s, ended_s), daemon.start_s))
    assert load.poll() is None, f"fio ended: {load.communicate()}"
    if not turn:
        until(lambda: has_grown(1056), "grown while nobody served it")
        Path("/run/other/0").write_bytes(bytes(MIB))
    say(f"kill {turn + 1}: pause {pauses[-1][0]:.2f} s, start {daemon.start_s:.2f} s")
assert all(each["served"] for each in devices()), devices()
prober.stop()
assert not prober.error, prober.error
load.terminate()
said, _ = load.communicate(timeout=120)
assert "verify" not in said.lower() and "error" not in said.lower(), said
worst = max(pause - began for pause, began in pauses)
print(
    f"FIGURE {KILLS} kills: longest pause {max(p for p, _ in pauses):.2f} s, at most {worst:.2f} s"
    f" beyond the start of the process ({'command' if REAL else 'forked'})"
)
if REAL:
    assert worst <= BEYOND_START_S, pauses

for turn in range(KILLS):
    assert Path(f"/run/other/{turn}").read_bytes() == bytes([turn]) * MIB
sh("umount", "/run/other")
sh("e2fsck", "-fn", other)
# The file system was read from the cache of the guest above; now from the device itself.
millpond("detach", other)
millpond("detach", "/dev/millpond/disk")
for name in ("nbd0", "nbd3"):
    clean(name)
status = json.loads(millpond("status", "--json"))
assert not any(status["checksum_errors"].values()), status["checksum_errors"]
daemon.stop()
say("stopped")
