"""`millpond device xml VOL`: the disk of a guest as libvirt wants to read it.

Two ways to a volume: `block`, the kernel's device behind a stable link, which everything takes, and
`nbd`, qemu's own client at our socket, one layer less.  In both flushes reach us (cache=none leaves
them to the guest and nothing in the host's page cache), trims do, and zeroes become trims.
Failure modes: a volume that neither the cache nor its stores know; no cache at the control socket.
"""

import re
import xml.etree.ElementTree as ElementTree
from typing import Annotated, Any, Final

import typer

from millpond.cache.control import call
from millpond.cache.errors import CacheError, VolumeUnknown
from millpond.cli.foreground import expected_errors
from millpond.cli.map import HostControlOption
from millpond.cli.output import note, parse_duration_s
from millpond.cli.run import USAGE, CommandError, run
from millpond.cli.status import CONTROL_SOCKET
from millpond.nbd.devicelinks import link_name
from millpond.store.catalogue import new_id
from millpond.store.client import StoreClient
from millpond.store.errors import Code, StoreError

NBD_SOCKET: Final = "/run/millpond/nbd.sock"
LINKS: Final = "/dev/millpond/"
# virtio carries 20 bytes of a serial: 80 of a volume's 128 random bits.
SERIAL_CHARACTERS: Final = 20
BUS_OF: Final = {"vd": "virtio", "sd": "scsi"}


def register(device: typer.Typer) -> None:
    """Add the verb to the noun `device`."""
    device.command("xml")(device_xml)


def device_xml(
    volume: Annotated[str, typer.Argument(help="name of the volume", metavar="VOL")],
    mode: Annotated[str, typer.Option("--mode", metavar="block|nbd")] = "block",
    target: Annotated[str, typer.Option("--target", help="name in the guest's XML")] = "vdb",
    read_only: Annotated[bool, typer.Option("--read-only", help="for the guest")] = False,
    socket: Annotated[
        str, typer.Option("--socket", help="of the cache, for --mode nbd", metavar="PATH")
    ] = NBD_SOCKET,
    reconnect_delay: Annotated[
        str, typer.Option("--reconnect-delay", help="for --mode nbd; 0s leaves it out")
    ] = "60s",
    control: HostControlOption = CONTROL_SOCKET,
) -> None:
    """Print the <disk> element of a volume for `virsh edit` and `virsh attach-device`."""
    if mode not in ("block", "nbd"):
        raise CommandError(f"--mode is block or nbd, not {mode!r}", exit_code=USAGE)
    if not re.fullmatch(r"(vd|sd)[a-z]{1,3}", target):
        raise CommandError(f"--target is like vdb or sdb, not {target!r}", exit_code=USAGE)
    delay_s = round(parse_duration_s(reconnect_delay))
    with expected_errors():
        volume_id = run(id_of(control, volume))
    disk = element(
        volume,
        volume_id,
        target=target,
        read_only=read_only,
        nbd=(socket, delay_s) if mode == "nbd" else None,
    )
    if mode == "nbd" and delay_s:
        note(
            "libvirt before 11.3 ignores <reconnect>: its guests would get I/O errors when the"
            " cache restarts; use --mode block there"
        )
    print(disk)


async def id_of(control: str, name: str) -> str:
    """The id of a volume: from the cache when it uses it, else from the cache's stores."""
    status = await call(control, "status")
    ids = {str(volume["id"]) for volume in status["volumes"] if volume["name"] == name}
    trouble: StoreError | None = None
    for store in status["stores"] if not ids else ():
        try:
            ids.add(await _id_at(store["address"], name))
        except StoreError as error:
            if error.code != Code.NOT_FOUND:
                trouble = error
    if len(ids) == 1:
        return ids.pop()
    if ids:
        raise CacheError(f"two stores have a volume {name!r} each; rename one of them")
    if trouble is not None:
        raise trouble
    raise VolumeUnknown(f"no store of this cache has a volume {name!r}")


async def _id_at(address: str, name: str) -> str:
    client = await StoreClient.connect(address, client_id=new_id(), client_name="millpond")
    try:
        shown: dict[str, Any] = await client.call("volume.show", name=name)
        return str(shown["volume"]["id"])
    finally:
        await client.close()


def element(
    volume: str, volume_id: str, *, target: str, read_only: bool, nbd: tuple[str, int] | None
) -> str:
    """The element as text; nbd: socket path and reconnect delay in seconds, None: the device."""
    kind = "block" if nbd is None else "network"
    disk = ElementTree.Element("disk", type=kind, device="disk")
    driver = {"name": "qemu", "type": "raw", "cache": "none"}
    if nbd is None:
        driver["io"] = "native"
    ElementTree.SubElement(disk, "driver", driver, discard="unmap", detect_zeroes="unmap")
    if nbd is None:
        link = LINKS + link_name(volume, bytes.fromhex(volume_id))
        ElementTree.SubElement(disk, "source", dev=link)
    else:
        path, delay_s = nbd
        source = ElementTree.SubElement(disk, "source", protocol="nbd", name=volume)
        ElementTree.SubElement(source, "host", transport="unix", socket=path)
        if delay_s:
            ElementTree.SubElement(source, "reconnect", delay=str(delay_s))
    ElementTree.SubElement(disk, "target", dev=target, bus=BUS_OF[target[:2]])
    if read_only:
        ElementTree.SubElement(disk, "readonly")
    ElementTree.SubElement(disk, "serial").text = volume_id[:SERIAL_CHARACTERS]
    ElementTree.indent(disk)
    return ElementTree.tostring(disk, encoding="unicode")
