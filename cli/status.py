"""`millpond status`: what a running cache says about itself."""

import os
from typing import Annotated, Any

import typer

from millpond.cache.control import call
from millpond.cli.foreground import expected_errors
from millpond.cli.output import format_size, print_fields, print_json, print_table
from millpond.cli.run import USAGE, CommandError, run


def register(parent: typer.Typer) -> None:
    """Add the command."""
    parent.command("status")(status)


def status(
    directory: Annotated[
        str | None, typer.Option("--dir", help="of a `millpond up`", metavar="DIR")
    ] = None,
    control: Annotated[
        str | None, typer.Option("--control", help="control socket of a cache", metavar="SOCKET")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON instead of tables")] = False,
) -> None:
    """Show counters, volumes, links and errors of a running cache."""
    if (directory is None) == (control is None):
        raise CommandError("give either --dir DIR or --control SOCKET", exit_code=USAGE)
    path = control if control is not None else os.path.join(directory or "", "control.sock")
    with expected_errors():
        answer = run(call(path, "status"))
    if json:
        print_json(answer)
    else:
        show(answer)


def show(answer: dict[str, Any]) -> None:
    """For people."""
    engine, shaping, errors = answer["engine"], answer["shaping"], answer["checksum_errors"]
    print_fields(
        {
            "cache": f"{answer['name']} {answer['cache_id']}",
            "hit rate": percent(answer["hit_rate"]),
            "dirty": format_size(answer["dirty_bytes"]),
            "log free": f"{engine['segments_free']} of {engine['segments_total']} segments",
            "slots used": f"{engine['slots_used']} of {engine['slots_total']}",
            "destage rates": f"average {rate(shaping['average_bytes_per_s'])},"
            f" peak {rate(shaping['peak_bytes_per_s'])}",
            "checksum errors": ", ".join(f"{where} {count}" for where, count in errors.items()),
        }
    )
    for store in answer["stores"]:
        state = "up" if store["up"] else f"DOWN: {store['problem']}"
        print_fields({"store": f"{store['address']} {state}"})
    print_table(
        ("volume", "state", "size", "epoch", "dirty", "oldest", "hits", "clients", "problem"),
        [volume_row(volume) for volume in answer["volumes"]],
    )


def volume_row(volume: dict[str, Any]) -> tuple[str, ...]:
    """One volume in the table."""
    oldest_s = volume["oldest_dirty_s"]
    size_bytes, epoch = volume["size_bytes"], volume["epoch"]
    return (
        str(volume["name"] or volume["id"]),
        str(volume["state"]),
        format_size(size_bytes) if size_bytes is not None else "-",
        str(epoch) if epoch is not None else "-",
        format_size(volume["dirty_bytes"]),
        f"{oldest_s:.1f}s" if oldest_s is not None else "-",
        percent(volume.get("hit_rate")),
        str(volume.get("connections", 0)),
        str(volume["problem"] or volume["destage_problem"] or ""),
    )


def percent(share: float | None) -> str:
    """A share for people."""
    return f"{share:.1%}" if share is not None else "-"


def rate(bytes_per_s: int | None) -> str:
    """A rate for people."""
    return f"{format_size(bytes_per_s)}/s" if bytes_per_s is not None else "unlimited"
