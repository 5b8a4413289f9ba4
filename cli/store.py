"""`millpond store`: run a storage server, ask one how it is, check one that is not running."""

import asyncio
import logging
import signal
import sys
from typing import Annotated, Any

import msgspec
import typer

from millpond.cli.configfile import load
from millpond.cli.configtypes import STORE_FILE, StoreFile, StoreTable
from millpond.cli.foreground import check_machine, raise_descriptor_limit
from millpond.cli.notify import Notifier, watched
from millpond.cli.output import format_size, parse_size, print_fields, print_json
from millpond.cli.run import FAILED, OK, run
from millpond.cli.volume import DirOption, JsonOption, StoreOption, call_store
from millpond.store.daemon import StoreDaemon
from millpond.store.fsck import Report, Trouble, fsck

app = typer.Typer(
    name="store",
    help="Run a storage server, ask one how it is, check one that is not running.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

# Guests wait meanwhile; it goes on by itself.
FULL = "FULL: no room for another segment; make the file system larger, or give back space in it"


def register(parent: typer.Typer) -> None:
    """Add the noun to the command tree."""
    parent.add_typer(app)


@app.callback()
def store() -> None:
    """Run a storage server."""


@app.command("serve")
def serve(
    directory: Annotated[
        str | None, typer.Argument(help="where the store lives", metavar="[DIR]")
    ] = None,
    config_file: Annotated[
        str | None,
        typer.Option("--config", help=f"default without DIR: {STORE_FILE}", metavar="FILE"),
    ] = None,
    listen: Annotated[
        list[str] | None,
        typer.Option("--listen", help="besides DIR/store.sock: HOST:PORT or unix:/path; repeat"),
    ] = None,
    insecure_listen: Annotated[
        bool | None,
        typer.Option(
            "--insecure-listen", help="allow TCP that others can reach", show_default=False
        ),
    ] = None,
    format_new: Annotated[
        bool, typer.Option("--format", help="make a new store in DIR when it holds none")
    ] = False,
) -> None:
    """Serve the store in DIR until SIGTERM or SIGINT.

    What is not given here comes from the configuration file, when one is used.
    """
    if config_file is None and directory is None:
        config_file = STORE_FILE
    if config_file is not None:
        table = load(config_file, StoreFile).store
    else:
        table = StoreTable(directory=directory or "")
    table = msgspec.structs.replace(
        table,
        directory=directory or table.directory,
        listen=listen or table.listen,
        insecure_listen=table.insecure_listen if insecure_listen is None else insecure_listen,
    )
    check_machine()
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr)
    raise_descriptor_limit()
    run(_serve(table, format_when_empty=format_new))


@app.command("status")
def status(
    store: StoreOption = None, directory: DirOption = None, json: JsonOption = False
) -> None:
    """Show the counters of a running store."""
    answer = call_store(store, directory, lambda client: client.call("status"))["store"]
    if json:
        print_json(answer)
        return
    print_fields(
        {
            "store": answer["store_id"],
            "state": FULL if answer.get("full") else "serving",
            "directory": answer["directory"],
            "version": answer["version"],
            "listening": " ".join(answer["listening"]),
            "up": f"{answer['uptime_s']:.0f}s",
            "connections": f"{answer['connections']} of {answer['connections_max']},"
            f" {answer['refused_connections']} refused",
            "volumes": str(answer["volumes"]),
            "live": format_size(answer["live_bytes"]),
            "batches": str(answer["applied_batches"]),
            "checksum errors": str(answer["checksum_errors"]),
            "scrub": _scrub_text(answer),
            "I/O errors": str(answer["io_errors"]),
        }
    )


@app.command("fsck")
def check(
    directory: Annotated[str, typer.Argument(help="where the store lives", metavar="DIR")],
    memory: Annotated[
        str, typer.Option("--memory", help="of maps rebuilt at a time", metavar="SIZE")
    ] = "256MiB",
    json: JsonOption = False,
) -> int:
    """Check a store that nobody serves against its log. Changes nothing.

    Verifies every record, rebuilds maps, extent tables, live counts and catalogue from the log and
    compares them with what the store has. One line per finding, then a summary; exit code 1 when
    something was found.
    """
    troubles: list[Trouble] = []

    def tell(trouble: Trouble) -> None:
        if json:
            troubles.append(trouble)
        else:
            print(trouble.line(), flush=True)

    report = fsck(directory, tell, memory_bytes=parse_size(memory))
    if json:
        print_json({**report.as_json(), "findings": troubles})
    else:
        print(_summary_line(report))
    return OK if report.clean else FAILED


def _summary_line(report: Report) -> str:
    summary = report.summary
    seen = (
        f"{summary.segments} segments, {summary.records} records,"
        f" {format_size(summary.verified_bytes)} of live data verified"
    )
    if not summary.compared:
        seen += ", maps, tables and catalogue NOT compared"
    found = "clean" if report.clean else f"{summary.findings} findings"
    if summary.bad_bytes:
        found += f", {format_size(summary.bad_bytes)} of live data damaged"
    if summary.unproven_blocks:
        found += f", {summary.unproven_blocks} blocks whose records are lost"
    return f"{report.directory}: {found}; {seen}"


def _scrub_text(answer: dict[str, Any]) -> str:
    """Where scrubbing is, how often it was through, and what it found."""
    if not answer["scrub_bytes_per_s"]:
        return "off"
    ago_s, passes = answer["scrub_finished_ago_s"], answer["scrub_passes"]
    at = f"segment {answer['scrub_segment']} at {answer['scrub_offset_bytes']}"
    done = f"{passes} passes"
    if ago_s is not None:
        done += f", last finished {ago_s:.0f}s ago with {answer['scrub_bad_last_pass']} bad"
    bad = f"{answer['scrub_bad']} bad in this one" if answer["scrub_segment"] else "resting"
    return (
        f"{at if answer['scrub_segment'] else 'between passes'}; {done}; {bad};"
        f" {format_size(answer['scrub_verified_bytes'])} verified"
    )


async def _serve(table: StoreTable, *, format_when_empty: bool) -> None:
    daemon = await StoreDaemon.start(
        table.directory,
        listen=table.listen,
        insecure_listen=table.insecure_listen,
        format_when_empty=format_when_empty,
        unix_mode=table.socket_mode,
        unix_group=table.socket_group,
        page_cache_bytes=table.page_cache or 0,
        scrub_bytes_per_s=int(table.scrub_rate),
        scrub_interval_s=float(table.scrub_every),
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, daemon.request_stop)
    addresses = " ".join(str(address) for address in daemon.addresses)
    print(f"serving {table.directory} at {addresses}", flush=True)
    notifier = Notifier.of_environment()
    notifier.ready(f"serving {table.directory} at {addresses}")
    # Our loop has the watchdog's whole attention: the core's reactor has no question to answer.
    async with watched(notifier, lambda: asyncio.sleep(0)):
        await daemon.stop_requested()
        notifier.stopping()
        await daemon.serve()
