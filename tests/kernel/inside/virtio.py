"""In a guest: verified load on a virtio disk until the host says "stop" on the second serial port.

Nothing of Millpond runs in here: the disk is a volume that qemu's own NBD client serves.
"""

import subprocess
import time
from pathlib import Path

DISK = "/dev/vdb"


command = ["fio", "--name=v", f"--filename={DISK}", "--rw=randwrite", "--bsrange=4k-64k"]
command += ["--size=32M", "--ioengine=libaio", "--iodepth=8", "--direct=1", "--verify=crc32c"]
command += ["--verify_fatal=1", "--do_verify=1", "--verify_backlog=256", "--fsync=16"]
command += ["--randseed=7", "--time_based", "--runtime=3600", "--rate=4m"]
load = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
time.sleep(1)
print("GUEST load", flush=True)
with open("/dev/ttyS1") as host:
    assert host.readline().strip() == "stop"
assert load.poll() is None, load.communicate()
written = int(Path("/sys/block/vdb/stat").read_text().split()[6]) // 2048
load.terminate()
said, _ = load.communicate(timeout=300)
assert "verify" not in said.lower() and "error" not in said.lower(), said
print(f"FIGURE {written} MiB written and verified in the guest", flush=True)
