"""`millpond store`: run a storage server, ask one how it is."""

import asyncio
import logging
import signal
import sys
from typing import Annotated

import typer

from millpond.cli.output import format_size, print_fields, print_json
from millpond.cli.run import run
from millpond.cli.volume import DirOption, JsonOption, StoreOption, call_store
from millpond.store.daemon import StoreDaemon

app = typer.Typer(
    name="store",
    help="Run a storage server, ask one how it is.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def register(parent: typer.Typer) -> None:
    """Add the noun to the command tree."""
    parent.add_typer(app)


@app.callback()
def store() -> None:
    """Run a storage server."""


@app.command("serve")
def serve(
    directory: Annotated[str, typer.Argument(help="where the store lives", metavar="DIR")],
    listen: Annotated[
        list[str] | None,
        typer.Option("--listen", help="besides DIR/store.sock: HOST:PORT or unix:/path; repeat"),
    ] = None,
    insecure_listen: Annotated[
        bool, typer.Option("--insecure-listen", help="allow TCP that others can reach")
    ] = False,
    format_new: Annotated[
        bool, typer.Option("--format", help="make a new store in DIR when it holds none")
    ] = False,
) -> None:
    """Serve the store in DIR until SIGTERM or SIGINT."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr)
    run(
        _serve(
            directory, listen or [], insecure_listen=insecure_listen, format_when_empty=format_new
        )
    )


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
        }
    )


async def _serve(
    directory: str, listen: list[str], *, insecure_listen: bool, format_when_empty: bool
) -> None:
    daemon = await StoreDaemon.start(
        directory,
        listen=listen,
        insecure_listen=insecure_listen,
        format_when_empty=format_when_empty,
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, daemon.request_stop)
    addresses = " ".join(str(address) for address in daemon.addresses)
    print(f"serving {directory} at {addresses}", flush=True)
    await daemon.serve()
