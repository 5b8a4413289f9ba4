"""Worlds for the C core: a device or a store directory of this machine, or a simulated one.

The functions and Sim.driver() return a `struct mp_driver *`, which an engine or a store takes.
The real ones are locked: a second process on the same device or directory would corrupt it.

Happy path: open, hand the driver to a core, destroy it after the core.  Failure modes:
DriverError, one line for the operator: not there, in use, no O_DIRECT, no AIO contexts left.
"""

import errno
import fcntl
import os
import stat
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any

from millpond.native import check, ffi, lib

__all__ = ["DriverError", "Op", "Sim", "SimOptions", "destroy", "open_device", "open_directory"]


_POP_BYTES = 1 << 20  # one buffer for all: a new one would be zeroed each time


class DriverError(Exception):
    """A device or directory cannot be used; the message is one line for the operator."""


class Op(IntEnum):
    """enum mp_op of driver.h."""

    READ = lib.MP_OP_READ
    WRITE = lib.MP_OP_WRITE
    SYNC = lib.MP_OP_SYNC
    PUNCH = lib.MP_OP_PUNCH
    ALLOCATE = lib.MP_OP_ALLOCATE
    CREATE = lib.MP_OP_CREATE
    REMOVE = lib.MP_OP_REMOVE
    CALL = lib.MP_OP_CALL


def open_device(path: str | Path) -> Any:
    """The driver of a file, partition or disk of fixed length.  destroy() closes it."""
    # Looked at before it is opened: opening a pipe or a tape may do something.
    mode = _mode(path)
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise DriverError(f"{path}: neither a file nor a block device")
    fd = _open(path, os.O_RDWR | os.O_DIRECT)
    try:
        _lock(fd, path)
        return _made(lib.mp_driver_linux_device(fd), path)
    except BaseException:
        os.close(fd)
        raise


def open_directory(path: str | Path) -> Any:
    """The driver of a store's directory.  destroy() closes it."""
    fd = _open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _probe_direct(path)
        _lock(fd, path)
        return _made(lib.mp_driver_linux_directory(fd), path)
    except BaseException:
        os.close(fd)
        raise


def destroy(driver: Any) -> None:
    """Give back a driver, after its core; nothing may be in flight."""
    lib.mp_driver_destroy(driver)


def _mode(path: str | Path) -> int:
    try:
        return os.stat(path).st_mode
    except OSError as error:
        raise DriverError(f"{path}: {error.strerror}") from error


