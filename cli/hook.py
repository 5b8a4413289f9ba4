"""`millpond hook`, called by libvirt's hook: a guest's volumes come before it and go after it.

libvirt runs `/etc/libvirt/hooks/qemu.d/50-millpond GUEST OPERATION SUB-OPERATION EXTRA` with the
guest's XML on standard input.  At `prepare begin` each disk under /dev/millpond/ is attached, at
`release end` detached.  Disks that reach us through qemu's NBD client need nothing.

Rules: libvirt is never called from here, it waits for us.  Time is bounded.  A volume is detached
only by the last guest that had it attached: each guest leaves a mark, and a device that was there
before (`millpond map`, `attach`) gets none and stays.  Without a mark a guest that could not start
because another has its disk would pull the disk from under the other.
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
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from millpond.cache.control import call
from millpond.cache.errors import CacheAway, CacheError, StoreAway
from millpond.cli.devicexml import LINKS
from millpond.cli.foreground import expected_errors
from millpond.cli.map import CONTROL_SOCKET, RETRY_S, HostControlOption, attach, attached
from millpond.cli.run import FAILED, UNREACHABLE, USAGE, CommandError, run
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
    works = {("prepare", "begin"): _before, ("release", "end"): _after}
    work = works.get((operation, step))
    if work is None:
        return
    disks = disks_of(sys.stdin.buffer.read(XML_BYTES_MAX + 1))
    with expected_errors():
        run(_bounded(work(Host(control, Path(marks)), guest, disks), guest))


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
    """The volume whose link has this name: link_name() of nbd/devicelinks.py, backwards."""
    encoded = re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes([int(found[1], 16)]), link.encode())
    return encoded.decode(errors="replace")


async def _bounded(work: Any, guest: str) -> None:
    try:
        async with asyncio.timeout(BUDGET_S):
            await work
    except TimeoutError:
        raise CommandError(
            f"guest {guest!r}: its volumes are not ready after {BUDGET_S:g} s; see `millpond"
            " status`, then start it again",
            exit_code=UNREACHABLE,
        ) from None


async def _before(host: Host, guest: str, disks: list[Disk]) -> None:
    """All of them are attached, or the guest does not start."""
    for disk in disks:
        async with _marks_of(host, disk.volume) as marks:
            found = await _patiently(host, disk)
            # A device of nobody's marks is an operator's: it was there before and stays after.
            if not found or any(marks.iterdir()):
                (marks / _word(guest)).write_text(f"{guest}\n")


async def _patiently(host: Host, disk: Disk) -> bool:
    """Attach; True: it was there already.  A cache or store that is away is tried again."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + TRY_AGAIN_S
    while True:
        try:
            if await attached(host.control, disk.volume) is not None:
                return True
            await attach(host.control, Entry(disk.volume, read_only=disk.read_only))
            return False
        except (CacheAway, StoreAway):
            if loop.time() + RETRY_S > deadline_s:
                raise
        await asyncio.sleep(RETRY_S)


async def _after(host: Host, guest: str, disks: list[Disk]) -> None:
    """Each is detached if this guest was the last that needed it; the first trouble is told."""
    trouble: list[CacheError] = []
    for disk in disks:
        async with _marks_of(host, disk.volume) as marks:
            mark = marks / _word(guest)
            if not mark.exists():
                continue
            mark.unlink()
            if any(marks.iterdir()):
                continue
            try:
                if await attached(host.control, disk.volume) is not None:
                    await call(host.control, "detach", volume=disk.volume)
            except CacheError as error:
                trouble.append(error)
    if trouble:
        raise trouble[0]


@contextlib.asynccontextmanager
async def _marks_of(host: Host, volume: str) -> AsyncIterator[Path]:
    """The folder of a volume's marks, locked: libvirt starts guests side by side."""
    marks = host.marks / _word(volume)
    try:
        marks.mkdir(parents=True, exist_ok=True, mode=0o755)
        descriptor = os.open(marks, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise CommandError(
            f"cannot keep marks of guests in {marks}: {reason}", exit_code=FAILED
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
