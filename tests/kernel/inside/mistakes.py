"""In a guest that has not loaded the nbd module: every mistake is one line and leaves nothing.

Then what others do to our devices, a daemon lost while it attaches, and a volume that grows.
"""

import asyncio
import os
import signal
import socket
import time
from pathlib import Path

from kernel.inside.pond import (
    MIB,
    POND,
    Daemon,
    clean,
    devices,
    entries,
    held_by,
    millpond,
    prepare,
    say,
    sh,
    until,
)
from millpond.cache.control import call
from millpond.cache.errors import CacheAway
from millpond.nbd import netlink
from millpond.nbd.sysfs import Sysfs, exclusive


def refused(code: int, says: str, *arguments: str) -> None:
    """A command fails with a code and a line, and nothing has changed."""
    before = held_by(daemon.pid), devices()
    line = millpond(*arguments, code=code)
    assert says in line, f"{arguments}: {line!r} does not say {says!r}"
    until(lambda: (held_by(daemon.pid), devices()) == before, "as before")
    say(f"{code}: {line}")


prepare()
daemon = Daemon()
daemon.start()
devices()
refused(1, "modprobe nbd", "attach", "disk")
sh("busybox", "insmod", "/run/modules/nbd.ko", "nbds_max=3", "max_part=8")
refused(3, "no volume named", "attach", "nothing")
refused(1, "is no NBD device", "attach", "disk", "--device", "/dev/vda")
refused(3, "not attached", "detach", "disk")

# The standard tool uses our socket, and has a device.
sh("nbd-client", "-unix", f"{POND}/nbd.sock", "/dev/nbd1", "-N", "disk")
sh("mkfs.ext4", "-q", "/dev/nbd1")
until(lambda: Path("/sys/block/nbd1/pid").exists(), "nbd-client is connected")
refused(5, "/dev/nbd1 is in use", "attach", "disk", "--device", "/dev/nbd1")
sh("nbd-client", "-d", "/dev/nbd1")
clean("nbd1")
say("nbd-client came and went")

# A cache without rights, which must not touch the other cache's device either.
assert millpond("attach", "disk", "--device", "nbd1") == "/dev/nbd1\n"
refused(4, "attached already as /dev/nbd1", "attach", "disk")
refused(4, "attached already as /dev/nbd1", "attach", "disk", "--exist-ok", "--read-only")
assert millpond("attach", "disk", "--exist-ok") == "/dev/nbd1\n"
poor = Daemon(f"{POND}/poor", poor=True)
poor.start()
line = millpond("attach", "disk", "--dir", f"{POND}/poor", code=5)
assert "/dev/millpond/disk leads to /dev/nbd1, which has another volume" in line, line
millpond("volume", "rename", "disk", "mine")
assert devices()[0]["volume"] == "mine" and entries("/dev/millpond") == ["mine"]
line = millpond("attach", "disk", "--dir", f"{POND}/poor", code=13)
assert "CAP_SYS_ADMIN" in line, line
assert devices()[0]["served"] and not Path("/sys/block/nbd2/pid").exists()
poor.stop()
millpond("volume", "rename", "mine", "disk")
say(f"13: {line}")

# In use.
os.makedirs("/run/disk", exist_ok=True)
sh("mount", "/dev/nbd1", "/run/disk")
refused(5, "/dev/nbd1 is mounted at /run/disk", "detach", "disk")
sh("umount", "/run/disk")
opened = os.open("/dev/nbd1", os.O_RDONLY)
refused(5, "/dev/nbd1 is open in ", "detach", "/dev/nbd1")
os.close(opened)

# By force: who has it keeps a dead device, for restarts of the daemon too, until it is let go.
printk = Path("/proc/sys/kernel/printk")
sh("mount", "/dev/nbd1", "/run/disk")
printk.write_text("1")  # a file system without its disk complains, and should
millpond("detach", "disk", "--force")
assert not devices() and not os.path.lexists("/dev/millpond/disk")
refused(5, "detached, but /dev/nbd1 is still mounted at /run/disk", "attach", "disk")
daemon.kill()
daemon.start()
assert not devices(), devices()
try:
    os.listdir("/run/disk/lost+found")
    raise AssertionError("the device came back to life")
except OSError as error:
    say(f"a device that was detached by force: {error}")
