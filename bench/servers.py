"""What is compared: ways to reach the same bytes on the same disk, one of them Millpond.

Each is a Target: started once, filled once, measured in turns. Peers are the servers of
qemu and nbdkit, run as their manuals say; `raw` is the file without any server.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import fio
from daemon import Daemon, number

MIB = 1 << 20
DESTAGE_MIB_PER_S = 128
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """User and system time of all threads of a process so far (proc(5), stat fields 14, 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def nbd(socket: Path, export: str = "") -> list[str]:
    """fio's options for an export behind a unix socket."""
    return ["--ioengine=nbd", f"--uri=nbd+unix:///{export}?socket={socket}"]


class Target:
    """One way to reach a disk of disk_bytes below directory."""

    name = ""

    def __init__(self, directory: Path, disk_bytes: int) -> None:
        self.directory = directory / self.name.replace(" ", "-")
        self.directory.mkdir(parents=True)
        self.disk_bytes = disk_bytes
        self.socket = self.directory / "socket"
        self.file = self.directory / "disk.raw"
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Make it reachable."""

    def reach(self) -> list[str]:
        """fio's options to reach it."""
        return nbd(self.socket)

    def pids(self) -> list[int]:
        """The server's processes, for their CPU time."""
        return [process.pid for process in self.processes]

    def settle(self) -> None:
        """Wait until no work of an earlier job is left behind."""
        os.sync()

    def make_cold(self) -> None:
        """Before a miss job; a server without a cache has nothing to do."""

    def make_warm(self, job: fio.Job) -> None:
        """Before a hit job."""

    def note(self, before: dict[str, int], after: dict[str, int]) -> str:
        """What the server itself says about the job between two snapshots."""
        return ""

    def snapshot(self) -> dict[str, int]:
        """The server's own counters."""
        return {}

    def close(self) -> None:
        """End it; last started first."""
        for process in reversed(self.processes):
            process.terminate()
            process.wait()
        self.processes.clear()

    def spawn(self, command: list[str], socket: Path) -> None:
        """Start a server process and wait for its socket."""
        self.processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        for _ in range(200):
            if socket.exists():
                return
            time.sleep(0.05)
        raise SystemExit(f"{command[0]} did not get ready")

    def make_file(self) -> None:
        """A file of the disk's size, every byte written with incompressible data, if not there."""
        if not self.file.exists():
            job = fio.Job("fill", "write", MIB, 8, 0, self.disk_bytes)
            fio.run(job, ["--ioengine=libaio", "--direct=1", f"--filename={self.file}"])

    def share_file(self) -> None:
        """The file that everything with direct I/O works on: the same places of the disk."""
        self.file = self.directory.parent / "disk.raw"
        self.make_file()

    def spawn_qemu_nbd(self, socket: Path) -> None:
        """qemu-nbd with direct I/O on the file; unlocked, as they share it, one at a time."""
        options = f"driver=raw,file.driver=file,file.locking=off,file.filename={self.file}"
        command = ["qemu-nbd", "--cache=none", "--aio=native", "--discard=unmap"]
        self.spawn([*command, "-t", "-e", "4", "-k", str(socket), "--image-opts", options], socket)


class Raw(Target):
    """The file itself, direct I/O."""

    name = "raw"

    def start(self) -> None:
        self.share_file()

    def reach(self) -> list[str]:
        return ["--ioengine=libaio", "--direct=1", f"--filename={self.file}"]


class QemuNbd(Target):
    """qemu-nbd --cache=none --aio=native."""

    name = "qemu-nbd"

    def start(self) -> None:
        self.share_file()
        self.spawn_qemu_nbd(self.socket)


class NbdkitFile(Target):
    """nbdkit's file plugin: the page cache is its cache."""

    name = "nbdkit file"

    def start(self) -> None:
        self.make_file()
        command = ["nbdkit", "-f", "-U", str(self.socket), "file", str(self.file)]
        self.spawn(command, self.socket)


class NbdkitMemory(Target):
    """nbdkit's memory plugin: no disk at all, the price of the protocol."""

    name = "nbdkit memory"

    def start(self) -> None:
        command = ["nbdkit", "-f", "-U", str(self.socket), "memory", f"{self.disk_bytes}"]
        self.spawn(command, self.socket)
        fio.run(fio.Job("fill", "write", MIB, 8, 0, self.disk_bytes), self.reach())


class NbdkitProxy(Target):
    """nbdkit's nbd plugin in front of qemu-nbd: two hops, as a miss has."""

    name = "nbdkit proxy"

    def start(self) -> None:
        self.share_file()
        behind = self.directory / "behind"
        self.spawn_qemu_nbd(behind)
        command = ["nbdkit", "-f", "-U", str(self.socket), "nbd", f"socket={behind}"]
        self.spawn(command, self.socket)


class Millpond(Target):
    """millpond up: cache and store in one process, both on this disk."""

    name = "millpond"

    def __init__(self, directory: Path, disk_bytes: int) -> None:
        super().__init__(directory, disk_bytes)
        # A quarter is write log: room for what a job writes, as the SSD of a hypervisor has. The
        # store shares disk and processors here, so its share is bounded, as an operator would.
        self.cache_bytes = disk_bytes * 6
        self.log_bytes = self.cache_bytes // 4
        sizes = ["--size", f"{disk_bytes // MIB}MiB"]
        sizes += ["--cache-size", f"{self.cache_bytes // MIB}MiB"]
        sizes += ["--average-rate", f"{DESTAGE_MIB_PER_S}MiB"]
        command = Path(sys.executable).with_name("millpond")
        log = self.directory / "millpond.log"
        self.daemon = Daemon(command, self.directory / "up", sizes, log)
        self.warm = False

    def start(self) -> None:
        self.daemon.start()
        fio.run(fio.Job("fill", "write", MIB, 4, 0, self.disk_bytes), self.reach())
        self.settle()

    def reach(self) -> list[str]:
        return nbd(self.daemon.socket, self.daemon.export)

    def pids(self) -> list[int]:
        return [self.daemon.pid]

    def settle(self) -> None:
        self.daemon.wait_destaged(timeout_s=600)
        os.sync()

    def make_cold(self) -> None:
        """A new cache device: no block of the disk is in it."""
        self.settle()
        self.daemon.stop()
        self.daemon.format_cache()
        self.daemon.start()
        self.warm = False

    def make_warm(self, job: fio.Job) -> None:
        """Bring the region into read slots: its log space is used again first, then it is read.

        What lies in the write log is answered from there, so the other half of the disk is
        written until the log has gone round, and destaged.
        """
        if self.warm:
            return
        other = self.disk_bytes // 2
        for _ in range(self.log_bytes // other + 1):
            fio.run(fio.Job("recycle", "write", MIB, 4, other, other), self.reach())
            self.settle()
        region = fio.Job("warm", "read", MIB, 4, job.offset_bytes, job.region_bytes)
        for _ in range(2):  # the admission test may want to see a block twice
            fio.run(region, self.reach())
        self.warm = True

    def snapshot(self) -> dict[str, int]:
        engine = self.daemon.status()["engine"]
        return {key: number(engine, key) for key in ("hits", "misses", "slot_hits")}

    def note(self, before: dict[str, int], after: dict[str, int]) -> str:
        """Shares of hits and of reads from slots among the lookups, as the engine counts them."""
        hits, misses, slots = (after[key] - before[key] for key in before)
        if hits + misses == 0:
            return ""
        return f"hits {hits / (hits + misses):.1%}, slots {slots / (hits + misses):.1%}"

    def close(self) -> None:
        self.daemon.close()


TARGETS: tuple[type[Target], ...] = (Raw, QemuNbd, NbdkitFile, NbdkitMemory, NbdkitProxy, Millpond)
