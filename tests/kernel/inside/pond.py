"""What the scripts in a guest share: a pond with volumes, the command line, load, /sys.

A guest in software emulation needs 5 to 15 s to import Millpond, so the scripts import it once and
fork: a daemon or a command is a forked child in which `main` runs, with a process, signals and
descriptors of its own.  `real=True` starts the installed command instead.

Failure modes: AssertionError or any other exception: the guest ends with a traceback and code 1.
"""

import asyncio
import ctypes
import os
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from millpond.cache.control import call
from millpond.cli.main import main
from millpond.nbd import netlink

netlink.load()
POND = "/run/pond"
CONTROL = f"{POND}/control.sock"
MIB = 1 << 20


def say(text: str) -> None:
    """A line on the console."""
    print(f"{time.clock_gettime(time.CLOCK_MONOTONIC):8.2f} {text}", flush=True)


def sh(*command: str, ok: int | None = 0, timeout_s: float = 240) -> str:
    """Run a program of the host; its output."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert ok is None or done.returncode == ok, f"{command}: {done.returncode}\n{done.stdout}"
    return done.stdout


def start(*command: str) -> "subprocess.Popen[str]":
    """Start a program of the host."""
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def fork(arguments: list[str], output: int, errors: int, *, poor: bool = False) -> int:
    """`millpond ARGUMENTS` in a child; its pid."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        os.dup2(output, 1)
        os.dup2(errors, 2)
        os.closerange(3, 256)  # what the script holds open is not the child's
        if poor:
            drop_capabilities()
        code = main(arguments)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(code)


def drop_capabilities() -> None:
    """A process of root's files and none of root's rights."""
    header = struct.pack("=Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capset(header, bytes(24)) == 0, os.strerror(ctypes.get_errno())


def millpond(*arguments: str, code: int = 0) -> str:
    """A command; its output, or its one line of error when code is not 0."""
    out, err = "/run/tmp/command.out", "/run/tmp/command.err"
    with open(out, "w") as output, open(err, "w") as errors:
        _, status = os.waitpid(fork(list(arguments), output.fileno(), errors.fileno()), 0)
    got = os.waitstatus_to_exitcode(status)
    said, complaint = Path(out).read_text(), Path(err).read_text()
    assert got == code, f"millpond {arguments}: {got}, not {code}\n{log()}{said}{complaint}"
    if code == 0:
        return said
    lines = complaint.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("millpond: error: "), complaint
    return lines[0].removeprefix("millpond: error: ")


def log() -> str:
    """The end of what the daemon said."""
    path = Path("/run/tmp/daemon.err")
    return path.read_text()[-6000:] if path.exists() else ""


def until(holds: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    """Wait for something that must come."""
    end = time.perf_counter() + timeout_s
    while not holds():
        assert time.perf_counter() < end, f"never: {what}\n{log()}"
        time.sleep(0.05)


class Daemon:
    """`millpond up` over /dev/vda, and its restarts."""

    def __init__(self, directory: str = POND, *, size: str = "1GiB", poor: bool = False) -> None:
        self.arguments = ["up", directory, "--size", size, "--cache-size", "512MiB"]
        self.poor = poor
        self.pid = 0
        self.start_s = 0.0

    def start(self, *, real: bool = False) -> None:
        """Until it is ready."""
        begin = time.perf_counter()
        out = "/run/tmp/daemon.out"
        with open(out, "w") as output, open("/run/tmp/daemon.err", "a") as errors:
            if real:
                self.pid = subprocess.Popen(
                    ["millpond", *self.arguments], stdout=output, stderr=errors
                ).pid
            else:
                self.pid = fork(self.arguments, output.fileno(), errors.fileno(), poor=self.poor)
        until(lambda: "nbd+unix://" in Path(out).read_text(), "ready")
        self.start_s = time.perf_counter() - begin
        del self.arguments[2:]  # the sizes of something new

    def kill(self) -> None:
        """kill -9."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def stop(self) -> None:
        """SIGTERM, and a good end."""
        os.kill(self.pid, signal.SIGTERM)
        _, status = os.waitpid(self.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, log()


def prepare() -> None:
    """A file system for the pond, and the control socket for every command."""
    os.makedirs(POND, exist_ok=True)
    sh("mkfs.ext4", "-q", "-E", "lazy_itable_init=1,lazy_journal_init=1", "/dev/vda")
    sh("mount", "/dev/vda", POND)
    os.environ["MILLPOND_CONTROL"] = CONTROL
    os.environ["MILLPOND_STORE"] = f"unix:{POND}/store.sock"
    say("pond prepared")


def devices() -> list[dict[str, Any]]:
    """As the daemon lists them; without a command, which takes seconds here."""
    return list(asyncio.run(call(CONTROL, "devices"))["devices"])


def queue(device: str, name: str) -> str:
    """A setting of a device's queue."""
    return Path(f"/sys/block/{device}/queue/{name}").read_text().strip()


def clean(device: str) -> None:
    """Nothing of a device is left."""
    until(lambda: not Path(f"/sys/block/{device}/pid").exists(), f"{device} disconnected")
    assert not Path(f"/sys/block/{device}/backend").exists()
    until(lambda: not entries("/dev/millpond"), "no link is left")
    until(lambda: not entries("/run/millpond/devices"), "no note is left")


def entries(directory: str) -> list[str]:
    """Of a directory that may come and go."""
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def fio(target: str, *, size: str = "16M", seconds: int = 0, rw: str = "randwrite") -> str:
    """Verified random writes; its report."""
    command = ["fio", "--name=v", f"--filename={target}", f"--rw={rw}", "--bsrange=4k-64k"]
    command += [f"--size={size}", "--ioengine=libaio", "--iodepth=8", "--direct=1"]
    command += ["--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--fsync=32"]
    command += ["--randseed=7", "--output-format=terse"]
    if seconds:
        command += ["--time_based", f"--runtime={seconds}"]
    return sh(*command)


def held_by(pid: int) -> tuple[int, list[str]]:
    """How many threads a process has, and what it has open, once that stands still."""
    before, now = None, _held_by(pid)
    while before != now:
        time.sleep(0.2)  # a connection of the last command may be about to end
        before, now = now, _held_by(pid)
    return now


def _held_by(pid: int) -> tuple[int, list[str]]:
    here = Path(f"/proc/{pid}")
    names = []
    for entry in (here / "fd").iterdir():
        with suppress(FileNotFoundError):
            names.append(os.readlink(entry).split("[")[0])
    kept = sorted(name for name in names if not name.endswith(".seg"))  # the store's log grows
    return len(os.listdir(here / "task")), kept