sh("umount", "/run/disk")
printk.write_text("5")
clean("nbd1")
assert millpond("attach", "disk", "--device", "nbd1") == "/dev/nbd1\n"

# It grows with its volume.
millpond("volume", "resize", "disk", "1280MiB")
until(lambda: Path("/sys/block/nbd1/size").read_text().strip() == str(1280 * MIB // 512), "grown")
sh("dd", "if=/dev/zero", "of=/dev/nbd1", "bs=1M", "seek=1200", "count=8", "oflag=direct")
assert devices()[0]["size_bytes"] == 1280 * MIB
sh("mount", "/dev/nbd1", "/run/disk")
sh("resize2fs", "/dev/nbd1")
sh("umount", "/run/disk")
say("grown")

# Others disconnect it: while the cache runs and it is mounted, and while no cache runs.
sh("mount", "/dev/nbd1", "/run/disk")
printk.write_text("1")
sh("nbd-client", "-d", "/dev/nbd1")
until(lambda: not devices(), "forgotten")
sh("umount", "/run/disk")
printk.write_text("5")
clean("nbd1")
millpond("attach", "disk")
daemon.kill()
sh("nbd-client", "-d", "/dev/nbd0")
daemon.start()
clean("nbd0")
assert not devices()

# Read-only.
device = millpond("attach", "disk", "--read-only").strip()
assert Path("/sys/block/nbd0/ro").read_text().strip() == "1"
said = sh("dd", "if=/dev/zero", f"of={device}", "bs=4k", "count=1", "oflag=direct", ok=1)
assert "not permitted" in said or "Read-only" in said, said
daemon.kill()
daemon.start()
(listed,) = devices()
assert listed["read_only"] and listed["served"], listed
sh("dd", f"if={device}", "of=/dev/null", "bs=1M", "count=4", "iflag=direct")
millpond("detach", "disk")
clean("nbd0")
say("read-only")


async def attach_and_kill(delay_s: float) -> bool:
    """Ask, kill the daemon so much later; whether it had said that it attached."""
    asking = asyncio.create_task(call(f"{POND}/control.sock", "attach", volume="disk"))
    await asyncio.sleep(delay_s)
    daemon.kill()
    try:
        await asking
    except CacheAway:
        return False
    return True


# Lost while it attaches: the device is there, and then it is served, or it is not.
kept = 0
DELAYS_S = (0.01, 0.05, 0.1, 0.2, 0.4, 0.8)
for delay_s in DELAYS_S:
    said_so = asyncio.run(attach_and_kill(delay_s))
    there = Path("/sys/block/nbd0/pid").exists()
    assert there or not said_so, "it said that it had attached"
    daemon.start()
    assert [each["served"] for each in devices()] == [True] * there, devices()
    if there:
        sh("dd", "if=/dev/nbd0", "of=/dev/null", "bs=1M", "count=1", "iflag=direct")
        asyncio.run(call(f"{POND}/control.sock", "detach", volume="disk"))
    kept += there
    clean("nbd0")
print(f"FIGURE killed while attaching, {len(DELAYS_S)} times: {kept} devices, all served again")
daemon.kill()
line = millpond("attach", "disk", code=6)
assert "no cache answers at" in line, line
say(f"6: {line}")


def wait_for_itself() -> None:
    """Open a device whose server is this process, which never answers; does not return."""
    _ours, theirs = socket.socketpair()
    made = {"index": 2, "size_bytes": 64 * MIB, "block_bytes": 512, "server_flags": 1}
    netlink.connect(theirs, **made, dead_timeout_s=60, backend="nobody")
    theirs.close()
    with exclusive(Sysfs(), 2):
        os._exit(1)


# Killed while it waits for its own device, a process ends, and its connections with it.
pid = os.fork()
if not pid:
    wait_for_itself()
until(lambda: Path("/sys/block/nbd2/pid").exists(), "connected")
time.sleep(3)
assert Path("/sys/block/nbd2/inflight").read_text().split() == ["1", "0"]
os.kill(pid, signal.SIGKILL)
until(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid, "the killed process has ended", 6)
printk.write_text("1")  # of reads that fail
netlink.disconnect(2)
clean("nbd2")
say("killed while it waited for its own device")
