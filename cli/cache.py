"""`millpond cache`: format a cache device, and serve the volumes of stores from it."""

import os
import socket
from typing import Annotated

import typer

from millpond.cache.chance import Chance
from millpond.cache.daemon import CacheConfig, CacheDaemon
from millpond.cache.device import format_cache
from millpond.cache.protect import protect_from_memory_shortage
from millpond.cache.scrub import check_rate
from millpond.cache.settings import VolumeSettings
from millpond.cache.shaping import RateLimits
from millpond.cli.configfile import load, plain, rates_of, settings_of, volumes_of
from millpond.cli.configtypes import CACHE_FILE, CacheFile, ControlTable, NbdTable
from millpond.cli.foreground import (
    AverageRateOption,
    PeakRateOption,
    ReadOnlyOption,
    Socket,
    StopSignals,
    Tcp,
    check_machine,
    expected_errors,
    log_to_stderr,
    nbd_uri,
    parse_rates,
    parse_tcp,
    raise_descriptor_limit,
    serve_cache,
)
from millpond.cli.guests import take_guests
from millpond.cli.notify import Notifier, take_descriptors, take_listener
from millpond.cli.output import parse_size, print_json
from millpond.cli.run import USAGE, CommandError, run
from millpond.cli.status import cache_list, cache_status
from millpond.native.engine import EngineOptions

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
    device: Annotated[
        str | None, typer.Argument(help="a formatted cache device", metavar="[DEVICE]")
    ] = None,
    config_file: Annotated[
        str | None,
        typer.Option("--config", help=f"default without DEVICE: {CACHE_FILE}", metavar="FILE"),
    ] = None,
    store: Annotated[
        list[str] | None,
        typer.Option("--store", help="address of a store; repeat, or set MILLPOND_STORE"),
    ] = None,
    nbd: Annotated[str | None, typer.Option("--nbd", help="unix socket for guests")] = None,
    nbd_tcp: Annotated[
        str | None,
        typer.Option("--nbd-tcp", help="listen there too, like 127.0.0.1:10809", metavar="ADDRESS"),
    ] = None,
    insecure_listen: Annotated[
        bool, typer.Option("--insecure-listen", help="allow TCP that others can reach")
    ] = False,
    control: Annotated[
        str | None, typer.Option("--control", help="unix socket for `millpond status`")
    ] = None,
    average_rate: AverageRateOption = None,
    peak_rate: PeakRateOption = None,
    read_only: ReadOnlyOption = None,
    name: Annotated[str | None, typer.Option("--name", help="of this cache, in logs")] = None,
) -> None:
    """Serve every volume of the stores over NBD until SIGTERM or SIGINT.

    What is not given here comes from the configuration file, when one is used.
    """
    if config_file is None and device is None:
        config_file = CACHE_FILE
    file = load(config_file, CacheFile) if config_file is not None else None
    cache_table = file.cache if file is not None else None
    device = device or (cache_table.device if cache_table else None)
    # The environment is for commands typed by hand: it never overrules a file.
    stores = store or (cache_table.stores if cache_table else None) or _stores_of_environment()
    nbd_socket = _socket(nbd, file.nbd if file else None)
    if device is None or not stores or nbd_socket is None:
        raise CommandError(
            "give DEVICE, --store and --nbd, or a configuration file", exit_code=USAGE
        )
    rates = rates_of(file.rates.average, file.rates.peak) if file else RateLimits()
    config = CacheConfig(
        stores=tuple(stores),
        host_rates=parse_rates(average_rate, peak_rate, rates),
        name=name or (cache_table.name if cache_table else "cache"),
        read_only=read_only
        if read_only is not None
        else cache_table is not None and cache_table.read_only,
        defaults=settings_of(file.defaults) if file is not None else VolumeSettings(),
        volumes=volumes_of(file) if file is not None else {},
        engine=EngineOptions(
            scrub_bytes_per_s=check_rate(plain(cache_table.scrub_rate) if cache_table else None)
        ),
    )
    tcp = parse_tcp(
        nbd_tcp or (file.nbd.tcp if file else None),
        insecure_listen=insecure_listen or (file is not None and file.nbd.insecure_listen),
    )
    control_socket = _socket(control, file.control if file else None)
    dead_timeout_s = int((file.nbd if file else NbdTable()).dead_timeout)
    check_machine()
    log_to_stderr()
    protect_from_memory_shortage()
    raise_descriptor_limit()
    with expected_errors():
        run(_serve(device, config, nbd_socket, tcp, control_socket, dead_timeout_s))


def _stores_of_environment() -> list[str]:
    return os.environ.get("MILLPOND_STORE", "").split()


def _socket(path: str | None, table: NbdTable | ControlTable | None) -> Socket | None:
    """The path of the command line wins; permissions are the file's."""
    if table is None:
        return Socket(path) if path is not None else None
    return Socket(path or table.socket, mode=table.mode, group=table.group)


async def _serve(
    device: str,
    config: CacheConfig,
    nbd_socket: Socket,
    nbd_tcp: Tcp | None,
    control_socket: Socket | None,
    dead_timeout_s: int,
) -> None:
    signals = StopSignals()
    notifier, descriptors = Notifier.of_environment(), take_descriptors()
    nbd_listener = take_listener(descriptors, "nbd")
    if nbd_listener is not None:
        _check_place(nbd_listener, nbd_socket)
    daemon = await CacheDaemon.start(device, config)
    await serve_cache(
        daemon,
        nbd_socket=nbd_socket,
        nbd_listener=nbd_listener,
        nbd_tcp=nbd_tcp,
        control_socket=control_socket,
        signals=signals,
        ready_lines=[nbd_uri(nbd_socket.path)],
        notifier=notifier,
        guests=take_guests(notifier, descriptors, daemon.engine.cache_id),
        dead_timeout_s=dead_timeout_s,
    )


def _check_place(listener: socket.socket, configured: Socket) -> None:
    """A socket unit and a file that name different places: guests would wait at the wrong one."""
    bound = listener.getsockname()
    if bound != configured.path:
        listener.close()
        raise CommandError(
            f"the socket unit listens at {bound!a}, the configuration says {configured.path!a};"
            " make ListenStream= of millpond-cache.socket and `socket` of [nbd] the same",
            exit_code=USAGE,
        )
