"""`millpond cache`: format a cache device, and serve the volumes of stores from it."""

from typing import Annotated

import typer

from millpond.cache.chance import Chance
from millpond.cache.daemon import CacheConfig, CacheDaemon
from millpond.cache.device import format_cache
from millpond.cli.foreground import (
    StopSignals,
    expected_errors,
    log_to_stderr,
    nbd_uri,
    parse_rates,
    serve_cache,
)
from millpond.cli.output import parse_size, print_json
from millpond.cli.run import run
from millpond.cli.status import cache_list, cache_status

app = typer.Typer(
    name="cache",
    help="Format a cache device, serve guests from it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def register(parent: typer.Typer) -> None:
    """Add the noun to the command tree."""
    app.command("list")(cache_list)
    app.command("status")(cache_status)
    parent.add_typer(app)


@app.callback()
def cache() -> None:
    """Format a cache device, serve guests from it."""


@app.command("format")
def format_device(
    device: Annotated[str, typer.Argument(help="file or block device", metavar="DEVICE")],
    size: Annotated[
        str | None, typer.Option("--size", help="make a file of this size, like 100GiB")
    ] = None,
    slot_size: Annotated[str, typer.Option("--slot-size", help="4K to 64K")] = "16K",
    log_size: Annotated[
        str | None, typer.Option("--log-size", help="of the write log; a quarter of the device")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="destroy what the device holds")] = False,
    json: Annotated[bool, typer.Option("--json", help="print the new cache id as JSON")] = False,
) -> None:
    """Make an empty cache on a device; what the device held is lost."""
    with expected_errors():
        cache_id = format_cache(
            device,
            size_bytes=parse_size(size) if size is not None else None,
            slot_bytes=parse_size(slot_size),
            log_bytes=parse_size(log_size) if log_size is not None else None,
            force=force,
            chance=Chance(),
        )
    if json:
        print_json({"cache_id": cache_id.hex()})


@app.command("serve")
def serve(
    device: Annotated[str, typer.Argument(help="a formatted cache device", metavar="DEVICE")],
    store: Annotated[
        list[str], typer.Option("--store", envvar="MILLPOND_STORE", help="address; repeatable")
    ],
    nbd: Annotated[str, typer.Option("--nbd", help="unix socket for guests")],
    control: Annotated[
        str | None, typer.Option("--control", help="unix socket for `millpond status`")
    ] = None,
    average_rate: Annotated[
        str | None, typer.Option("--average-rate", help="of destage, bytes/s like 20MiB")
    ] = None,
    peak_rate: Annotated[
        str | None, typer.Option("--peak-rate", help="of destage in any second, bytes/s")
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="guests may not write")] = False,
    name: Annotated[str, typer.Option("--name", help="of this cache, in logs")] = "cache",
) -> None:
    """Serve every volume of one or several stores over NBD until SIGTERM or SIGINT."""
    rates = parse_rates(average_rate, peak_rate)
    log_to_stderr()
    config = CacheConfig(stores=tuple(store), host_rates=rates, name=name, read_only=read_only)
    with expected_errors():
        run(_serve(device, config, nbd, control))


async def _serve(device: str, config: CacheConfig, nbd_path: str, control_path: str | None) -> None:
    signals = StopSignals()
    daemon = await CacheDaemon.start(device, config)
    await serve_cache(
        daemon,
        nbd_path=nbd_path,
        control_path=control_path,
        signals=signals,
        ready_lines=[nbd_uri(nbd_path)],
    )
