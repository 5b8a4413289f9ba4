"""`millpond up DIR`: a store, a cache and one disk in one process, for one machine.

    DIR/store/        the store's directory
    DIR/cache         the cache device (a file)
    DIR/nbd.sock      where guests connect
    DIR/store.sock    the store, for `millpond volume --dir DIR`
    DIR/control.sock  the cache, for `millpond status --dir DIR`

A new DIR is made in this order: the store, the volume in it, the cache as `cache.new`, and its name
last.  So a `cache` means that the volume exists: when it does not, that is an error and never an
empty disk; and whatever a crash leaves of a half-made DIR is finished by the next `up`.
"""

import asyncio
import fcntl
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import typer

from millpond.cache import limits
from millpond.cache.chance import Chance
from millpond.cache.daemon import CacheConfig, CacheDaemon
from millpond.cache.device import format_cache, sync_directory
from millpond.cache.errors import escaped
from millpond.cache.protect import protect_from_memory_shortage
from millpond.cli.configtypes import StoreTable
from millpond.cli.foreground import (
    AverageRateOption,
    PeakRateOption,
    ReadOnlyOption,
    Socket,
    StopSignals,
    check_machine,
    expected_errors,
    log_to_stderr,
    nbd_uri,
    parse_rates,
    raise_descriptor_limit,
    serve_cache,
)
from millpond.cli.output import format_size, parse_size
from millpond.cli.release import is_held, release
from millpond.cli.run import BUSY, NOT_FOUND, USAGE, CommandError, run
from millpond.native.engine import VolumeStatus
from millpond.store.catalogue import check_size
from millpond.store.client import StoreClient
from millpond.store.daemon import StoreDaemon
from millpond.store.errors import Code, StoreError

VOLUME_NAME = "disk"
DEFAULT_SIZE_BYTES = 20 * limits.GIB
DEFAULT_CACHE_BYTES = 2 * limits.GIB


def register(parent: typer.Typer) -> None:
    """Add the command."""
    parent.command("up")(up)


def up(
    directory: Annotated[str, typer.Argument(help="where everything lives", metavar="DIR")],
    size: Annotated[
        str | None, typer.Option("--size", help="of the disk; 20GiB when DIR is new")
    ] = None,
    cache_size: Annotated[
        str | None, typer.Option("--cache-size", help="of the cache; 2GiB when DIR is new")
    ] = None,
    average_rate: AverageRateOption = None,
    peak_rate: PeakRateOption = None,
    read_only: ReadOnlyOption = None,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="the cache is gone: go on from what the store has")
    ] = False,
) -> None:
    """Serve one disk from DIR until SIGTERM or SIGINT."""
    place = Place(directory)
    size_bytes = parse_size(size) if size is not None else None
    cache_bytes = parse_size(cache_size) if cache_size is not None else None
    settings = CacheConfig(
        stores=(f"unix:{place.store_socket}",),
        host_rates=parse_rates(average_rate, peak_rate),
        name="millpond up",
        read_only=bool(read_only),
    )
    check_sizes(size_bytes, cache_bytes)
    check_machine()
    log_to_stderr()
    protect_from_memory_shortage()
    raise_descriptor_limit()
    with place.locked(), expected_errors():
        run(_up(place, size_bytes, cache_bytes, settings, accept_loss=accept_loss))


def check_sizes(size_bytes: int | None, cache_bytes: int | None) -> None:
    """Refuse what cannot work before anything is made."""
    if size_bytes is not None:
        check_size(size_bytes)
    if cache_bytes is not None and cache_bytes < limits.CACHE_MIN_BYTES:
        raise CommandError(
            f"--cache-size is at least {format_size(limits.CACHE_MIN_BYTES)}iB", exit_code=USAGE
        )
    if cache_bytes is not None and cache_bytes % 4096:
        raise CommandError("--cache-size is a multiple of 4096 bytes", exit_code=USAGE)


class Place:
    """The paths in DIR."""

    def __init__(self, directory: str) -> None:
        self.directory = os.path.abspath(directory)
        self.shown = escaped(directory)
        self.store = os.path.join(self.directory, "store")
        self.cache = os.path.join(self.directory, "cache")
        self.cache_new = os.path.join(self.directory, "cache.new")
        self.nbd_socket = os.path.join(self.directory, "nbd.sock")
        self.store_socket = os.path.join(self.directory, "store.sock")
        self.control_socket = os.path.join(self.directory, "control.sock")

    def locked(self) -> "DirectoryLock":
        """Make DIR when there is none, and hold it for this process alone."""
        with suppress(FileExistsError):
            os.mkdir(self.directory, 0o750)
        return DirectoryLock(self)


class DirectoryLock:
    """flock on DIR, held until the end of the with block (or of the process)."""

    def __init__(self, place: Place) -> None:
        self._descriptor = os.open(place.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise CommandError(
                f"{place.shown} is served by another process; stop it first", exit_code=BUSY
            ) from None

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)


async def _up(
    place: Place,
    size_bytes: int | None,
    cache_bytes: int | None,
    config: CacheConfig,
    *,
    accept_loss: bool,
) -> None:
    signals = StopSignals()
    has_cache = check_cache_file(place, cache_bytes)
    check_store_directory(place, may_create=not has_cache)
    defaults = StoreTable(directory=place.store)
    store = await StoreDaemon.start(
        place.store,
        listen=[f"unix:{place.store_socket}"],
        format_when_empty=not has_cache,
        scrub_bytes_per_s=int(defaults.scrub_rate),
        scrub_interval_s=float(defaults.scrub_every),
    )
    serving_store = asyncio.create_task(store.serve())
    try:
        (address,) = config.stores
        await ensure_volume(place, address, size_bytes, may_create=not has_cache)
        if not has_cache:
            await check_nothing_lost(place, address, accept_loss=accept_loss)
            make_cache(place, cache_bytes or DEFAULT_CACHE_BYTES)
        await _serve(place, config, signals, serving_store)
    finally:
        store.request_stop()
        await serving_store


