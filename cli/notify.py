"""What a daemon and its service manager say to each other: sd_notify(3) and sd_listen_fds(3).

Rules: without NOTIFY_SOCKET everything here does nothing, so a daemon runs the same by hand.  A
descriptor that was handed to us is taken once, closed on exec, and found by its name.  A watchdog
ping means "I was asked and I answered": it comes after `alive` has, never from a timer alone.

Happy path: descriptors = take_descriptors(); notifier = Notifier.of_environment(); ready(...);
async with watched(notifier, alive): serve; stopping().
Failure modes: descriptors that are for another process (LISTEN_PID) are left alone; a manager
that cannot be reached is one warning, since guests matter more than it; `alive` that does not
answer: no ping, and the manager ends us.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import select
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Final

from millpond.store.errors import one_line

FIRST_DESCRIPTOR: Final = 3  # SD_LISTEN_FDS_START
DESCRIPTORS_MAX: Final = 4096  # more than FileDescriptorStoreMax= of our units, and sockets
BARRIER_TIMEOUT_S: Final = 5.0  # it answers between two things it does
SEND_TIMEOUT_S: Final = 2.0  # the manager reads at once, or it is in trouble itself
PINGS_PER_INTERVAL: Final = 3  # one may be late, and one may be lost

_log = logging.getLogger("cli")


class Notifier:
    """Sends states to the service manager; address None: there is none.  Any thread."""

    def __init__(self, address: str | None, *, watchdog_s: float | None = None) -> None:
        self._address = address
        self.watchdog_s = watchdog_s if address is not None else None
        self._complained = False

    @classmethod
    def of_environment(cls, environ: Mapping[str, str] = os.environ) -> "Notifier":
        """As systemd tells its services: NOTIFY_SOCKET, WATCHDOG_USEC, WATCHDOG_PID."""
        watchdog_us = _count(environ.get("WATCHDOG_USEC"))
        for_another = environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid())
        watchdog_s = None if for_another or not watchdog_us else watchdog_us / 1e6
        return cls(environ.get("NOTIFY_SOCKET") or None, watchdog_s=watchdog_s)

    def ready(self, status: str) -> None:
        """Started: what waits for us may go on."""
        self._send(f"READY=1\nSTATUS={one_line(status)}")

    def stopping(self) -> None:
        """On our way out."""
        self._send("STOPPING=1")

    def ping(self) -> None:
        """Not stuck."""
        self._send("WATCHDOG=1")

    def keep(self, name: str, descriptors: Sequence[int]) -> None:
        """Ask the manager to hold descriptors for our next process, under a name."""
        assert name and ":" not in name, "FDNAME= is a word"
        self._send(f"FDSTORE=1\nFDNAME={name}", descriptors)

    def forget(self, name: str) -> None:
        """The manager closes what it holds under this name."""
        self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    @property
    def is_there(self) -> bool:
        """There is a manager."""
        return self._address is not None

    def settled(self) -> bool:
        """Wait until the manager has done all that it was told before; False: it does not say."""
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            said = self._send("BARRIER=1", [writing])
        finally:
            os.close(writing)  # its copy is the last one, and it closes that when it gets there
        try:
            answer = select.poll()  # select() knows no descriptors from 1024 on
            answer.register(reading)
            return said and bool(answer.poll(BARRIER_TIMEOUT_S * 1000))
        finally:
            os.close(reading)

    def _send(self, text: str, descriptors: Sequence[int] = ()) -> bool:
        if self._address is None:
            return False
        # A leading @ is how the environment writes the zero byte of an abstract address.
        address = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.settimeout(SEND_TIMEOUT_S)
                sock.connect(address)
                if descriptors:
                    socket.send_fds(sock, [text.encode()], list(descriptors))
                else:
                    sock.send(text.encode())
            return True
        except OSError as error:
            if not self._complained:
                self._complained = True
                _log.warning("cannot tell the service manager how we are: %s", error)
            return False


@contextlib.asynccontextmanager
async def watched(
    notifier: Notifier, alive: Callable[[], Awaitable[object]]
) -> AsyncIterator[None]:
    """Ping as often as the manager wants, each time after `alive` has answered."""
    if notifier.watchdog_s is None:
        yield
        return
    task = asyncio.create_task(_ping(notifier, alive, notifier.watchdog_s / PINGS_PER_INTERVAL))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _ping(
    notifier: Notifier, alive: Callable[[], Awaitable[object]], interval_s: float
) -> None:
    while True:
        await alive()
        notifier.ping()
        await asyncio.sleep(interval_s)


def take_descriptors(
    environ: MutableMapping[str, str] = os.environ, *, first: int = FIRST_DESCRIPTOR
) -> dict[str, list[int]]:
    """Descriptors that systemd handed to this process, by name; a second call finds none."""
    for_us = environ.get("LISTEN_PID") == str(os.getpid())
    count = _count(environ.get("LISTEN_FDS"))
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        environ.pop(name, None)  # a child of ours must not take them for its own
    if not for_us:
        return {}
    found: dict[str, list[int]] = {}
    for index in range(min(count, DESCRIPTORS_MAX)):
        descriptor = first + index
        fcntl.fcntl(descriptor, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        found.setdefault(names[index] if index < len(names) else "", []).append(descriptor)
    return found


def take_listener(descriptors: dict[str, list[int]], name: str) -> socket.socket | None:
    """The listening stream socket of this name, non-blocking; None when there is none."""
    taken = descriptors.pop(name, [])
    if not taken:
        return None
    listener, *more = (socket.socket(fileno=descriptor) for descriptor in taken)
    if more or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        for sock in (listener, *more):
            sock.close()
        raise OSError(f"the service manager must hand over one listening socket named {name!r}")
    listener.setblocking(False)
    return listener


def _count(text: str | None) -> int:
    """A number of the environment; what is none counts as zero."""
    return int(text) if text is not None and text.isascii() and text.isdigit() else 0
