"""What the daemons of the command line share: log lines, signals, errors as one line.

Logs go to stderr, one line each, `level=... room=... message key=value`; what the message quotes
from outside was escaped where it was written.
"""

import asyncio
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import quote

import typer

from millpond.cache.control import ControlServer
from millpond.cache.daemon import CacheDaemon
from millpond.cache.errors import (
    AlreadyThere,
    CacheAway,
    CacheError,
    NotPermitted,
    StoreAway,
    VolumeBusy,
    VolumeFenced,
    VolumeUnknown,
)
from millpond.cache.handover import Kept
from millpond.cache.protect import log_protection
from millpond.cache.shaping import RateLimits
from millpond.cache.status import handlers_of
from millpond.cli.guests import keep_guests
from millpond.cli.notify import Notifier, watched
from millpond.cli.output import parse_size
from millpond.cli.run import (
    BUSY,
    EXISTS,
    FAILED,
    NOT_FOUND,
    PERMISSION,
    UNREACHABLE,
    USAGE,
    CommandError,
)
from millpond.native.needs import kernel_problem
from millpond.nbd.devices import KernelDevices
from millpond.nbd.devices import handlers_of as device_handlers_of
from millpond.nbd.errors import NbdError
from millpond.nbd.limits import DEAD_TIMEOUT_S
from millpond.nbd.server import NbdServer
from millpond.store.address import Address, check_exposure, parse_address
from millpond.store.errors import StoreError
from millpond.store.unixsocket import SOCKET_MODE

AverageRateOption = Annotated[
    str | None, typer.Option("--average-rate", help="of destage, bytes/s like 20MiB")
]
PeakRateOption = Annotated[
    str | None, typer.Option("--peak-rate", help="of destage in any second, bytes/s")
]
# 1024 connections of guests or caches (nbd/limits.py, store/limits.py), their files, a margin.
DESCRIPTORS_WANTED = 4096

_log = logging.getLogger("cli")

ReadOnlyOption = Annotated[
    bool | None, typer.Option("--read-only", help="guests may not write", show_default=False)
]


def check_machine() -> None:
    """Before anything is touched: can this machine run a daemon of ours?"""
    problem = kernel_problem(os.uname().release)
    if problem:
        raise CommandError(problem)


def raise_descriptor_limit() -> None:
    """The usual soft limit, 1024, is for programs that call select(); ours holds a connection per
    guest, and more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_WANTED if hard == resource.RLIM_INFINITY else min(DESCRIPTORS_WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < DESCRIPTORS_WANTED:
        _log.warning(
            "at most %d open files are allowed here: so many connections at a time, and less; "
            "raise the hard limit (ulimit -Hn, LimitNOFILE=) to %d",
            hard,
            DESCRIPTORS_WANTED,
        )


def log_to_stderr() -> None:
    """One line per event; tracebacks only for what must not happen."""
    logging.basicConfig(
        format="level=%(levelname)s room=%(name)s %(message)s",
        level=logging.INFO,
        stream=sys.stderr,
    )


@contextmanager
def expected_errors() -> Iterator[None]:
    """Expected failures of cache and nbd become one line and an exit code."""
    try:
        yield
    except AlreadyThere as error:
        raise CommandError(str(error), exit_code=EXISTS) from None
    except NotPermitted as error:
        raise CommandError(str(error), exit_code=PERMISSION) from None
    except (VolumeBusy, VolumeFenced) as error:
        raise CommandError(str(error), exit_code=BUSY) from None
    except VolumeUnknown as error:
        raise CommandError(str(error), exit_code=NOT_FOUND) from None
    except (CacheAway, StoreAway) as error:
        raise CommandError(str(error), exit_code=UNREACHABLE) from None
    except (CacheError, NbdError) as error:
        raise CommandError(str(error), exit_code=FAILED) from None


class StopSignals:
    """SIGTERM and SIGINT ask to stop; a second one changes nothing."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked.set)

    def ask(self) -> None:
        """As if a signal had come (the control socket's stop)."""
        self._asked.set()

    async def wait(self) -> None:
        """Until asked to stop."""
        await self._asked.wait()


