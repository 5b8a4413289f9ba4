"""Import and export of raw images against a store, as a writer and reader of its own.

Import opens the volume under a random cache id, ships the image's data as batches with several in
flight, and closes it. Holes and zero blocks are not sent. Export reads the volume at one position
into a sparse file.

Failure modes: the volume is open or dirty elsewhere: refused before anything is sent. The store
refuses a batch, or is lost: the import fails; a volume that it created is deleted again, one that
existed is closed and named as half written. The volume changes during an export: the export fails,
since the file would be no state the disk ever had; no half image is left.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import Callable
from typing import Any

from millpond.native import ffi, lib
from millpond.native.record import encode_batch
from millpond.store import limits, wire
from millpond.store.catalogue import new_id
from millpond.store.client import StoreClient
from millpond.store.errors import Code, StoreError, one_line
from millpond.store.image import BLOCK_BYTES, ImageReader, ImageWriter
from millpond.store.requests import DataRequests, ReadReply, encode_read

Progress = Callable[[int, int], None]
READ_BYTES: int = lib.MP_READ_BLOCKS_MAX * BLOCK_BYTES


def new_lineage() -> int:
    """A random lineage id, never 0."""
    return secrets.randbits(64) or 1


def no_progress(done_bytes: int, total_bytes: int) -> None:
    """Nobody watches."""


async def import_image(
    address: str,
    path: str,
    name: str,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Import a raw image; returns the volume as the store shows it afterwards.

    The volume is created with the image's size when it does not exist. One that holds data is
    written over only when told, and then wholly.
    """
    image = ImageReader(path)
    client_id = new_id()
    try:
        client = await StoreClient.connect(
            address, client_id=client_id, client_name=f"import of {one_line(name)}"
        )
        try:
            volume, created = await _target(client, image, name, overwrite=overwrite)
            return await _import_opened(client, client_id, image, volume, created, progress)
        finally:
            await client.close()
    finally:
        image.close()


async def _target(
    client: StoreClient, image: ImageReader, name: str, *, overwrite: bool
) -> tuple[dict[str, Any], bool]:
    """The volume to import into, and whether we made it."""
    try:
        volume = (await client.call("volume.show", name=name))["volume"]
    except StoreError as error:
        if error.code != Code.NOT_FOUND:
            raise
        size_bytes = max(image.size_bytes, BLOCK_BYTES)
        created = await client.call("volume.create", name=name, size_bytes=size_bytes)
        return created["volume"], True
    if volume["size_bytes"] < image.size_bytes:
        raise StoreError(
            Code.INVALID,
            f"volume '{name}' has {volume['size_bytes']} bytes, the image {image.size_bytes};"
            " import into a new volume",
        )
    if volume["applied_sequence"] > 0 and not overwrite:
        raise StoreError(
            Code.EXISTS,
            f"volume '{name}' holds data already; import into a new volume, or use --overwrite",
        )
    return volume, False


