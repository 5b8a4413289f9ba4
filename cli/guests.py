"""Guests' connections between two of our processes: the service manager keeps them.

Rules: what is kept is never read by two processes.  So the manager forgets everything, and has said
so, before anything of it is used; what cannot be used is shut down, so that the other end notices
(a kernel device would wait for ever otherwise).

Happy path: keep_guests(...) as the last thing before the process ends; take_guests(...) in the
next one, then CacheDaemon.inherit for each.
Failure modes: no manager, or one that keeps nothing: the connections end with the process, and
guests connect again.  Descriptors without their description (the process died between two
messages): shut down.
"""

import logging
import os
import socket
from collections.abc import Sequence
from contextlib import suppress

from millpond.cache.errors import escaped
from millpond.cache.handover import HandoverError, Kept, decode, encode
from millpond.cli.notify import Notifier

STATE = "millpond-guests"  # the description, in a memory file
GUEST = "millpond-guest-"
STATE_MAX_BYTES = 1 << 30  # 1024 connections with 128 KiB each, as base64, are a fifth of it

_log = logging.getLogger("cli")


def keep_guests(notifier: Notifier, cache_id: bytes, kept: Sequence[Kept]) -> None:
    """Give them to the manager; closes ours.  The description goes last: it makes them count."""
    if kept:
        named = {f"{GUEST}{number}": each for number, each in enumerate(kept)}
        for name, each in named.items():
            notifier.keep(name, [each.fd])
        state = os.memfd_create(STATE, os.MFD_CLOEXEC)
        with os.fdopen(state, "wb") as file:
            file.write(encode(cache_id, named))
            file.flush()
            notifier.keep(STATE, [state])
        notifier.settled()
        _log.info("guests wait for the next process count=%d", len(kept))
    for each in kept:
        os.close(each.fd)


def take_guests(
    notifier: Notifier, descriptors: dict[str, list[int]], cache_id: bytes
) -> Sequence[Kept]:
    """What the process before left; its descriptors are the caller's."""
    states = descriptors.pop(STATE, [])
    found = {name: fds for name, fds in descriptors.items() if name.startswith(GUEST)}
    for name in found:
        del descriptors[name]
    if not states and not found:
        return []
    for name in (STATE, *found):
        notifier.forget(name)
    kept: Sequence[Kept] = []
    if not notifier.settled():
        _log.warning("guests connect again: the service manager does not answer")
    elif len(states) == 1:
        try:
            once = {name: fds[0] for name, fds in found.items() if len(fds) == 1}
            kept = decode(_content(states[0]), cache_id, once)
        except (HandoverError, OSError) as error:
            _log.warning("guests connect again reason=%s", escaped(str(error)))
    used = {each.fd for each in kept}
    for fd in states:
        os.close(fd)
    for fd in (fd for fds in found.values() for fd in fds if fd not in used):
        shut_down(fd)
    return kept


def shut_down(fd: int) -> None:
    """Close a connection that others may hold too: both its ends hear of it."""
    with socket.socket(fileno=fd) as sock, suppress(OSError):  # gone already
        sock.shutdown(socket.SHUT_RDWR)


def _content(fd: int) -> bytes:
    size = os.fstat(fd).st_size
    if size > STATE_MAX_BYTES:
        raise HandoverError(f"the description has {size} bytes")
    return os.pread(fd, size, 0)
