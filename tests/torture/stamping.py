"""A client that knows what every 512 bytes of its part of a disk may hold.

It keeps requests in flight over one NBD connection: writes of 1 byte to 128 KiB at any offset,
trims, zeroes, flushes, FUA and verified reads.  Overlapping requests take effect in the order in
which they were sent, so what a sector may hold after a crash is its state after some request in
flight that touches it, or after the newest acknowledged one.

Every 512 bytes of a write begin with who wrote them and his how manieth write it was, so that wrong
data tells where it comes from.

Happy path: attach(client), step() as long as one likes; lost() when the server was killed; then
attach() again and verify(), which compares every sector and takes what it found as the new truth.
Failure modes: Wrong, with the place and what was expected there.  Where errors are part of the test
(endures_errors), what a write that failed has changed is as open as after a kill.
"""

import random
import struct
from collections import deque
from dataclasses import dataclass, field

from millpond.nbd.wire import Command, CommandFlag
from nbdclient import ConnectionLost, NbdClient, Reply

SECTOR = 512
KIB = 1024
MIB = 1024 * KIB
READ_BYTES = 4 * MIB
WRITE_MAX_BYTES = 128 * KIB
STAMP = struct.Struct("<4sIQ")  # magic, who, when
STAMP_MAGIC = b"stmp"


class Wrong(AssertionError):
    """The disk shows what it may not show, or refuses what it must do."""


@dataclass(slots=True)
class Change:
    """A mutation that is not acknowledged yet."""

    sectors: range
    acknowledged: bool = False


@dataclass(slots=True)
class Look:
    """A read in flight; expected is None when something changed under it."""

    offset: int
    expected: bytes | None


@dataclass(slots=True)
class Totals:
    """What was done, for the figure."""

    writes: int = 0
    discards: int = 0
    flushes: int = 0
    reads: int = 0
    written_bytes: int = 0
    open_sectors: int = 0  # in flight at a kill: either value was legal
    errors: int = 0

    def __str__(self) -> str:
        errors = f", {self.errors} errors" if self.errors else ""
        return (
            f"{self.writes} writes ({self.written_bytes / MIB:.0f} MiB), {self.discards} trims and"
            f" zeroes, {self.flushes} flushes, {self.reads} verified reads acknowledged;"
            f" {self.open_sectors} sectors in flight at a kill{errors}"
        )


def _difference(expected: bytes, found: bytes) -> str:
    """Where they part, and whose bytes both are."""
    parts = [at for at in range(0, len(expected), SECTOR) if not _same(expected, found, at)]
    at = parts[0]
    return (
        f"{len(parts)} sectors are not what was written there, first {at}, last {parts[-1]};"
        f" expected {told_by(expected[at : at + SECTOR])}, found {told_by(found[at : at + SECTOR])}"
    )


def _same(expected: bytes, found: bytes, at: int) -> bool:
    return expected[at : at + SECTOR] == found[at : at + SECTOR]


def told_by(data: bytes | bytearray) -> str:
    """Who wrote this, and when, as far as it says so."""
    at = data.find(STAMP_MAGIC)
    if at < 0 or len(data) - at < STAMP.size:
        return "zeroes" if not any(data) else "unstamped"
    _, who, when = STAMP.unpack_from(data, at)
    return f"write {when} of client {who}"


