"""Calls that wait for our own devices, in a process of their own.

A thread that waits for a device whose server is this very process cannot be killed.  When the
process is, the thread stays, and with it every descriptor: the kernel does not see the connections
of any device end, the lock on the cache device is held, and no other process can take over.  A
child has descriptors of its own; what it waits for is answered by the process that comes after us.

Rules: worker threads only.  The child is this interpreter without any module but os and sys: it is
there in milliseconds, and has none of our memory.

Happy path: hold(path) -> open exclusively, written back, until the block ends; put(files) -> each
value written.
Failure modes: the child says which step failed and why: OSError; it dies: CacheError.
"""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from millpond.cache.errors import CacheError

OPEN, SYNC = "open", "sync"

_HOLD: Final = """
import os, sys
step = "open"
try:
    descriptor = os.open(sys.argv[1], os.O_RDONLY | os.O_EXCL)
    step = "sync"
    os.fsync(descriptor)
except OSError as error:
    print(step, error.errno or 0)
else:
    print("held 0", flush=True)
    sys.stdin.read()
"""
_PUT: Final = """
import sys
for path, value in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        with open(path, "w") as file:
            file.write(value)
    except OSError:
        pass
"""


class StepFailed(Exception):
    """Of hold(): OPEN or SYNC, and the error number."""

    def __init__(self, step: str, code: int) -> None:
        super().__init__(f"{step}: {os.strerror(code)}")
        self.step = step
        self.code = code


@contextmanager
def hold(path: str) -> Iterator[None]:
    """Open a device so that nobody mounts it, and write it back.  StepFailed."""
    with _start(_HOLD, path) as child:
        assert child.stdin is not None and child.stdout is not None
        step, _, code = child.stdout.readline().strip().partition(" ")
        if step in (OPEN, SYNC):
            raise StepFailed(step, int(code))
        if step != "held":
            raise CacheError(f"the process that was to open {path} died")
        try:
            yield
        finally:
            child.stdin.close()
            child.wait()  # until the kernel has seen it close the device


def put(files: Sequence[tuple[str, str]]) -> None:
    """Write values to files; what cannot be written stays as it is."""
    arguments = [part for pair in files for part in pair]
    if arguments:
        with _start(_PUT, *arguments) as child:
            child.wait()


def _start(program: str, *arguments: str) -> "subprocess.Popen[str]":
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # it says what it has to say, or nobody hears it any more
            text=True,
        )
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO)
        raise CacheError(f"no process for a device: {reason}") from None
