"""What a running cache says about itself: `millpond status`, `cache status`, `cache list`."""

import os
from typing import Annotated, Any, Final

import typer

from millpond.cache.control import call
from millpond.cli.foreground import expected_errors
from millpond.cli.output import format_size, print_fields, print_json, print_table
from millpond.cli.run import run

CONTROL_SOCKET: Final = "/run/millpond/control.sock"  # of this host's cache, as its unit has it


def register(parent: typer.Typer) -> None:
    """Add the command."""
    parent.command("status")(status)


CacheDirOption = Annotated[
    str | None, typer.Option("--dir", help="of a `millpond up`", metavar="DIR")
]
ControlOption = Annotated[
    str | None,
    typer.Option(
        "--control",
        envvar="MILLPOND_CONTROL",
        help=f"control socket of a cache; {CONTROL_SOCKET}",
        metavar="SOCKET",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON instead of tables")]


def control_path(directory: str | None, control: str | None) -> str:
    """The control socket that the options (or the environment) name; --dir wins, then --control."""
    if directory is not None:
        return os.path.join(directory, "control.sock")
    return CONTROL_SOCKET if control is None else control


def ask(directory: str | None, control: str | None, op: str) -> dict[str, Any]:
    """One question to a running cache."""
    path = control_path(directory, control)
    with expected_errors():
        return run(call(path, op))


def status(
    directory: CacheDirOption = None, control: ControlOption = None, json: JsonOption = False
) -> None:
    """Show counters, volumes, links and errors of a running cache."""
    answer = ask(directory, control, "status")
    if json:
        print_json(answer)
        return
    show_cache(answer)
    show_volumes(answer["volumes"])


def cache_status(
    directory: CacheDirOption = None, control: ControlOption = None, json: JsonOption = False
) -> None:
    """Show one running cache: its log, slots, rates, stores and errors."""
    answer = ask(directory, control, "status")
    if json:
        del answer["volumes"]
        print_json(answer)
    else:
        show_cache(answer)


def cache_list(
    directory: CacheDirOption = None, control: ControlOption = None, json: JsonOption = False
) -> None:
    """List the volumes that a running cache serves or remembers."""
    volumes = ask(directory, control, "volumes")["volumes"]
    if json:
        print_json(volumes)
    else:
        show_volumes(volumes)


def show_cache(answer: dict[str, Any]) -> None:
    """The cache, for people."""
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
            "device errors": f"{engine['device_errors']}, log rescued {engine['log_rescues']}",
            "verification": verification(answer["scrub"], engine["slots_total"]),
        }
    )
    for store in answer["stores"]:
        state = "up" if store["up"] else f"DOWN: {store['problem']}"
        print_fields({"store": f"{store['address']} {state}"})


def show_volumes(volumes: list[dict[str, Any]]) -> None:
    """Its volumes, for people."""
    print_table(
        ("volume", "state", "size", "epoch", "dirty", "oldest", "hits", "clients", "problem"),
        [volume_row(volume) for volume in volumes],
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
        "; ".join(notes_of(volume)),
    )


def notes_of(volume: dict[str, Any]) -> list[str]:
    """What an operator should know of it, the worst first."""
    notes = [str(volume["problem"] or volume["destage_problem"] or "")]
    if volume.get("bound_exceeded"):
        notes.insert(0, f"BOUND EXCEEDED ({volume['bound_s']:g}s)")
    slowed = volume.get("slowed_bytes_per_s")
    if slowed is not None:
        notes.append(f"guest slowed to {rate(slowed)}" if slowed else "guest waits for destage")
    return [note for note in notes if note]


def verification(scrub: dict[str, Any], slots: int) -> str:
    """What the background verification is at, for people."""
    if not scrub["bytes_per_s"]:
        return "off"
    place = f"slots, {scrub['slot']} of {slots}" if scrub["stage"] == "slots" else scrub["stage"]
    age_s = scrub["last_pass_age_s"]
    last = f", the last {age_s:.0f} s ago" if age_s is not None else ""
    return (
        f"{rate(scrub['bytes_per_s'])}; {place}; passes {scrub['passes']}{last};"
        f" verified {format_size(scrub['verified_bytes'])};"
        f" errors: slots {scrub['slot_errors']}, log {scrub['log_errors']}"
    )


def percent(share: float | None) -> str:
    """A share for people."""
    return f"{share:.1%}" if share is not None else "-"


def rate(bytes_per_s: int | None) -> str:
    """A rate for people."""
    return f"{format_size(bytes_per_s)}/s" if bytes_per_s is not None else "unlimited"
