"""`millpond version`: the package, and every format it writes."""

import os
import platform
from typing import Annotated, Any

import typer

from millpond.cli.output import print_json
from millpond.native import lib
from millpond.store.daemon import own_version


def register(parent: typer.Typer) -> None:
    """Add the command."""
    parent.command("version")(version)


def version(
    json: Annotated[bool, typer.Option("--json", help="JSON instead of lines")] = False,
) -> None:
    """Print the versions of the package and of its formats on disk and wire."""
    found = versions()
    if json:
        print_json(found)
        return
    formats = found["formats"]
    print(f"millpond {found['millpond']}")
    print(f"format on disk {formats['disk']}, on the wire {formats['wire']}")
    print(f"Python {found['python']}, Linux {found['kernel']}")


def versions() -> dict[str, Any]:
    """What is running here."""
    return {
        "millpond": own_version(),
        "formats": {"disk": int(lib.MP_FORMAT_VERSION), "wire": int(lib.MP_WIRE_VERSION)},
        "python": platform.python_version(),
        "kernel": os.uname().release,
    }
