"""`millpond volume`: what can be done with the volumes of one store.

The store is named by --store ADDRESS, by --dir DIR (its unix socket, DIR/store.sock), or by the
environment variable MILLPOND_STORE.
"""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

import typer

from millpond.cli.output import (
    format_size,
    note,
    parse_size,
    print_fields,
    print_json,
    print_table,
    progress,
)
from millpond.cli.release import is_held, refusal, release
from millpond.cli.run import USAGE, CommandError, run
from millpond.store.catalogue import new_id
from millpond.store.client import StoreClient
from millpond.store.directory import SOCKET_NAME
from millpond.store.errors import Code, StoreError
from millpond.store.transfer import export_image, import_image

T = TypeVar("T")

app = typer.Typer(
    name="volume",
    help="The volumes of a store: list, make, fill, save, delete.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

StoreOption = Annotated[
    str | None,
    typer.Option("--store", envvar="MILLPOND_STORE", help="unix:/path, HOST:PORT or tcp:HOST:PORT"),
]
DirOption = Annotated[str | None, typer.Option("--dir", help="the store served in this directory")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON instead of a table")]
NameArgument = Annotated[str, typer.Argument(help="name of the volume", metavar="NAME")]


def register(parent: typer.Typer) -> None:
    """Add the noun to the command tree."""
    parent.add_typer(app)


@app.command("create")
def create(
    name: NameArgument,
    size: Annotated[str | None, typer.Argument(help="like 20GiB", metavar="SIZE")] = None,
    size_option: Annotated[str | None, typer.Option("--size", help="like 20GiB")] = None,
    store: StoreOption = None,
    directory: DirOption = None,
    json: JsonOption = False,
    exist_ok: Annotated[bool, typer.Option("--exist-ok", help="no error if it exists")] = False,
) -> None:
    """Create an empty volume."""
    if (size is None) == (size_option is None):
        raise CommandError("give the size once, like 20GiB", exit_code=USAGE)
    size_bytes = parse_size(size or size_option or "")

    async def work(client: StoreClient) -> dict[str, Any]:
        try:
            return await client.call("volume.create", name=name, size_bytes=size_bytes)
        except StoreError as error:
            if error.code != Code.EXISTS or not exist_ok:
                raise
            found = await client.call("volume.show", name=name)
            if found["volume"]["size_bytes"] != size_bytes:
                raise
            return found

    volume = call_store(store, directory, work)["volume"]
    if json:
        print_json(volume)


@app.command("list")
def list_volumes(
    store: StoreOption = None, directory: DirOption = None, json: JsonOption = False
) -> None:
    """List the volumes."""
    volumes = call_store(store, directory, lambda client: client.call("volume.list"))["volumes"]
    if json:
        print_json(volumes)
        return
    rows = [
        [
            volume["name"],
            format_size(volume["size_bytes"]),
            format_size(volume["stored_bytes"]),
            str(volume["epoch"]),
            _state(volume),
            volume["id"],
        ]
        for volume in volumes
    ]
    print_table(["NAME", "SIZE", "STORED", "EPOCH", "STATE", "ID"], rows)


@app.command("show")
def show(
    name: NameArgument,
    store: StoreOption = None,
    directory: DirOption = None,
    json: JsonOption = False,
) -> None:
    """Show one volume."""
    volume = call_store(store, directory, lambda client: client.call("volume.show", name=name))[
        "volume"
    ]
    if json:
        print_json(volume)
        return
    print_fields(
        {
            "name": volume["name"],
            "id": volume["id"],
            "size": f"{format_size(volume['size_bytes'])} ({volume['size_bytes']} bytes)",
            "stored": f"{format_size(volume['stored_bytes'])} ({volume['stored_bytes']} bytes)",
            "state": _state(volume),
            "open at": volume["open_holder"] or "-",
            "dirty at": volume["dirty_holder"] or "-",
            "epoch": str(volume["epoch"]),
            "position": f"{volume['applied_sequence']} in lineage {volume['lineage']:016x}",
        }
    )


@app.command("resize")
def resize(
    name: NameArgument,
    size: Annotated[str, typer.Argument(help="the new size, like 40GiB", metavar="SIZE")],
    store: StoreOption = None,
    directory: DirOption = None,
    shrink: Annotated[
        bool, typer.Option("--shrink", help="smaller: what lies behind the new end is destroyed")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Make a volume larger, also while a guest uses it; or smaller, while it is closed."""
    size_bytes = parse_size(size)
    volume = call_store(
        store,
        directory,
        lambda client: client.call(
            "volume.resize", name=name, size_bytes=size_bytes, shrink=shrink
        ),
    )["volume"]
    if json:
        print_json(volume)
    if volume["open_holder"]:
        note(
            f"volume '{name}' is open: a guest sees the new size with its next connection,"
            " a kernel device within seconds"
        )


@app.command("rename")
def rename(
    name: NameArgument,
    new_name: Annotated[str, typer.Argument(help="the new name", metavar="NEW")],
    store: StoreOption = None,
    directory: DirOption = None,
    json: JsonOption = False,
) -> None:
    """Give a volume another name, also while it is open; its id stays."""
    volume = call_store(
        store, directory, lambda client: client.call("volume.rename", name=name, new_name=new_name)
    )["volume"]
    if json:
        print_json(volume)


@app.command("release")
def release_volume(
    name: NameArgument,
    store: StoreOption = None,
    directory: DirOption = None,
    accept_loss: Annotated[
        bool,
        typer.Option("--accept-loss", help="the cache that holds it is gone, with what it had"),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Take a volume away from a cache that is gone, so that others may open it."""

    async def work(client: StoreClient) -> dict[str, Any]:
        volume: dict[str, Any] = (await client.call("volume.show", name=name))["volume"]
        if not is_held(volume):
            return volume
        if not accept_loss:
            raise refusal(volume)
        return await release(client, volume)

    volume = call_store(store, directory, work)
    if json:
        print_json(volume)


@app.command("delete")
def delete(
    name: NameArgument,
    store: StoreOption = None,
    directory: DirOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="even if open or dirty: its newest writes are lost")
    ] = False,
    missing_ok: Annotated[bool, typer.Option("--missing-ok", help="no error if missing")] = False,
) -> None:
    """Delete a volume and its data."""

    async def work(client: StoreClient) -> None:
        try:
            await client.call("volume.delete", name=name, force=force)
        except StoreError as error:
            if error.code != Code.NOT_FOUND or not missing_ok:
                raise

    call_store(store, directory, work)


@app.command("import")
def import_volume(
    file: Annotated[str, typer.Argument(help="raw image or block device", metavar="FILE")],
    name: NameArgument,
    store: StoreOption = None,
    directory: DirOption = None,
    json: JsonOption = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="write over a volume that holds data")
    ] = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="draw no bar")] = False,
) -> None:
    """Import a raw image; the volume is created when it does not exist."""
    address = store_address(store, directory)
    with progress(f"importing {name}", enabled=not no_progress) as update:
        volume = run(import_image(address, file, name, overwrite=overwrite, progress=update))
    if json:
        print_json(volume)


