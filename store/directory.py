"""A store's directory: one process at a time, formatted only when told, opened into a core.

Happy path: lock, (format when told and empty), recover, and give the core with its driver.
Failure modes: each is a StoreError whose line names the directory: served by another process, no
store in it, not empty, no permission, or what recovery found wrong. Nothing is touched before the
lock is held.
"""

import errno
import fcntl
import logging
import os
from typing import Any

from millpond.native import ffi, lib
from millpond.native.needs import directory_problem
from millpond.native.record import xxh3
from millpond.native.store import StoreCore, StoreOpenError, StoreOptions, format_store
from millpond.store.catalogue import new_id
from millpond.store.errors import Code, StoreError, one_line

log = logging.getLogger("millpond.store")

SOCKET_NAME = "store.sock"
SUPERBLOCK_NAME = f"{0:016x}.seg"  # file 0 of the driver's directory
OWN_NAMES = frozenset({SOCKET_NAME, "lost+found"})
DEFAULT_SEGMENT_BYTES = 64 << 20
SUPER_BYTES = ffi.sizeof("struct mp_store_super")


class OpenStore:
    """The core of a directory that we hold, and what has to be given back with it."""

    def __init__(
        self,
        directory: str,
        *,
        format_when_empty: bool,
        segment_bytes: int = 0,
        page_cache_bytes: int = 0,
        scrub_bytes_per_s: int = 0,
        scrub_interval_s: float = 0.0,
    ) -> None:
        self._lock_fd = lock_directory(directory)
        self._driver: Any = None
        self.core: StoreCore
        self.options = StoreOptions(
            page_cache_bytes=page_cache_bytes,
            scrub_bytes_per_s=scrub_bytes_per_s,
            scrub_interval_ns=int(scrub_interval_s * 1e9),
        )
        try:
            if problem := directory_problem(directory):
                raise StoreError(Code.IO, f"directory {one_line(directory)}: {problem}")
            exists = os.path.exists(os.path.join(directory, SUPERBLOCK_NAME))
            if not exists:
                _check_may_format(directory, format_when_empty=format_when_empty)
            self._driver = make_driver(directory)
            try:
                if not exists:
                    format_store(
                        self._driver, new_id(), segment_bytes=segment_bytes or DEFAULT_SEGMENT_BYTES
                    )
                    log.info("store formatted directory=%s", one_line(directory))
                self.core = StoreCore.open(self._driver, self.options)
            except StoreOpenError as error:
                raise StoreError(
                    Code.IO, f"store {one_line(directory)}: {one_line(str(error))}"
                ) from None
        except BaseException:
            self._give_back()
            raise
        self.notify_fd: int = lib.mp_driver_linux_notify_fd(self._driver)
        self.store_id = read_store_id(directory)

    def close(self) -> None:
        """Finish what was accepted, checkpoint, and give the directory back.  StoreError: its disk
        failed on the way; what was acknowledged is in the log.

        A core that has failed is left as it is, and the directory locked, until the process ends:
        its reactor may wait for ever for a disk that answers nothing, and must not be waited for.
        """
        if self.core.failure() is not None:
            return
        self.core.stop()
        failure = self.core.failure()  # of the last checkpoint
        self.core.close()
        self._give_back()
        if failure is not None:
            raise StoreError(Code.IO, failure)

    def _give_back(self) -> None:
        if self._driver is not None:
            lib.mp_driver_destroy(self._driver)
            self._driver = None
        os.close(self._lock_fd)


def lock_directory(directory: str) -> int:
    """Hold the directory for this process alone; the lock lives as long as the descriptor."""
    shown = one_line(directory)
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise StoreError(
            Code.NOT_FOUND, f"there is no directory {shown}; create it and give it a disk"
        ) from None
    except NotADirectoryError:
        raise StoreError(Code.INVALID, f"{shown} is not a directory") from None
    except PermissionError:
        raise StoreError(Code.PERMISSION, f"no permission to open directory {shown}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise StoreError(
            Code.BUSY, f"directory {shown} is served by another process; stop it first"
        ) from None
    return fd


def read_store_id(directory: str) -> bytes:
    """The store's identity, from a superblock copy that verifies."""
    with open(os.path.join(directory, SUPERBLOCK_NAME), "rb") as file:
        for _ in range(2):
            copy = file.read(SUPER_BYTES)
            if len(copy) < SUPER_BYTES:
                break
            superblock = ffi.cast("struct mp_store_super *", ffi.from_buffer(copy))
            if superblock.checksum == xxh3(
                copy[ffi.offsetof("struct mp_store_super", "version") :]
            ):
                return bytes(superblock.store_id)
    raise StoreError(Code.IO, f"store {one_line(directory)}: no superblock verifies")


def _check_may_format(directory: str, *, format_when_empty: bool) -> None:
    shown = one_line(directory)
    if not format_when_empty:
        raise StoreError(
            Code.NOT_FOUND, f"directory {shown} holds no store; make one with --format"
        )
    strangers = sorted(set(os.listdir(directory)) - OWN_NAMES)
    if strangers:
        raise StoreError(
            Code.EXISTS,
            f"directory {shown} is not empty (it holds {one_line(strangers[0])!r});"
            " a store is made in an empty directory",
        )


def make_driver(directory: str) -> Any:
    """The real world for this directory; the driver owns a descriptor of its own."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    driver = lib.mp_driver_linux_directory(fd)
    if driver == ffi.NULL:
        error = ffi.errno
        os.close(fd)
        words = os.strerror(error)
        if error == errno.EAGAIN:  # io_setup: the machine's limit of AIO contexts
            words = "no more asynchronous I/O contexts; raise fs.aio-max-nr"
        raise StoreError(Code.IO, f"store {one_line(directory)}: {words}")
    return driver