def _open(path: str | Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EINVAL and flags & os.O_DIRECT:
            raise _no_direct(path) from error
        raise DriverError(f"{path}: {error.strerror}") from error


def _no_direct(path: str | Path) -> DriverError:
    return DriverError(
        f"{path}: this file system has no O_DIRECT; use one on a disk (ext4, xfs) or a block device"
    )


def _probe_direct(path: str | Path) -> None:
    """Open a file that has no name, as segments will be opened."""
    try:
        os.close(os.open(path, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise _no_direct(path) from error
        # No O_TMPFILE here (EOPNOTSUPP): the first segment will tell.
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise DriverError(f"{path}: {error.strerror}") from error


def _lock(fd: int, path: str | Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DriverError(f"{path}: in use by another process; stop that one first") from error


def _made(driver: Any, path: str | Path) -> Any:
    if driver != ffi.NULL:
        return driver
    code = ffi.errno
    if code == errno.EAGAIN:
        raise DriverError(f"{path}: no AIO contexts left; raise sysctl fs.aio-max-nr")
    raise DriverError(f"{path}: cannot start asynchronous I/O: {os.strerror(code)}")


@dataclass(frozen=True, kw_only=True)
class SimOptions:
    """struct mp_sim_options of driver_sim.h."""

    seed: int = 0
    device_bytes: int = 0
    lose_unsynced: bool = False
    tear: bool = False
    reorder: bool = False
    latency_ns: int = 0
    crash_after_io: int = 0
    fail_io: int = 0
    fail_count: int = 1
    fail_errno: int = errno.EIO
    fail_op: Op | None = None
    misdirect_io: int = 0
    capacity_bytes: int = 0

    def c_options(self) -> Any:
        """The C struct."""
        return ffi.new(
            "struct mp_sim_options *",
            {
                "seed": self.seed,
                "device_bytes": self.device_bytes,
                "lose_unsynced": self.lose_unsynced,
                "tear": self.tear,
                "reorder": self.reorder,
                "latency_ns": self.latency_ns,
                "crash_after_io": self.crash_after_io,
                "fail_io": self.fail_io,
                "fail_count": self.fail_count,
                "fail_errno": self.fail_errno,
                "fail_op": self.fail_op or 0,
                "misdirect_io": self.misdirect_io,
                "capacity_bytes": self.capacity_bytes,
            },
        )


class Sim:
    """A simulated world: one disk, sockets, clock and chance.  One thread; for tests.

    The world outlives its drivers: after crash() (or SimOptions.crash_after_io) free the core,
    destroy() its driver and take a new driver(): the disk holds what a real one would.
    """

    def __init__(self, options: SimOptions) -> None:
        self._sim = lib.mp_sim_new(options.c_options())
        self._out = ffi.new("uint8_t[]", _POP_BYTES)

    def __enter__(self) -> "Sim":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the world, and its driver if there still is one; free the core before."""
        if self._sim != ffi.NULL:
            lib.mp_sim_free(self._sim)
            self._sim = ffi.NULL

    def driver(self) -> Any:
        """A new `struct mp_driver *`; at most one at a time."""
        return lib.mp_sim_driver(self._sim)

    def set(self, options: SimOptions) -> None:
        """New options; counters start again, the disk stays, device_bytes is ignored."""
        lib.mp_sim_set(self._sim, options.c_options())

    def crash(self) -> None:
        """End the running driver now, and with lose_unsynced cut the power."""
        lib.mp_sim_crash(self._sim)

    @property
    def crashed(self) -> bool:
        """True from the crash until the next driver()."""
        return bool(lib.mp_sim_crashed(self._sim))

    @property
    def io_count(self) -> int:
        """Mutating I/Os submitted since the world or its options were set."""
        return lib.mp_sim_io_count(self._sim)

    def count(self, op: Op) -> int:
        """Completed I/Os of one kind since the world or its options were set."""
        return lib.mp_sim_count(self._sim, op)

    @property
    def now_ns(self) -> int:
        """Virtual time."""
        return lib.mp_sim_now_ns(self._sim)

    def advance_ns(self, duration_ns: int) -> None:
        """Let virtual time pass; nothing runs until the driver's next turn."""
        lib.mp_sim_advance_ns(self._sim, duration_ns)

    def notified(self) -> bool:
        """Whether notify was called since the last time."""
        return bool(lib.mp_sim_notified(self._sim))

    def peek(self, *, file: int = 0, offset_bytes: int, length_bytes: int) -> bytes:
        """What the disk would read now.  OSError ENOENT, or EIO past the end."""
        out = bytearray(length_bytes)
        view = ffi.from_buffer("uint8_t[]", out, True)
        check(lib.mp_sim_peek(self._sim, file, offset_bytes, view, length_bytes))
        return bytes(out)

    def poke(self, *, file: int = 0, offset_bytes: int, data: bytes) -> None:
        """Damage the disk behind everyone's back, at any byte.  Errors as peek."""
        check(lib.mp_sim_poke(self._sim, file, offset_bytes, data, len(data)))

    @property
    def allocated_bytes(self) -> int:
        """Space in use on the whole disk: written or allocated, and not punched."""
        return lib.mp_sim_allocated_bytes(self._sim)

    def socket(self) -> int:
        """A new socket number, to give to the core."""
        return lib.mp_sim_socket(self._sim)

    def push(self, socket: int, data: bytes) -> int:
        """Send to the core.  OSError EPIPE when it closed the socket."""
        return check(lib.mp_sim_socket_push(self._sim, socket, data, len(data)))

    def pop(self, socket: int, capacity_bytes: int = _POP_BYTES) -> bytes:
        """What the core sent; b"" when nothing.  OSError EPIPE: and it closed the socket."""
        small = capacity_bytes <= _POP_BYTES
        out = self._out if small else ffi.new("uint8_t[]", capacity_bytes)
        got = check(lib.mp_sim_socket_pop(self._sim, socket, out, capacity_bytes))
        return bytes(ffi.buffer(out, got))

    def take_back(self, socket: int) -> bytes:
        """All that was pushed and that the core has not received."""
        data = b""
        while got := lib.mp_sim_socket_take_back(self._sim, socket, self._out, _POP_BYTES):
            data += bytes(ffi.buffer(self._out, got))
        return data

    def limit(self, socket: int, limit_bytes: int) -> None:
        """The core may have at most so many bytes unread by pop; then its send would block."""
        lib.mp_sim_socket_limit(self._sim, socket, limit_bytes)

    def hangup(self, socket: int) -> None:
        """The peer goes away: the core reads what is there, then the end of the stream."""
        lib.mp_sim_socket_hangup(self._sim, socket)
