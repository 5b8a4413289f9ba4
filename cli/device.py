"""`millpond attach`, `detach` and `device`: volumes as kernel block devices of this host.

The running cache does it; these commands ask it over its control socket.  `attach` prints the path
of the device and nothing else.
"""

from typing import Annotated

import typer

from millpond.cache.control import call
from millpond.cache.errors import VolumeUnknown
from millpond.cli import devicexml
from millpond.cli.foreground import expected_errors
from millpond.cli.map import ANSWER_S, attach_new, ensure_attached
from millpond.cli.output import format_size, print_json, print_table
from millpond.cli.run import run
from millpond.cli.status import CacheDirOption, ControlOption, JsonOption, ask, control_path
from millpond.cli.tab import Entry
from millpond.nbd.sysfs import index_of

app = typer.Typer(
    name="device",
    help="Volumes as block devices of this host, and as disks of guests.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def register(parent: typer.Typer) -> None:
    """Add the commands."""
    parent.command("attach")(attach)
    parent.command("detach")(detach)
    devicexml.register(app)
    parent.add_typer(app)


@app.callback()
def device() -> None:
    """Volumes as block devices of this host, and as disks of guests."""


def attach(
    volume: Annotated[str, typer.Argument(help="name of the volume", metavar="VOLUME")],
    device: Annotated[
        str | None,
        typer.Option("--device", help="this one; any unused one", metavar="/dev/nbdN"),
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="nobody may write")] = False,
    exist_ok: Annotated[
        bool, typer.Option("--exist-ok", help="no error if it is attached")
    ] = False,
    directory: CacheDirOption = None,
    control: ControlOption = None,
    json: JsonOption = False,
) -> None:
    """Make a volume a block device of this host; prints its path."""
    index = index_of(device) if device is not None else None
    entry = Entry(volume, read_only, device if index is None else f"/dev/nbd{index}")
    path = control_path(directory, control)
    with expected_errors():
        made = run((ensure_attached if exist_ok else attach_new)(path, entry))
    if json:
        print_json(made)
    else:
        print(made["device"])


def detach(
    target: Annotated[
        str, typer.Argument(help="a volume, or a device's path", metavar="VOLUME|/dev/nbdN")
    ],
    force: Annotated[
        bool,
        typer.Option("--force", help="even if in use: who uses it gets errors, writes are lost"),
    ] = False,
    missing_ok: Annotated[
        bool, typer.Option("--missing-ok", help="no error if it is not attached")
    ] = False,
    directory: CacheDirOption = None,
    control: ControlOption = None,
) -> None:
    """Take a block device away again; refused while it is mounted or open."""
    path = control_path(directory, control)
    with expected_errors():
        try:
            run(call(path, "detach", timeout_s=ANSWER_S, volume=target, force=force))
        except VolumeUnknown:
            if not missing_ok:
                raise


@app.command("list")
def list_devices(
    directory: CacheDirOption = None, control: ControlOption = None, json: JsonOption = False
) -> None:
    """List the devices of a running cache."""
    devices = ask(directory, control, "devices")["devices"]
    if json:
        print_json(devices)
        return
    rows = [
        [
            each["device"],
            each["volume"],
            format_size(each["size_bytes"]),
            "read-only" if each["read_only"] else "writable",
            "served" if each["served"] else f"WAITS: {each['problem'] or 'not served yet'}",
        ]
        for each in devices
    ]
    print_table(["DEVICE", "VOLUME", "SIZE", "MODE", "STATE"], rows)
