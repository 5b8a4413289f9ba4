"""`millpond device`: volumes as disks of guests."""

import typer

from millpond.cli import devicexml

app = typer.Typer(
    name="device",
    help="Volumes as block devices and as disks of guests.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def register(parent: typer.Typer) -> None:
    """Add the noun to the command tree."""
    devicexml.register(app)
    parent.add_typer(app)


@app.callback()
def device() -> None:
    """Volumes as block devices and as disks of guests."""
