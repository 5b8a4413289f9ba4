"""In a guest: attach, file systems, verified load, trim, detach."""

import json
import os
from pathlib import Path

from kernel.inside.pond import (
    Daemon,
    clean,
    devices,
    fio,
    held_by,
    millpond,
    prepare,
    queue,
    say,
    sh,
)

prepare()
daemon = Daemon()
daemon.start()
say("up")
devices()
before = held_by(daemon.pid)
device = millpond("attach", "disk").strip()
say(f"attached {device}")
name = device.removeprefix("/dev/")
assert os.readlink("/dev/millpond/disk") == f"../{name}"
assert queue(name, "io_timeout") == "500"
assert "[none]" in queue(name, "scheduler")
assert queue(name, "rotational") == "0"
assert queue(name, "logical_block_size") == "512"
assert queue(name, "write_cache") == "write back"
assert Path(f"/sys/block/{name}/backend").read_text().startswith("millpond/")
assert int(Path(f"/sys/block/{name}/size").read_text()) * 512 == 1 << 30
(listed,) = json.loads(millpond("device", "list", "--json"))
assert listed["served"] and listed["device"] == device and not listed["read_only"]

fio(device, size="8M")
say("fio on the device")
for kind in ("ext4", "xfs"):
    sh("wipefs", "-qa", device)
    sh(f"mkfs.{kind}", "-q", device)
    os.makedirs("/run/disk", exist_ok=True)
    sh("mount", device, "/run/disk")
    fio("/run/disk/file", size="8M")
    os.unlink("/run/disk/file")
    trimmed = sh("fstrim", "-v", "/run/disk").strip()
    sh("umount", "/run/disk")
    sh("e2fsck" if kind == "ext4" else "xfs_repair", "-fn" if kind == "ext4" else "-n", device)
    say(f"{kind}: {trimmed}")

millpond("detach", "disk")
clean(name)
assert devices() == []
after = held_by(daemon.pid)
assert after == before, f"{before}\nbecame {after}"
daemon.stop()
say("stopped")