async def first_of(*waits: Awaitable[object]) -> None:
    """Until the first of them is done; its exception is raised, the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True)
class Socket:
    """A unix socket to listen on."""

    path: str
    mode: int = SOCKET_MODE
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Tcp:
    """A TCP address for guests to listen on."""

    address: Address
    insecure_listen: bool = False


def parse_tcp(text: str | None, *, insecure_listen: bool) -> Tcp | None:
    """--nbd-tcp: HOST:PORT."""
    if text is None:
        return None
    try:
        address = parse_address(text)
        if address.path:
            raise CommandError(f"{text!a} is a unix socket: give it to --nbd", exit_code=USAGE)
        check_exposure(address, insecure_listen=insecure_listen)
    except StoreError as error:
        raise CommandError(error.message, exit_code=USAGE) from None
    return Tcp(address, insecure_listen)


async def serve_cache(
    daemon: CacheDaemon,
    *,
    nbd_socket: Socket,
    nbd_listener: socket.socket | None = None,
    nbd_tcp: Tcp | None = None,
    control_socket: Socket | None,
    signals: StopSignals,
    ready_lines: Sequence[str],
    also: Sequence[Awaitable[object]] = (),
    notifier: Notifier | None = None,
    guests: Sequence[Kept] = (),
    dead_timeout_s: int = DEAD_TIMEOUT_S,
) -> None:
    """Serve guests and the control socket until asked to stop, or until something has failed.

    nbd_listener: nbd_socket as somebody else has bound it, who keeps it when we are gone.
    guests: connections of the process before.
    """
    notifier = notifier or Notifier(None)
    nbd = NbdServer(daemon.exports, engine_connections=lambda: daemon.connection_count)
    devices = KernelDevices(
        daemon.exports, daemon.engine.cache_id, daemon.tasks, dead_timeout_s=dead_timeout_s
    )
    handlers = handlers_of(daemon, signals.ask) | device_handlers_of(devices)
    control = ControlServer(handlers, daemon.tasks)
    async with watched(notifier, daemon.alive):
        try:
            for guest in devices.take(guests):
                daemon.inherit(guest)
            daemon.go()
            await devices.start()
            if control_socket is not None:
                await control.listen(
                    control_socket.path, mode=control_socket.mode, group=control_socket.group
                )
            if nbd_listener is not None:
                nbd.serve_socket(nbd_listener)
            else:
                await nbd.serve_unix(nbd_socket.path, mode=nbd_socket.mode, group=nbd_socket.group)
            if nbd_tcp is not None:
                bound = await nbd.serve_tcp(
                    nbd_tcp.address, insecure_listen=nbd_tcp.insecure_listen
                )
                ready_lines = [*ready_lines, f"nbd://{str(bound).removeprefix('tcp:')}/"]
            log_protection()
            for line in ready_lines:
                print(line, flush=True)
            notifier.ready(f"serving guests at {nbd_socket.path}")
            await first_of(signals.wait(), _failed(daemon), *also)
        finally:
            notifier.stopping()
            await nbd.close()
            await control.close()
            unused = await devices.close()
            if notifier.is_there:
                await daemon.give_back()
            clean = await daemon.stop()
            keep_guests(notifier, daemon.engine.cache_id, [*unused, *daemon.take_kept()])
    if not clean:
        raise CommandError("the cache did not stop cleanly; it will recover at the next start")


async def _failed(daemon: CacheDaemon) -> None:
    """Raise when the cache has failed."""
    reason = await asyncio.shield(daemon.failed)
    raise CommandError(f"the cache stopped: {reason}")


def nbd_uri(socket_path: str) -> str:
    """How clients name the default export of a socket."""
    return f"nbd+unix:///?socket={quote(socket_path)}"


def parse_rates(
    average: str | None, peak: str | None, otherwise: RateLimits | None = None
) -> RateLimits:
    """--average-rate and --peak-rate, in bytes per second like 20MiB, or what is in force else."""
    otherwise = otherwise or RateLimits()
    try:
        return RateLimits(
            parse_size(average) if average is not None else otherwise.average_bytes_per_s,
            parse_size(peak) if peak is not None else otherwise.peak_bytes_per_s,
        )
    except ValueError as error:
        raise CommandError(str(error), exit_code=USAGE) from None