@dataclass
class Stamper:
    """Owns the bytes [base, base + length_bytes) of the disk."""

    chance: random.Random
    base: int
    length_bytes: int
    depth: int
    totals: Totals = field(default_factory=Totals)
    who: int = 0
    endures_errors: bool = False

    def __post_init__(self) -> None:
        assert self.base % SECTOR == self.length_bytes % SECTOR == 0
        self.image = bytearray(self.length_bytes)  # after everything that was sent
        self._open: dict[int, deque[tuple[Change, bytes]]] = {}  # sector: states after the first
        self._changes: dict[int, Change] = {}  # by cookie
        self._looks: dict[int, Look] = {}
        self._flushes: set[int] = set()
        self._client: NbdClient | None = None
        self._stamp = 0

    def attach(self, client: NbdClient) -> None:
        """A new connection."""
        self._client = client

    @property
    def in_flight(self) -> int:
        """Requests without a reply."""
        return len(self._changes) + len(self._looks) + len(self._flushes)

    def step(self) -> int:
        """Fill up to depth, take a reply; returns how many replies came.  ConnectionLost."""
        assert self._client is not None
        while self.in_flight < self.depth:
            self._send_something(self._client)
        replies = self._client.arrived() or [self._client.next_reply()]
        for reply in replies:
            self._answered(reply)
        return len(replies)

    def fill_up(self) -> None:
        """Have depth requests in flight and wait for none."""
        assert self._client is not None
        while self.in_flight < self.depth:
            self._send_something(self._client)

    def finish(self) -> None:
        """Wait for everything in flight."""
        assert self._client is not None
        while self.in_flight:
            self._answered(self._client.next_reply())

    def lost(self) -> None:
        """The server is gone: replies that are here count, the rest may have happened or not."""
        assert self._client is not None
        try:
            replies = self._client.arrived()
        except ConnectionLost:
            replies = []
        for reply in replies:
            self._answered(reply)
        self._client.close()
        self._client = None
        self._looks.clear()
        self._flushes.clear()
        self.totals.open_sectors += len(self._open)

    def close(self) -> None:
        """Leave; nothing may be in flight."""
        assert self._client is not None and not self.in_flight
        self._client.close()
        self._client = None

    def verify(self) -> None:
        """Read all of it and compare; what was open is settled by what is found."""
        assert self._client is not None
        assert not self._looks and not self._flushes
        for start in range(0, self.length_bytes, READ_BYTES):
            length = min(READ_BYTES, self.length_bytes - start)
            self._compare(start, self._client.read(self.base + start, length))
        self._open.clear()
        self._changes.clear()

    # ---- requests ----

    def _send_something(self, client: NbdClient) -> None:
        dice = self.chance.randrange(100)
        if dice < 70:
            self._send_write(client)
        elif dice < 76:
            self._send_discard(client)
        elif dice < 80:
            self._flushes.add(client.submit_flush())
        else:
            self._send_read(client)

    def _place(self, longest: int) -> tuple[int, int]:
        """Somewhere: whole blocks, whole sectors, or any bytes; half of it in the first eighth."""
        chance = self.chance
        unit = chance.choice((4096, SECTOR, SECTOR, 1))
        length = chance.choice((SECTOR, 4096, chance.randrange(1, longest), longest))
        length = max(unit, length // unit * unit)
        area = self.length_bytes // 8 if chance.randrange(2) else self.length_bytes
        return chance.randrange((area - length) // unit + 1) * unit, length

    def _content(self, length: int) -> bytes:
        """Half compressible, half not; every write's differs."""
        self._stamp += 1
        stamp = STAMP.pack(STAMP_MAGIC, self.who, self._stamp)
        if not self.chance.randrange(2):
            return (stamp * (length // STAMP.size + 1))[:length]
        noise = bytearray(self.chance.randbytes(length))
        for at in range(0, length - STAMP.size + 1, SECTOR):
            noise[at : at + STAMP.size] = stamp
        return bytes(noise)

    def _send_write(self, client: NbdClient) -> None:
        offset, length = self._place(WRITE_MAX_BYTES)
        data = self._content(length)
        change = self._change(offset, data)
        fua = self.chance.randrange(16) == 0
        self._changes[client.submit_write(self.base + offset, data, fua=fua)] = change

    def _send_discard(self, client: NbdClient) -> None:
        offset, length = self._place(self.chance.choice((WRITE_MAX_BYTES, 2 * MIB)))
        command = self.chance.choice((Command.TRIM, Command.WRITE_ZEROES))
        flags = CommandFlag.FUA if self.chance.randrange(8) == 0 else 0
        change = self._change(offset, bytes(length))
        cookie = client.submit(command, self.base + offset, length, flags=flags)
        self._changes[cookie] = change

    def _change(self, offset: int, data: bytes) -> Change:
        """Apply to the image; remember each sector's state before and after."""
        end = offset + len(data)
        sectors = range(offset // SECTOR, (end - 1) // SECTOR + 1)
        change = Change(sectors)
        first = Change(sectors, acknowledged=True)
        for sector in sectors:
            if sector not in self._open:
                self._open[sector] = deque([(first, self._sector(sector))])
        self.image[offset:end] = data
        for sector in sectors:
            self._open[sector].append((change, self._sector(sector)))
        for look in self._looks.values():
            if look.expected is None or look.offset >= end:
                continue
            if offset < look.offset + len(look.expected):
                look.expected = None
        return change

    def _send_read(self, client: NbdClient) -> None:
        offset, length = self._place(WRITE_MAX_BYTES)
        sectors = range(offset // SECTOR, (offset + length - 1) // SECTOR + 1)
        settled = not any(sector in self._open for sector in sectors)
        expected = bytes(self.image[offset : offset + length]) if settled else None
        self._looks[client.submit_read(self.base + offset, length)] = Look(offset, expected)

    def _sector(self, sector: int) -> bytes:
        return bytes(self.image[sector * SECTOR : (sector + 1) * SECTOR])

    # ---- replies ----

    def _answered(self, reply: Reply) -> None:
        cookie = reply.request.cookie
        if reply.error:
            if not self.endures_errors:
                raise Wrong(f"{reply.request}: error {reply.error}")
            self.totals.errors += 1
            self._changes.pop(cookie, None)  # for ever unacknowledged
            self._looks.pop(cookie, None)
            self._flushes.discard(cookie)
            return
        if cookie in self._changes:
            self._acknowledged(self._changes.pop(cookie))
            self.totals.written_bytes += len(reply.request.payload)
            if reply.request.payload:
                self.totals.writes += 1
            else:
                self.totals.discards += 1
        elif cookie in self._looks:
            look = self._looks.pop(cookie)
            self.totals.reads += look.expected is not None
            if look.expected is not None and look.expected != reply.data:
                raise Wrong(f"{reply.request}: {_difference(look.expected, reply.data)}")
        else:
            self._flushes.remove(cookie)
            self.totals.flushes += 1

    def _acknowledged(self, change: Change) -> None:
        """States older than this one are impossible now."""
        change.acknowledged = True
        for sector in change.sectors:
            states = self._open.get(sector)
            if states is None:
                continue  # a later one was answered first: this one waited for its sync
            while any(later.acknowledged for later, _ in list(states)[1:]):
                states.popleft()
            if len(states) == 1:
                del self._open[sector]

    def _compare(self, start: int, found: bytes) -> None:
        """Settled sectors must be as they are; open ones may be in any of their states."""
        expected = bytearray(self.image[start : start + len(found)])
        first, end = start // SECTOR, (start + len(found)) // SECTOR
        for sector in [sector for sector in self._open if first <= sector < end]:
            at = sector * SECTOR - start
            shown = found[at : at + SECTOR]
            if shown not in [state for _, state in self._open[sector]]:
                raise Wrong(
                    f"byte {self.base + sector * SECTOR}: none of the {len(self._open[sector])}"
                    f" values that are possible; found {shown[:32].hex()}... ({told_by(shown)})"
                )
            expected[at : at + SECTOR] = shown
        if expected != found:
            at = next(at for at in range(len(found)) if expected[at] != found[at])
            raise Wrong(
                f"byte {self.base + start + at}: acknowledged {expected[at : at + 16].hex()}"
                f" ({told_by(expected[at : at + SECTOR])}), found {found[at : at + 16].hex()}"
                f" ({told_by(found[at : at + SECTOR])})"
            )
        self.image[start : start + len(found)] = found