def check_cache_file(place: Place, cache_bytes: int | None) -> bool:
    """Is there a cache?  One of another size than asked for is refused."""
    try:
        found_bytes = os.stat(place.cache).st_size
    except FileNotFoundError:
        return False
    if cache_bytes is not None and cache_bytes != found_bytes:
        raise CommandError(
            f"{place.shown} has a cache of {format_size(found_bytes)}, --cache-size says"
            f" {format_size(cache_bytes)}; leave the option away, or use a new DIR",
            exit_code=USAGE,
        )
    return True


def check_store_directory(place: Place, *, may_create: bool) -> None:
    """The store's directory: made only while DIR is being made."""
    if may_create:
        with suppress(FileExistsError):
            os.mkdir(place.store, 0o750)
    elif not os.path.isdir(place.store):
        raise CommandError(
            f"{place.shown} has a cache but no store; bring the store back, an empty disk in its"
            " place would lose data",
            exit_code=NOT_FOUND,
        )


async def ensure_volume(
    place: Place, address: str, size_bytes: int | None, *, may_create: bool
) -> None:
    """The one volume, of this size; made only while DIR is being made."""
    client = await StoreClient.connect(
        address, role="control", client_id=Chance().new_id(), client_name="millpond up"
    )
    try:
        found = await client.call("volume.show", name=VOLUME_NAME)
        found_bytes = int(found["volume"]["size_bytes"])
        if size_bytes is not None and found_bytes != size_bytes:
            raise CommandError(
                f"the disk in {place.shown} has {format_size(found_bytes)}, --size says"
                f" {format_size(size_bytes)}; leave the option away, or use a new DIR",
                exit_code=USAGE,
            )
    except StoreError as error:
        if error.code != Code.NOT_FOUND:
            raise
        if not may_create:
            raise CommandError(
                f"the store in {place.shown} has no volume {VOLUME_NAME!r}, but a cache of it"
                " exists; bring the right store back, an empty disk in its place would lose data",
                exit_code=NOT_FOUND,
            ) from None
        await client.call(
            "volume.create", name=VOLUME_NAME, size_bytes=size_bytes or DEFAULT_SIZE_BYTES
        )
    finally:
        await client.close()


async def check_nothing_lost(place: Place, address: str, *, accept_loss: bool) -> None:
    """A new cache for a volume whose old one held writes: only when the operator says so."""
    client = await StoreClient.connect(
        address, role="control", client_id=Chance().new_id(), client_name="millpond up"
    )
    try:
        volume = (await client.call("volume.show", name=VOLUME_NAME))["volume"]
        if not is_held(volume):
            return
        if not accept_loss:
            raise CommandError(
                f"the cache of {place.shown} is gone, and may have held writes after sequence"
                f" {volume['applied_sequence']} that the store does not have; bring DIR/cache back,"
                " or lose them with --accept-loss",
                exit_code=BUSY,
            )
        await release(client, volume)
    finally:
        await client.close()


async def check_same_store(place: Place, address: str, remembered: Sequence[VolumeStatus]) -> None:
    """A store that lacks what the cache holds is not this cache's, whatever its names."""
    client = await StoreClient.connect(
        address, role="control", client_id=Chance().new_id(), client_name="millpond up"
    )
    try:
        found = {volume["id"] for volume in (await client.call("volume.list"))["volumes"]}
    finally:
        await client.close()
    missing = [status for status in remembered if status.id.hex() not in found]
    # One that was drained may have been deleted; all of them, and this is another store.
    if any(status.has_undestaged for status in missing) or (
        missing and len(missing) == len(remembered)
    ):
        raise CommandError(
            f"the cache in {place.shown} is of volume {missing[0].id.hex()}, which this store does"
            " not have; bring the right store back, an empty disk in its place would lose data",
            exit_code=NOT_FOUND,
        )


def make_cache(place: Place, cache_bytes: int) -> None:
    """Format under another name; the rename says that it is whole."""
    with suppress(FileNotFoundError):
        os.unlink(place.cache_new)  # half-made, by a process that died
    try:
        format_cache(place.cache_new, size_bytes=cache_bytes, chance=Chance())
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(place.cache_new)
        raise
    os.rename(place.cache_new, place.cache)
    sync_directory(place.directory)


async def _serve(
    place: Place,
    config: CacheConfig,
    signals: StopSignals,
    serving_store: "asyncio.Task[None]",
) -> None:
    daemon = await CacheDaemon.start(place.cache, config)
    try:
        await check_same_store(place, config.stores[0], daemon.engine.list_volumes())
    except BaseException:
        await daemon.stop()
        raise
    await serve_cache(
        daemon,
        nbd_socket=Socket(place.nbd_socket),
        control_socket=Socket(place.control_socket),
        signals=signals,
        ready_lines=ready_lines(place.nbd_socket),
        also=[asyncio.shield(serving_store)],
    )


def ready_lines(socket_path: str) -> list[str]:
    """What to tell the person who started it: the URI, and how qemu uses it."""
    comma_safe = socket_path.replace(",", ",,")
    return [
        nbd_uri(socket_path),
        "qemu-system-x86_64 ..."
        f" -blockdev driver=nbd,node-name=disk,server.type=unix,server.path={comma_safe},"
        f"export={VOLUME_NAME},reconnect-delay=60,discard=unmap"
        " -device virtio-blk-pci,drive=disk",
    ]