async def _import_opened(
    client: StoreClient,
    client_id: bytes,
    image: ImageReader,
    volume: dict[str, Any],
    created: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Open, ship, close; clean up after a failure."""
    identity: dict[str, Any] = {"id": volume["id"], "cache_id": client_id.hex()}
    opened = False
    try:
        reply = await client.call(
            "volume.open",
            **identity,
            lineage=(lineage := new_lineage()),
            first_sequence=None,
            expected_epoch=volume["epoch"],
            accept_loss=False,
        )
        opened = True
        volume = reply["volume"]
        await _ship(client, client_id, image, volume, lineage, progress)
        closed = await client.call("volume.close", **identity, epoch=volume["epoch"])
        return dict(closed["volume"])
    except BaseException:
        await _clean_up(client, identity, volume, opened=opened, created=created)
        raise


async def _clean_up(
    client: StoreClient,
    identity: dict[str, Any],
    volume: dict[str, Any],
    *,
    opened: bool,
    created: bool,
) -> None:
    """After a failed import; the failure itself is what the caller reports."""
    try:
        async with asyncio.timeout(limits.CLOSE_TIMEOUT_S):
            if opened:
                await client.call("volume.close", **identity, epoch=volume["epoch"])
            if created:  # not by force: it may have become somebody else's meanwhile
                await client.call("volume.delete", id=volume["id"])
    except (StoreError, TimeoutError):
        pass  # the store is away, or another writer took the volume: `volume show` tells


async def _ship(
    client: StoreClient,
    client_id: bytes,
    image: ImageReader,
    volume: dict[str, Any],
    lineage: int,
    progress: Progress,
) -> None:
    """Every run of the image as one batch, several in flight, in order."""
    requests = DataRequests("destage", volume["name"])
    in_flight: deque[tuple[asyncio.Future[wire.Frame], int]] = deque()
    sequence = volume["applied_sequence"]
    total_bytes = image.size_bytes
    # Zeroes matter where older data would shine through.
    zeroes = sequence > 0

    async def finish_oldest() -> None:
        reply, done_bytes = in_flight.popleft()
        await reply
        progress(done_bytes, total_bytes)

    await requests.connect(
        str(client.address), client_id=client_id, client_name=f"import of {volume['name']}"
    )
    try:
        for offset, data in image.runs(window_bytes=limits.IMPORT_WINDOW_BYTES, zeroes=zeroes):
            payload, last_sequence = encode_batch(
                bytes.fromhex(volume["id"]),
                lineage=lineage,
                epoch=volume["epoch"],
                first_sequence=sequence + 1,
                first_block=offset // BLOCK_BYTES,
                data=data,
            )
            while len(in_flight) >= limits.IMPORT_IN_FLIGHT_MAX:
                await finish_oldest()
            reply = await requests.submit(wire.BATCH, payload, checked_bytes=0)
            in_flight.append((reply, offset + len(data)))
            sequence = last_sequence
        while in_flight:
            await finish_oldest()
    finally:
        await requests.close()
    progress(total_bytes, total_bytes)
    await _check_applied(client, volume, sequence)


async def _check_applied(client: StoreClient, volume: dict[str, Any], sequence: int) -> None:
    shown = (await client.call("volume.show", id=volume["id"]))["volume"]
    if shown["applied_sequence"] != sequence:
        raise StoreError(
            Code.IO,
            f"volume '{volume['name']}' ended at sequence {shown['applied_sequence']}, not"
            f" {sequence}: the import is not complete",
        )


async def export_image(
    address: str,
    name: str,
    path: str,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Export the volume's image at its applied position; returns the volume as exported."""
    client_id = new_id()
    client_name = f"export of {one_line(name)}"
    client = await StoreClient.connect(address, client_id=client_id, client_name=client_name)
    try:
        volume: dict[str, Any] = (await client.call("volume.show", name=name))["volume"]
    finally:
        await client.close()
    writer = ImageWriter(path, volume["size_bytes"], overwrite=overwrite)
    try:
        requests = DataRequests("fetch", name)
        await requests.connect(address, client_id=client_id, client_name=client_name)
        try:
            await _fetch(requests, volume, writer, progress)
        finally:
            await requests.close()
    except BaseException:
        writer.abandon()
        raise
    writer.finish()
    return volume


async def _fetch(
    requests: DataRequests, volume: dict[str, Any], writer: ImageWriter, progress: Progress
) -> None:
    """Every block, several reads in flight, all at one position."""
    volume_id = bytes.fromhex(volume["id"])
    total_bytes = volume["size_bytes"]
    total_blocks = total_bytes // BLOCK_BYTES
    position: tuple[int, int] | None = None
    in_flight: deque[tuple[asyncio.Future[wire.Frame], int, int]] = deque()
    next_block = 0
    while next_block < total_blocks or in_flight:
        if next_block < total_blocks and len(in_flight) < limits.EXPORT_IN_FLIGHT_MAX:
            count = min(lib.MP_READ_BLOCKS_MAX, total_blocks - next_block)
            payload = encode_read(
                volume_id,
                epoch=volume["epoch"],
                minimum_sequence=volume["applied_sequence"],
                first_block=next_block,
                block_count=count,
            )
            in_flight.append((await requests.submit(wire.READ, payload), next_block, count))
            next_block += count
            continue
        future, first_block, count = in_flight.popleft()
        try:
            frame = await future
        except StoreError as error:
            raise (_changed(volume) if error.code == Code.EPOCH else error) from None
        reply = ReadReply(frame, volume_id=volume_id, first_block=first_block, block_count=count)
        position = position or reply.position
        if reply.position != position:
            raise _changed(volume)
        for block, memory, length_bytes in reply.blocks():
            writer.write(block * BLOCK_BYTES, ffi.cast("uint8_t *", memory), length_bytes)
        progress((first_block + count) * BLOCK_BYTES, total_bytes)


def _changed(volume: dict[str, Any]) -> StoreError:
    return StoreError(
        Code.BUSY, f"volume '{volume['name']}' changed while it was exported; close it first"
    )
