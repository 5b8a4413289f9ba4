"""`millpond map` and `unmap`: the volumes of /etc/millpond/tab, attached and detached.

Rules: both can be repeated; what is as it should be is left as it is.  `unmap --all` leaves alone
what the tab does not name.  Each volume has its own time and its own line when it fails; the others
go on.  What may pass (no cache at the socket yet, a store that is away, the same under way already)
is tried again until the volume's time is over; what will not pass by waiting fails at once.

Failure modes: one line per volume; exit code of them all, or 1 when they differ.  `nofail` of the
tab: the line comes, the exit code does not.
"""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Final

import typer

from millpond.cache.control import call
from millpond.cache.errors import CacheAway, CacheError, StoreAway, UnderWay, VolumeBusy
from millpond.cli.foreground import expected_errors
from millpond.cli.output import note, parse_duration_s, print_json, print_table
from millpond.cli.run import (
    EXISTS,
    FAILED,
    NOT_FOUND,
    OK,
    USAGE,
    CommandError,
    complain,
    exit_code_of,
    message_of,
    run,
)
from millpond.cli.status import CONTROL_SOCKET
from millpond.cli.tab import TAB_FILE, Entry, load

# To find a volume and to open it takes 40 s at most (cache/limits.py), then the kernel connects it.
ANSWER_S: Final = 60.0
RETRY_S: Final = 0.5
PATIENCE_S: Final = 5.0  # of people: then they hear what is waited for
AT_A_TIME: Final = 8  # a control socket has 32 connections, others ask it too
UNMAP_TIMEOUT_S: Final = 15.0
COLUMNS: Final = ("volume", "device", "link")

