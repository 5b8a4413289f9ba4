"""Samples and the reference, made from the classes of configtypes.py and from nothing else."""

import inspect
import json
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec

from millpond.cli.configtypes import FILES, Duration, Mode, Rate, Size
from millpond.cli.output import format_size

WIDTH = 96
KINDS = {
    Size: 'size, like "400GiB"',
    Rate: 'bytes per second, like "50MiB"',
    Duration: 'duration, like "30s"',
    Mode: 'permissions, like "0660"',
    str: "text",
    bool: "true or false",
    list[str]: "list of texts",
}


class Key:
    """One key of a table, as documentation shows it."""

    def __init__(self, field: msgspec.structs.FieldInfo, hint: Any) -> None:
        inner, meta = get_args(hint)
        kinds = [kind for kind in get_args(inner) if kind is not type(None)]
        kind = inner if inner in KINDS else (kinds[0] if kinds else inner)
        self.name = field.name
        self.required = field.required
        self.kind = KINDS.get(kind) or " or ".join(_toml(str(choice)) for choice in kind)
        self.description: str = meta.description
        self.example = _toml(meta.examples[0])
        default = None if field.required else field.default
        if default is msgspec.NODEFAULT:
            default = field.default_factory()
        self.default = "not set" if default is None else _toml(_written(default))


def keys_of(table: type[msgspec.Struct]) -> list[Key]:
    """The keys of a table, in order."""
    hints = get_type_hints(table, include_extras=True)
    return [Key(field, hints[field.name]) for field in msgspec.structs.fields(table)]


def tables_of(kind: str) -> Iterator[tuple[str, type[msgspec.Struct]]]:
    """(heading, class) of every table of a file."""
    for name, hint in get_type_hints(FILES[kind], include_extras=True).items():
        assert get_origin(hint) is not Annotated, "a file holds tables only"
        if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
            yield name, hint
        else:
            yield f"{name}.NAME", get_args(hint)[1]


def sample(kind: str) -> str:
    """A commented file: what is required is set, everything else shows what it could be."""
    lines = [f"# Millpond: {_doc(FILES[kind]).rstrip('.').replace('`', '')}."]
    lines.append(f"# Check it with: millpond config check {kind}.toml")
    for heading, table in tables_of(kind):
        needed = any(key.required for key in keys_of(table))
        lines += ["", *_comment(_about(heading, table))]
        if heading.endswith(".NAME"):
            lines += ["# [volume.web1]", '# average_rate = "10MiB"']
            continue
        lines.append(f"[{heading}]")
        for key in keys_of(table):
            lines += _comment(f"{key.description} {_default(key)}".strip())
            is_set = needed and key.required
            lines.append(f"{'' if is_set else '# '}{key.name} = {key.example}")
    return "\n".join(lines) + "\n"


def reference() -> str:
    """The page cli/CONFIGURATION.md."""
    lines = [
        "# Configuration",
        "",
        "Made by `millpond config reference` from `cli/configtypes.py`; a test compares them.",
        "`millpond config sample cache|store` prints a file to start with, `millpond config check"
        " FILE` finds mistakes. Options of the command line win over the file. Sizes are binary:"
        " `20G` and `20GiB` are the same, `20GB` is decimal.",
    ]
    for kind in FILES:
        lines += ["", f"## {_doc(FILES[kind]).rstrip('.')}"]
        for heading, table in tables_of(kind):
            lines += ["", f"### [{heading}]", "", _about(heading, table), ""]
            lines += ["| key | value | default | what |", "|---|---|---|---|"]
            lines += [
                f"| `{key.name}` | {key.kind.replace('|', '/')}"
                f" | {'required' if key.required else _code(key.default)} | {key.description} |"
                for key in keys_of(table)
            ]
    return "\n".join(lines) + "\n"


def _written(default: Any) -> Any:
    """As a person writes it."""
    if isinstance(default, Mode):
        return f"{default:04o}"
    if isinstance(default, Size | Rate):
        return f"{format_size(default)}iB"
    if isinstance(default, Duration):
        return f"{default / 86400:g}d"
    return default


def _about(heading: str, table: type[msgspec.Struct]) -> str:
    if heading == "defaults":
        return "Of every volume that has no table of its own. " + _doc(table)
    if heading.endswith(".NAME"):
        return (
            "Of the volume of this name: what differs from [defaults]. After `volume rename` it has"
            " to be renamed here, too."
        )
    return _doc(table)


def _default(key: Key) -> str:
    return "" if key.required else f"Default: {key.default}."


def _doc(kind: type) -> str:
    return " ".join((inspect.getdoc(kind) or "").split())


def _code(text: str) -> str:
    return text if text == "not set" else f"`{text}`"


def _toml(value: Any) -> str:
    """A value as TOML writes it; JSON's strings, lists and booleans are TOML's."""
    return json.dumps(str(value) if isinstance(value, str) else value)


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, WIDTH)]
