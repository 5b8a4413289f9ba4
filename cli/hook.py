"""`millpond hook`, called by libvirt's hook: a guest's volumes come before it and go after it.

libvirt runs `/etc/libvirt/hooks/qemu.d/50-millpond GUEST OPERATION SUB-OPERATION EXTRA` with the
guest's XML on standard input.  At `prepare begin` each disk under /dev/millpond/ is attached, at
`release end` detached.  Disks that reach us through qemu's NBD client need nothing.

Rules: libvirt is never called from here, it waits for us.  Time is bounded.  A volume is detached
only by the last guest that had it attached: each guest leaves a mark, and a device that was there
before (`millpond map`, `attach`) gets none and stays.  Without a mark a guest that could not start
because another has its disk would pull the disk from under the other.  The mark comes before the
device and goes after it: who is killed in between leaves a mark too many, which the guest's next
release takes, and no device that nobody detaches.  A release goes by marks, not by the guest's XML:
disks that were unplugged under it are not in there any more.
Failure modes: one line on stderr, which libvirt shows, and a code; the guest does not start.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from millpond.cache.errors import CacheError
from millpond.cli.devicexml import LINKS
from millpond.cli.foreground import expected_errors
from millpond.cli.map import (
    AWAY,
    IN_USE,
    RETRY_S,
    HostControlOption,
    attached,
    ensure_attached,
    ensure_detached,
    persist,
)
from millpond.cli.run import BUSY, FAILED, UNREACHABLE, USAGE, CommandError, run
from millpond.cli.status import CONTROL_SOCKET
from millpond.cli.tab import Entry

XML_BYTES_MAX: Final = 16 << 20  # a domain's is some KiB
TRY_AGAIN_S: Final = 15.0
BUDGET_S: Final = 20.0  # libvirt has no limit of its own
MARKS: Final = "/run/millpond/guests"


def register(parent: typer.Typer) -> None:
    """Add the command, which is for libvirt and so not in the help."""
    parent.command("hook", hidden=True)(hook)


def hook(
    guest: Annotated[str, typer.Argument(metavar="GUEST")],
    operation: Annotated[str, typer.Argument(metavar="OPERATION")],
    step: Annotated[str, typer.Argument(metavar="SUB-OPERATION")],
    extra: Annotated[str, typer.Argument(metavar="EXTRA")] = "-",
    control: HostControlOption = CONTROL_SOCKET,
    marks: Annotated[str, typer.Option("--marks", metavar="DIR")] = MARKS,
) -> None:
    """What libvirt calls when a guest starts and ends; its XML is on standard input."""
    data = sys.stdin.buffer.read(XML_BYTES_MAX + 1)
    host = Host(control, Path(marks))
    if (operation, step) == ("prepare", "begin"):
        work = _before(host, guest, disks_of(data))
    elif (operation, step) == ("release", "end"):
        work = _after(host, guest)
    else:
        return
    with expected_errors():
        run(_bounded(work, guest))


@dataclass(frozen=True, slots=True)
class Disk:
    """A volume that a guest's XML names."""

    volume: str
    read_only: bool


@dataclass(frozen=True, slots=True)
class Host:
    """Where the cache is asked, and where marks are left."""

    control: str
    marks: Path


def disks_of(data: bytes) -> list[Disk]:
    """Every volume of ours in a domain's XML, once each; read-only when all its uses are."""
    if len(data) > XML_BYTES_MAX:
        raise CommandError("the guest's XML is too long", exit_code=USAGE)
    try:
        domain = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise CommandError(f"the guest's XML cannot be read: {error}", exit_code=USAGE) from None
    found: dict[str, bool] = {}
    for disk in domain.iterfind("./devices/disk"):
        read_only = disk.find("readonly") is not None
        for source in disk.iter("source"):  # those of backing chains and mirrors, too
            path = source.get("dev") or source.get("file") or ""
            link = path.removeprefix(LINKS)
            if link != path and link and "/" not in link:
                volume = volume_of(link)
                found[volume] = found.get(volume, True) and read_only
    return [Disk(volume, read_only) for volume, read_only in found.items()]


