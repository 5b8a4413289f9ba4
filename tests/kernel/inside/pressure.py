"""In a small guest: much through the page cache to a device that the guest itself serves.

Everything that could wait for itself does: dirty pages fill what memory there is, and the process
that they go to needs memory, too.

Argument: how many MiB.
"""

import os
import random
import sys
import time
from pathlib import Path

from kernel.inside.pond import MIB, Daemon, clean, devices, millpond, prepare, say, sh

WRITTEN_MIB = int(sys.argv[1])


def status_of(pid: int, key: str) -> int:
    """A line of /proc/PID/status, in KiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise AssertionError(key)


prepare()
daemon = Daemon(size="3GiB")
daemon.start()
resident_kib = status_of(daemon.pid, "VmRSS")
assert Path(f"/proc/{daemon.pid}/oom_score_adj").read_text().strip() == "-1000"
assert status_of(daemon.pid, "VmLck") > 0
device = millpond("attach", "disk").strip()
sh("mkfs.xfs", "-q", device)
os.makedirs("/run/disk", exist_ok=True)
sh("mount", device, "/run/disk")
say(f"mounted; resident {resident_kib // 1024} MiB")
begin = time.perf_counter()
chunk = random.Random(7).randbytes(4096) * (MIB // 4096)  # cheap to compress
with open("/run/disk/large", "wb", buffering=0) as file:
    for index in range(WRITTEN_MIB):
        file.write(index.to_bytes(8, "little") + chunk[8:])
        if index % 256 == 255:
            say(f"{index + 1} MiB written")
    os.fsync(file.fileno())
seconds = time.perf_counter() - begin
sh("sysctl", "-q", "vm.drop_caches=3")
with open("/run/disk/large", "rb", buffering=0) as file:
    for index in range(0, WRITTEN_MIB, 64):
        file.seek(index * MIB)
        assert file.read(MIB) == index.to_bytes(8, "little") + chunk[8:], index
assert devices()[0]["served"]
after_kib = status_of(daemon.pid, "VmRSS")
sh("umount", "/run/disk")
millpond("detach", "disk")
clean("nbd0")
daemon.stop()
print(
    f"FIGURE {WRITTEN_MIB} MiB through the page cache of a small guest in {seconds:.0f} s;"
    f" the cache's memory {resident_kib // 1024} MiB before, {after_kib // 1024} MiB after"
)
