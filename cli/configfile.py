"""Read a configuration file: TOML in, checked values out.

Rules: an unknown key is refused with the closest known one; the first problem is reported, as
`FILE: table.key: what is wrong`.  A [volume.NAME] table says what differs from [defaults].  Only
the file is looked at, not the machine: a device that is missing is the daemon's error.

Failure modes: CommandError with exit code 2 (or 3 and 13 when the file cannot be read).
"""

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args

import msgspec

from millpond.cache.scrub import check_rate
from millpond.cache.settings import VolumeSettings
from millpond.cache.shaping import RateLimits
from millpond.cli.configtypes import (
    FILES,
    CacheFile,
    Duration,
    Mode,
    Rate,
    Size,
    StoreFile,
    VolumeTable,
)
from millpond.cli.output import parse_duration_s, parse_size
from millpond.cli.run import USAGE, CommandError
from millpond.store.address import check_exposure, parse_address
from millpond.store.catalogue import check_name
from millpond.store.errors import StoreError, one_line

F = TypeVar("F", CacheFile, StoreFile)
FILE_BYTES_MAX = 4 << 20


def load(path: str, kind: type[F]) -> F:
    """The file at path, checked; CommandError says where and what."""
    return parse(read(path), kind, path)


def load_any(path: str) -> CacheFile | StoreFile:
    """The same for a file of either kind: the [cache] or [store] table tells which."""
    text = read(path)
    tables = _toml(text, path)
    kinds = [name for name in FILES if name in tables]
    if len(kinds) != 1:
        raise _problem(path, "", "a cache's file has a [cache] table, a store's a [store] table")
    if kinds[0] == "cache":
        return parse(text, CacheFile, path)
    return parse(text, StoreFile, path)


def read(path: str) -> str:
    """Its text; OSError names the file."""
    with open(path, "rb") as file:
        data = file.read(FILE_BYTES_MAX + 1)
    if len(data) > FILE_BYTES_MAX:
        raise _problem(path, "", f"longer than {FILE_BYTES_MAX} bytes: no configuration")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise _problem(path, "", "not UTF-8 text") from None


def parse(text: str, kind: type[F], path: str) -> F:
    """Checked values of a text; path is for messages."""
    tables = _with_defaults(_toml(text, path))
    for where, message in _unknown_keys(tables, kind, ""):
        raise _problem(path, where, message)
    try:
        file = msgspec.convert(tables, kind, dec_hook=_value)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$")
        where = where.rstrip("`").lstrip(".")
        missing = re.fullmatch(r"Object missing required field `(\w+)`", message)
        if missing:
            raise _problem(path, where, f"{missing[1]!r} is missing") from None
        raise _problem(path, where, message[:1].lower() + message[1:]) from None
    for where, check in _checks(file):
        try:
            check()
        except (ValueError, StoreError) as error:
            raise _problem(path, where, str(error)) from None
    return file


def settings_of(table: VolumeTable) -> VolumeSettings:
    """As the cache has it; ValueError when it contradicts itself."""
    rates = rates_of(table.average_rate, table.peak_rate)
    return VolumeSettings(
        log_min_bytes=plain(table.log_min),
        log_max_bytes=plain(table.log_max),
        slots_min_bytes=plain(table.slots_min),
        slots_max_bytes=plain(table.slots_max),
        average_bytes_per_s=rates.average_bytes_per_s,
        peak_bytes_per_s=rates.peak_bytes_per_s,
        bound_s=float(table.bound_s) if table.bound_s is not None else None,
        bound=table.bound,
    )


def rates_of(average: Rate | None, peak: Rate | None) -> RateLimits:
    """As the cache has them; ValueError when they contradict each other."""
    return RateLimits(plain(average), plain(peak))


def plain(value: int | None) -> int | None:
    """Nothing but the reader of the file knows sizes and rates from other numbers."""
    return int(value) if value is not None else None


def volumes_of(file: CacheFile) -> dict[str, VolumeSettings]:
    """Every volume that the file names."""
    return {name: settings_of(table) for name, table in file.volume.items()}


def _toml(text: str, path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise _problem(path, "", f"not TOML: {error}") from None


def _with_defaults(tables: dict[str, Any]) -> dict[str, Any]:
    """[volume.NAME] says what differs from [defaults]."""
    defaults, volumes = tables.get("defaults", {}), tables.get("volume", {})
    if not isinstance(defaults, dict) or not isinstance(volumes, dict):
        return tables  # convert says what is wrong
    merged = {
        name: {**defaults, **table} if isinstance(table, dict) else table
        for name, table in volumes.items()
    }
    return {**tables, "volume": merged} if volumes else tables


def _unknown_keys(
    value: Mapping[str, Any], kind: type[msgspec.Struct], where: str
) -> Iterator[tuple[str, str]]:
    """(where, message) of every key that the struct does not have, depth first in file order."""
    known = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for name, inner in value.items():
        place = f"{where}.{name}" if where else name
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            yield place, f"unknown key; {hint}"
        elif isinstance(inner, dict):
            yield from _unknown_inside(inner, known[name], place)


def _unknown_inside(value: Mapping[str, Any], kind: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        yield from _unknown_keys(value, kind, where)
    elif get_args(kind):
        for name, table in value.items():
            if isinstance(table, dict):
                yield from _unknown_keys(table, get_args(kind)[1], f"{where}.{name}")


def _value(kind: type, value: Any) -> Any:
    """Sizes, rates, durations and modes from what a person wrote."""
    try:
        if kind is Mode:
            return _mode(value)
        if kind is Duration:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            return Duration(value if is_number else parse_duration_s(_text(value)))
        if kind in (Size, Rate):
            text = _text(value)
            return kind(parse_size(text.removesuffix("/s") if kind is Rate else text))
    except CommandError as error:
        raise ValueError(str(error)) from None
    raise NotImplementedError(kind)


def _mode(value: Any) -> Mode:
    if not isinstance(value, str) or not re.fullmatch(r"0?[0-7]{3}", value):
        raise ValueError('permissions are written like "0660"')
    return Mode(int(value, 8))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError('write it with its unit, in quotes, like "20MiB" or "30s"')
    return value


def _checks(file: CacheFile | StoreFile) -> Iterator[tuple[str, Any]]:
    """(where, what may raise) of all that types cannot say."""
    if isinstance(file, StoreFile):
        for text in file.store.listen:
            yield (
                "store.listen",
                lambda text=text: check_exposure(
                    parse_address(text), insecure_listen=file.store.insecure_listen
                ),
            )
        return
    for text in file.cache.stores:
        yield "cache.stores", lambda text=text: parse_address(text)
    yield "cache.stores", lambda: _not_empty(file.cache.stores)
    yield "cache.scrub_rate", lambda: check_rate(file.cache.scrub_rate)
    if (tcp := file.nbd.tcp) is not None:
        yield (
            "nbd.tcp",
            lambda: check_exposure(parse_address(tcp), insecure_listen=file.nbd.insecure_listen),
        )
    yield "rates", lambda: rates_of(file.rates.average, file.rates.peak)
    yield "defaults", lambda: settings_of(file.defaults)
    for name, table in file.volume.items():
        yield f"volume.{name}", lambda name=name: check_name(name)
        yield f"volume.{name}", lambda table=table: settings_of(table)


def _not_empty(stores: list[str]) -> None:
    if not stores:
        raise ValueError("give at least one store")


def _problem(path: str, where: str, message: str) -> CommandError:
    place = f"{where}: " if where else ""
    return CommandError(one_line(f"{path}: {place}{message}"), exit_code=USAGE)