NamesArgument = Annotated[
    list[str] | None, typer.Argument(help="of volumes", metavar="[NAME]...", show_default=False)
]
TabOption = Annotated[str, typer.Option("--tab", help="instead of the usual", metavar="FILE")]
HostControlOption = Annotated[
    str,
    typer.Option(
        "--control", envvar="MILLPOND_CONTROL", help="control socket of the cache", metavar="SOCKET"
    ),
]
TimeoutOption = Annotated[
    str | None, typer.Option("--timeout", help="for each, instead of what the tab says, like 30s")
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON instead of a table")]


def register(parent: typer.Typer) -> None:
    """Add the commands."""
    parent.command("map")(map_volumes)
    parent.command("unmap")(unmap_volumes)


def map_volumes(
    names: NamesArgument = None,
    everything: Annotated[bool, typer.Option("--all", help="all but noauto")] = False,
    tab: TabOption = TAB_FILE,
    control: HostControlOption = CONTROL_SOCKET,
    timeout: TimeoutOption = None,
    json: JsonOption = False,
) -> int:
    """Attach volumes of /etc/millpond/tab as block devices."""
    every = load(tab)
    automatic = [entry for entry in every if not entry.noauto]
    entries = _chosen(names, everything, automatic, lambda name: _named(every, name, tab))
    limit_s = parse_duration_s(timeout) if timeout is not None else None
    return _carry_out(entries, partial(ensure_attached, control), AWAY, limit_s, json=json)


def unmap_volumes(
    names: NamesArgument = None,
    everything: Annotated[bool, typer.Option("--all", help="that the tab names")] = False,
    tab: TabOption = TAB_FILE,
    control: HostControlOption = CONTROL_SOCKET,
    timeout: TimeoutOption = None,
    json: JsonOption = False,
) -> int:
    """Detach volumes: those named, also when the tab has them not, or all of the tab."""
    every = load(tab) if everything else []
    anywhere = [replace(each, device=None) for each in every]  # on whatever device it is
    entries = _chosen(names, everything, anywhere, Entry)
    limit_s = parse_duration_s(timeout) if timeout is not None else UNMAP_TIMEOUT_S
    return _carry_out(entries, partial(ensure_detached, control), IN_USE, limit_s, json=json)


async def attach_new(control: str, entry: Entry) -> dict[str, Any]:
    """One attempt; the device as the cache describes it.  CacheError; AlreadyThere among them."""
    wanted = {"volume": entry.volume, "device": entry.device or "", "read_only": entry.read_only}
    return await call(control, "attach", timeout_s=ANSWER_S, **wanted)


async def ensure_attached(control: str, entry: Entry) -> dict[str, Any]:
    """One attempt, unless it is attached.  CacheError, or CommandError when it is, but not as
    wanted."""
    found = await attached(control, entry.volume)
    if found is None:
        try:
            return await attach_new(control, entry)
        except CacheError:
            # Somebody else was faster, or the answer to an attempt before this one was lost.
            found = await attached(control, entry.volume)
            if found is None:
                raise
    if entry.device not in (None, found["device"]):
        raise _otherwise(entry, found, f"not as {entry.device}")
    # The other way round is no contradiction: all of a cache may be read-only.
    if entry.read_only and not found["read_only"]:
        raise _otherwise(entry, found, "for writing, not read-only")
    return found


async def ensure_detached(control: str, entry: Entry) -> dict[str, Any]:
    """One attempt; what is not attached is done."""
    if await attached(control, entry.volume) is not None:
        await call(control, "detach", timeout_s=ANSWER_S, volume=entry.volume)
    return {"volume": entry.volume, "device": None, "link": None}


async def attached(control: str, volume: str) -> dict[str, Any] | None:
    """The device of a volume, by name or id, as the cache has it; None when it has none."""
    devices: list[dict[str, Any]] = (await call(control, "devices"))["devices"]
    return next((each for each in devices if volume in (each["volume"], each["id"])), None)


@dataclass(frozen=True, slots=True)
class Done:
    """How it went with one volume: what holds COLUMNS, or why not."""

    entry: Entry
    row: dict[str, Any] | None
    error: Exception | None = None


Attempt = Callable[[Entry], Awaitable[dict[str, Any]]]
Passing = tuple[type[CacheError], ...]
AWAY: Final[Passing] = (CacheAway, StoreAway, UnderWay)
# After umount, udev looks at a device once more.
IN_USE: Final[Passing] = (CacheAway, StoreAway, VolumeBusy)


def _chosen(
    names: list[str] | None, everything: bool, every: list[Entry], named: Callable[[str], Entry]
) -> list[Entry]:
    """What the command line names, each once."""
    if bool(names) == everything:
        which = "NAME or --all, not both" if everything else "NAME, or --all"
        raise CommandError(f"give {which}", exit_code=USAGE)
    return [named(name) for name in dict.fromkeys(names)] if names else every


def _carry_out(
    entries: Sequence[Entry],
    attempt: Attempt,
    passing: Passing,
    limit_s: float | None,
    *,
    json: bool,
) -> int:
    """Do it and say how it went; the exit code.  limit_s: for each, None: what its entry says."""
    return _report(run(_each(entries, attempt, passing, limit_s)), json=json)


class _Turns:
    """So many at a time; those that name their device have tried once before the others begin.

    The others take the first that is free, which could be one of the named.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._places = asyncio.Semaphore(AT_A_TIME)
        self._tried = {each.volume: asyncio.Event() for each in entries if each.device is not None}

    @contextlib.asynccontextmanager
    async def of(self, entry: Entry) -> AsyncIterator[None]:
        """One attempt."""
        tried = self._tried.get(entry.volume)
        if tried is None:
            await asyncio.gather(*(each.wait() for each in self._tried.values()))
        try:
            async with self._places:
                yield
        finally:
            if tried is not None:
                tried.set()


async def _each(
    entries: Sequence[Entry], attempt: Attempt, passing: Passing, limit_s: float | None
) -> list[Done]:
    """All of them, side by side: one whose store is away holds up no other."""
    turns = _Turns(entries)
    times = (entry.timeout_s if limit_s is None else limit_s for entry in entries)
    return await asyncio.gather(
        *(
            _one(entry, attempt, passing, time_s, turns)
            for entry, time_s in zip(entries, times, strict=True)
        )
    )


async def _one(
    entry: Entry, attempt: Attempt, passing: Passing, limit_s: float, turns: _Turns
) -> Done:
    async def in_turn(entry: Entry) -> dict[str, Any]:
        async with turns.of(entry):
            return await attempt(entry)

    def tell(error: CacheError, left_s: float) -> None:
        note(f"{_line(entry, error)}; trying again for {left_s:.0f} s")

    try:
        return Done(entry, await persist(entry, in_turn, passing, limit_s, tell=tell))
    except (CacheError, CommandError) as error:
        return Done(entry, None, error)


async def persist(
    entry: Entry,
    attempt: Attempt,
    passing: Passing,
    limit_s: float,
    *,
    tell: Callable[[CacheError, float], None] = lambda error, left_s: None,
) -> dict[str, Any]:
    """Attempts until one is done or fails for good; CacheError, CommandError.

    tell: once, what is waited for and for how many seconds, when that is longer than people like.
    """
    loop = asyncio.get_running_loop()
    begin_s, told = loop.time(), False
    while True:
        try:
            return await attempt(entry)
        except passing as error:
            waited_s = loop.time() - begin_s
            if waited_s + RETRY_S > limit_s:
                raise
            if waited_s >= PATIENCE_S and not told:
                told = True
                tell(error, limit_s - waited_s)
        await asyncio.sleep(RETRY_S)


def _report(done: Sequence[Done], *, json: bool) -> int:
    """Rows of what is as it should be, lines of what is not, and the exit code."""
    rows = [{key: each.row[key] for key in COLUMNS} for each in done if each.row is not None]
    if json:
        print_json(rows)
    elif mapped := [row for row in rows if row["device"] is not None]:
        print_table(COLUMNS, [tuple(str(row[key]) for key in COLUMNS) for row in mapped])
    sys.stdout.flush()
    codes = [_complain(each.entry, each.error) for each in done if each.error is not None]
    failed = {code for code in codes if code != OK}
    return failed.pop() if len(failed) == 1 else FAILED if failed else OK


def _complain(entry: Entry, error: Exception) -> int:
    """The one line; OK when the tab says that this is no failure."""
    named = _line(entry, error)
    if entry.nofail:
        note(f"{named} (nofail)")
        return OK
    return complain(CommandError(named, exit_code=_code_of(error)))


def _line(entry: Entry, error: Exception) -> str:
    named = message_of(error)
    return named if entry.volume in named else f"volume {entry.volume!r}: {named}"


def _code_of(error: Exception) -> int:
    try:
        with expected_errors():
            raise error
    except CommandError as known:
        return exit_code_of(known)


def _named(entries: Sequence[Entry], name: str, tab: str) -> Entry:
    for entry in entries:
        if entry.volume == name:
            return entry
    raise CommandError(
        f"volume {name!r} is not in {tab}; add it there, or use `millpond attach`",
        exit_code=NOT_FOUND,
    )


def _otherwise(entry: Entry, found: dict[str, Any], how: str) -> CommandError:
    return CommandError(
        f"volume {entry.volume!r} is attached already as {found['device']}, {how}; detach it first",
        exit_code=EXISTS,
    )