@app.command("export")
def export_volume(
    name: NameArgument,
    file: Annotated[str, typer.Argument(help="raw image to write, sparse", metavar="FILE")],
    store: StoreOption = None,
    directory: DirOption = None,
    json: JsonOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the file")] = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="draw no bar")] = False,
) -> None:
    """Export a volume, as the store has it, to a raw image."""
    address = store_address(store, directory)
    with progress(f"exporting {name}", enabled=not no_progress) as update:
        volume = run(export_image(address, name, file, overwrite=overwrite, progress=update))
    if json:
        print_json(volume)


def store_address(store: str | None, directory: str | None) -> str:
    """The address that the options (or the environment) name; --dir wins over the environment."""
    if directory is not None:
        return f"unix:{directory.rstrip('/') or '/'}/{SOCKET_NAME}"
    if store is None:
        raise CommandError(
            "which store? give --store ADDRESS or --dir DIR, or set MILLPOND_STORE", exit_code=USAGE
        )
    return store


def call_store(
    store: str | None, directory: str | None, work: Callable[[StoreClient], Awaitable[T]]
) -> T:
    """Connect, work, disconnect."""
    address = store_address(store, directory)

    async def main() -> T:
        client = await StoreClient.connect(address, client_id=new_id(), client_name="millpond")
        try:
            return await work(client)
        finally:
            await client.close()

    return run(main())


def _state(volume: dict[str, Any]) -> str:
    if volume["open_holder"]:
        return "open, dirty" if volume["dirty_holder"] else "open"
    return "dirty" if volume["dirty_holder"] else "closed"