def volume_of(link: str) -> str:
    """The volume whose link has this name: link_name() of nbd/devicelinks.py, backwards.

    Of a name too long for a link it is the id, which the cache takes for a name.
    """
    encoded = re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes([int(found[1], 16)]), link.encode())
    return encoded.decode(errors="replace")


async def _bounded(work: Coroutine[Any, Any, None], guest: str) -> None:
    try:
        async with asyncio.timeout(BUDGET_S):
            await work
    except TimeoutError:
        raise CommandError(
            f"guest {guest!r}: not done with its volumes after {BUDGET_S:g} s; see `millpond"
            " status`, then try again",
            exit_code=UNREACHABLE,
        ) from None


async def _before(host: Host, guest: str, disks: list[Disk]) -> None:
    """All of them are attached, or the guest does not start."""
    for disk in disks:
        async with _locked(Marks(host.marks / _word(disk.volume))) as marks:

            async def mark_and_attach(entry: Entry, marks: Marks = marks) -> dict[str, Any]:
                found = await attached(host.control, entry.volume)
                # A device of nobody's marks is an operator's: it was there before and stays after.
                if found is None or marks.any():
                    marks.leave(guest, entry.volume)
                return found or await ensure_attached(host.control, entry)

            entry = Entry(disk.volume, read_only=disk.read_only)
            found = await persist(entry, mark_and_attach, AWAY, TRY_AGAIN_S)
        if found["read_only"] and not disk.read_only:
            raise CommandError(
                f"volume {disk.volume!r} is attached read-only as {found['device']}, and guest"
                f" {guest!r} writes to it; detach it first, or give the disk <readonly/>",
                exit_code=BUSY,
            )


async def _after(host: Host, guest: str) -> None:
    """What it has marks of is given up, side by side; the first trouble is told."""
    trouble = await asyncio.gather(
        *(_give_up(host, guest, marks, volume) for marks, volume in marks_of(host.marks, guest))
    )
    for error in filter(None, trouble):
        raise error


async def _give_up(host: Host, guest: str, marks: "Marks", volume: str) -> CacheError | None:
    """Detach a volume unless another guest has a mark; on an error the mark stays, too."""
    async with _locked(marks):
        if marks.only(guest):
            try:
                attempt = partial(ensure_detached, host.control)
                await persist(Entry(volume), attempt, IN_USE, TRY_AGAIN_S)
            except CacheError as error:
                return error
        marks.take(guest)
    return None


@dataclass(frozen=True, slots=True)
class Marks:
    """The folder of a volume's marks: a file per guest, with the volume's name in it."""

    place: Path

    def any(self) -> bool:
        """Has any guest left one?"""
        return any(self.place.iterdir())

    def only(self, guest: str) -> bool:
        """Has no other guest left one?"""
        return all(mark.name == _word(guest) for mark in self.place.iterdir())

    def leave(self, guest: str, volume: str) -> None:
        """Make one, whole or not at all."""
        new = self.place.with_suffix(".new")
        new.write_text(volume)
        new.replace(self.place / _word(guest))

    def take(self, guest: str) -> None:
        """Remove one."""
        (self.place / _word(guest)).unlink(missing_ok=True)


def marks_of(marks: Path, guest: str) -> list[tuple[Marks, str]]:
    """Of a guest, with the volumes."""
    found = sorted(marks.glob(f"*/{_word(guest)}"))
    return [(Marks(mark.parent), mark.read_text()) for mark in found]


@contextlib.asynccontextmanager
async def _locked(marks: Marks) -> AsyncIterator[Marks]:
    """Made and locked: libvirt starts guests side by side."""
    place = marks.place
    try:
        os.makedirs(place, exist_ok=True, mode=0o755)
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise CommandError(
            f"cannot keep marks of guests in {place}: {reason}", exit_code=FAILED
        ) from None
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(RETRY_S / 10)
        yield marks
    finally:
        os.close(descriptor)


def _word(name: str) -> str:
    """A file name for any name of a guest or volume."""
    return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:32]
