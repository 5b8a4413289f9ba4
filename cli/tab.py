"""/etc/millpond/tab: which volumes this host attaches at boot, and how.

One line per volume, `NAME OPTIONS`, as in crypttab(5): blanks between the two, commas between
options, `-` or nothing for none, `#` before a comment that has a line of its own.  A name with a
blank, a tab, a backslash or a leading # writes it as in fstab(5): \\040, \\011, \\134, \\043.

Rules: only the file is looked at, not the machine; an option that is not known is refused with the
closest that is; the first problem is reported, as FILE:LINE: what is wrong.
Failure modes: CommandError with exit code 2; OSError when the file cannot be read.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from millpond.cli.output import parse_duration_s
from millpond.cli.run import USAGE, CommandError
from millpond.store.catalogue import check_name
from millpond.store.errors import StoreError, one_line

TAB_FILE: Final = "/etc/millpond/tab"
TAB_BYTES_MAX: Final = 1 << 20
# A store that boots beside us and recovers: as long as systemd gives it, and fstab a mount of ours.
TIMEOUT_S: Final = 600.0
_BLANKS: Final = re.compile(r"[ \t\r]")  # not split(): a name may hold other blanks of Unicode
_ESCAPE: Final = re.compile(r"\\([0-7]{3})")
_DEVICE: Final = re.compile(r"/dev/nbd[0-9]{1,5}")


@dataclass(frozen=True, slots=True)
class Entry:
    """One volume of the tab; device None: the first that is free."""

    volume: str
    read_only: bool = False
    device: str | None = None
    nofail: bool = False
    noauto: bool = False
    timeout_s: float = TIMEOUT_S


def load(path: str) -> list[Entry]:
    """The entries of a file, in its order."""
    with open(path, "rb") as file:
        data = file.read(TAB_BYTES_MAX + 1)
    if len(data) > TAB_BYTES_MAX:
        raise _problem(path, 0, f"longer than {TAB_BYTES_MAX} bytes: no tab of volumes")
    try:
        return parse(data.decode(), path)
    except UnicodeDecodeError:
        raise _problem(path, 0, "not UTF-8 text") from None


def parse(text: str, path: str) -> list[Entry]:
    """The entries of a text; path is for messages."""
    entries: list[Entry] = []
    lines_of: dict[str, int] = {}
    # Not splitlines(): it knows ends of lines that a name may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        words = [word for word in _BLANKS.split(line) if word]
        if not words or words[0].startswith("#"):
            continue
        try:
            entry = _entry(*words)
        except (ValueError, StoreError) as error:
            raise _problem(path, number, str(error)) from None
        for what in filter(None, (f"volume {entry.volume!r}", entry.device)):
            first = lines_of.setdefault(what, number)
            if first != number:
                raise _problem(path, number, f"{what} is in line {first} already")
        entries.append(entry)
    return entries


def _entry(name: str, *rest: str) -> Entry:
    """One line; ValueError or StoreError says what is wrong with it."""
    if len(rest) > 1:
        raise ValueError(f"{rest[1]!r} is too much: a line is NAME OPTIONS, a blank is \\040")
    entry = Entry(_ESCAPE.sub(lambda found: chr(int(found[1], 8)), name))
    check_name(entry.volume)
    if not rest or rest[0] == "-":
        return entry
    seen: set[str] = set()
    for option in rest[0].split(","):
        key, equals, value = option.partition("=")
        if key not in _OPTIONS:
            raise ValueError(_unknown(option))
        if key in seen:
            raise ValueError(f"option {key!r} twice")
        seen.add(key)
        entry = _OPTIONS[key](entry, value if equals else None)
    return entry


def _unknown(option: str) -> str:
    close = difflib.get_close_matches(option.partition("=")[0], _OPTIONS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(_OPTIONS)}"
    return f"unknown option {option!r}; {hint}"


def _flag(name: str, field: str) -> Callable[[Entry, str | None], Entry]:
    def switch_on(entry: Entry, value: str | None) -> Entry:
        if value is not None:
            raise ValueError(f"option {name!r} takes no value")
        return replace(entry, **{field: True})  # type: ignore[arg-type]  # a bool, by its name

    return switch_on


def _device(entry: Entry, value: str | None) -> Entry:
    if value is None or not _DEVICE.fullmatch(value):
        raise ValueError("option 'device' is written like device=/dev/nbd5")
    return replace(entry, device=value)


def _timeout(entry: Entry, value: str | None) -> Entry:
    try:
        return replace(entry, timeout_s=parse_duration_s(value or ""))
    except CommandError:
        raise ValueError("option 'timeout' is written like timeout=30s") from None


_OPTIONS: Final[dict[str, Callable[[Entry, str | None], Entry]]] = {
    "read-only": _flag("read-only", "read_only"),
    "device": _device,
    "nofail": _flag("nofail", "nofail"),
    "noauto": _flag("noauto", "noauto"),
    "timeout": _timeout,
}


def _problem(path: str, line: int, message: str) -> CommandError:
    place = f"{path}:{line}" if line else path
    return CommandError(one_line(f"{place}: {message}"), exit_code=USAGE)
