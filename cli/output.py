"""What commands print: tables for people, JSON for programs, progress only for a terminal.

Rules: data to stdout, everything else to stderr. JSON keys are snake_case, sizes are bytes as
integers, additive only. Sizes are read and written with binary units (20GiB); GB is decimal.
"""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from millpond.cli.run import USAGE, CommandError
from millpond.store.errors import one_line

UNITS = "KMGTPE"
SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGTPE]?)(I?B?)\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes in '20GiB', '20G' (both binary), '20GB' (decimal), '1.5TiB' or '4096'."""
    match = SIZE.fullmatch(text)
    if match is None:
        raise CommandError(f"{text!r} is no size; write it like 20GiB", exit_code=USAGE)
    number, unit, suffix = match.groups()
    base = 1000 if unit and suffix.upper() == "B" else 1024
    scale = base ** (UNITS.index(unit.upper()) + 1) if unit else 1
    whole, _, fraction = number.partition(".")
    numerator = int(whole + fraction) * scale
    if suffix.upper() in ("I", "IB") and not unit or numerator % 10 ** len(fraction):
        raise CommandError(f"{text!r} is no whole number of bytes", exit_code=USAGE)
    return int(numerator // 10 ** len(fraction))


DURATIONS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
DURATION = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s|min|m|h|d)\s*", re.IGNORECASE)


def parse_duration_s(text: str) -> float:
    """Seconds in '30s', '500ms', '5min' (or '5m'), '2h', '1d'."""
    match = DURATION.fullmatch(text)
    if match is None:
        raise CommandError(f"{text!r} is no duration; write it like 30s", exit_code=USAGE)
    return float(match[1]) * DURATIONS_S[match[2].lower()]


def format_size(size_bytes: int) -> str:
    """A size for people, binary units: 0, 4K, 1.5G, 20G."""
    value, unit = float(size_bytes), ""
    for name in UNITS:
        if value < 1024:
            break
        value, unit = value / 1024, name
    return f"{value:.1f}".removesuffix(".0") + unit


def print_json(value: Any) -> None:
    """One JSON document, indented: stable for programs, readable for people."""
    text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """A remark for people: stdout is for data."""
    print(f"millpond: {one_line(text)}", file=sys.stderr)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table; the first column is the name, numbers are right-aligned."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for index, column in enumerate(columns):
        right = bool(rows) and all(re.fullmatch(r"[0-9.]+[KMGTPE]?|-", row[index]) for row in rows)
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(one_line(cell) for cell in row))
    console().print(table)


def print_fields(fields: dict[str, str]) -> None:
    """One thing, a field per line."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(no_wrap=True)
    for name, value in fields.items():
        table.add_row(name, one_line(value))
    console().print(table)


def console() -> Console:
    """The console for data: when it is not a terminal, wide enough never to cut a cell."""
    wide = None if sys.stdout.isatty() else 400
    return Console(highlight=False, markup=False, emoji=False, width=wide, soft_wrap=True)


@contextmanager
def progress(label: str, *, enabled: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A callback (done_bytes, total_bytes) that draws a bar on a terminal and else does nothing."""
    if not enabled or not sys.stderr.isatty():
        yield lambda done_bytes, total_bytes: None
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True, highlight=False, markup=False),
    )
    with bar:
        task = bar.add_task(one_line(label), total=None)

        def update(done_bytes: int, total_bytes: int) -> None:
            bar.update(task, completed=done_bytes, total=total_bytes)

        yield update
