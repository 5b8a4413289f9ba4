"""What a configuration file may say: the tables and keys of cache.toml and store.toml.

These classes are the only declaration: the loader (configfile.py), the samples and the reference
(configdoc.py) are made from them.  A class docstring describes its table, `key()` a key.
"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from millpond.cache.settings import Bound

CACHE_FILE = "/etc/millpond/cache.toml"
STORE_FILE = "/etc/millpond/store.toml"


class Size(int):
    """Bytes, written like "400GiB"."""


class Rate(int):
    """Bytes per second, written like "50MiB"."""


class Duration(float):
    """Seconds, written like "30s", or a plain number."""


class Mode(int):
    """Permissions of a file, written like "0660"."""


def key(description: str, example: Any) -> Meta:
    """What a key is for, and a value to show in the sample."""
    return Meta(description=description, examples=[example])


class Table(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all tables: unknown keys are refused."""


class CacheTable(Table, frozen=True, kw_only=True):
    """The cache itself."""

    device: Annotated[
        str,
        key(
            "A partition, a whole SSD (name it by /dev/disk/by-id) or a file, formatted with"
            " `millpond cache format`.",
            "/var/lib/millpond/cache",
        ),
    ]
    stores: Annotated[
        list[str],
        key(
            "Addresses of the stores, each HOST:PORT or unix:/path. A volume lives on one of them.",
            ["127.0.0.1:7711"],
        ),
    ]
    name: Annotated[str, key("Of this cache, in the stores' logs.", "cache")] = "cache"
    read_only: Annotated[bool, key("Guests may not write.", False)] = False
    scrub_rate: Annotated[
        Rate | None,
        key(
            "Background verification of the device reads so much per second, 64KiB to 64MiB, and"
            ' yields to guests; "0" turns it off. 2MiB when not set: 1 TiB in six days.',
            "4MiB",
        ),
    ] = None


class NbdTable(Table, frozen=True, kw_only=True):
    """Where guests connect. Permissions and group of a socket that systemd made are its unit's,
    `millpond-cache.socket`, and the path is the same here and there."""

    socket: Annotated[str, key("Path of the unix socket.", "/run/millpond/nbd.sock")] = (
        "/run/millpond/nbd.sock"
    )
    tcp: Annotated[
        str | None,
        key(
            "Listens there too, HOST:PORT. Loopback only: nothing authenticates clients yet.",
            "127.0.0.1:10809",
        ),
    ] = None
    insecure_listen: Annotated[
        bool, key("Allow a TCP address that others can reach; they have every volume.", False)
    ] = False
    mode: Annotated[Mode, key("Permissions of the socket.", "0660")] = Mode(0o660)
    group: Annotated[
        str | None, key("Group of the socket: whoever may connect may use every volume.", "kvm")
    ] = None
    dead_timeout: Annotated[
        Duration,
        key(
            "I/O to a kernel device (`millpond attach`) waits so long for a cache that is gone,"
            " then fails.",
            "24h",
        ),
    ] = Duration(24 * 3600)


class ControlTable(Table, frozen=True, kw_only=True):
    """Where `millpond status`, `flush` and `cache list` ask."""

    socket: Annotated[str, key("Path of the unix socket.", "/run/millpond/control.sock")] = (
        "/run/millpond/control.sock"
    )
    mode: Annotated[Mode, key("Permissions of the socket.", "0660")] = Mode(0o660)
    group: Annotated[str | None, key("Group of the socket.", "millpond")] = None


class RatesTable(Table, frozen=True, kw_only=True):
    """How fast all volumes of this host together may write to the stores. Not given: no limit."""

    average: Annotated[Rate | None, key("Over any minute, bytes per second.", "50MiB")] = None
    peak: Annotated[Rate | None, key("In any second, bytes per second.", "200MiB")] = None


class VolumeTable(Table, frozen=True, kw_only=True):
    """Shares, rates and bound of one volume. Not given: no minimum, no maximum, no limit."""

    log_min: Annotated[Size | None, key("Log that is kept free for it.", "64MiB")] = None
    log_max: Annotated[
        Size | None, key("Log that it may fill; near the end its writes slow down.", "4GiB")
    ] = None
    slots_min: Annotated[
        Size | None, key("Read cache that others cannot take from it.", "256MiB")
    ] = None
    slots_max: Annotated[Size | None, key("Read cache that it may take.", "100GiB")] = None
    average_rate: Annotated[
        Rate | None, key("To the store, over any minute, bytes per second.", "20MiB")
    ] = None
    peak_rate: Annotated[
        Rate | None, key("To the store, in any second, bytes per second.", "80MiB")
    ] = None
    bound_s: Annotated[
        Duration | None,
        key("How old the oldest write may become that the store does not have.", "30s"),
    ] = None
    bound: Annotated[
        Bound,
        key(
            'What gives way when it is older: "rates" (average first, then peak) or "strict" (the'
            " guest, which is slowed).",
            "rates",
        ),
    ] = Bound.RATES


class CacheFile(Table, frozen=True, kw_only=True):
    """`/etc/millpond/cache.toml`, for `millpond cache serve`."""

    cache: CacheTable
    nbd: NbdTable = msgspec.field(default_factory=NbdTable)
    control: ControlTable = msgspec.field(default_factory=ControlTable)
    rates: RatesTable = msgspec.field(default_factory=RatesTable)
    defaults: VolumeTable = msgspec.field(default_factory=VolumeTable)
    volume: dict[str, VolumeTable] = {}


class StoreTable(Table, frozen=True, kw_only=True):
    """The store itself."""

    directory: Annotated[
        str,
        key(
            "Where it lives; made with `millpond store serve DIR --format`. Its own unix socket is"
            " DIRECTORY/store.sock.",
            "/var/lib/millpond/store",
        ),
    ]
    page_cache: Annotated[
        Size | None,
        key(
            "RAM for maps and extent tables: half for pages that a checkpoint has yet to write,"
            " half for others. 64MiB when not set.",
            "256MiB",
        ),
    ] = None
    scrub_rate: Annotated[
        Rate,
        key(
            "What is stored is read in the background, at most so many bytes per second, to see"
            ' whether it still verifies; clients go first. "0" turns it off. What it finds is in'
            " the log and in `millpond store status`.",
            "32MiB",
        ),
    ] = Rate(8 << 20)
    scrub_every: Annotated[
        Duration,
        key(
            "From the start of one pass over everything to that of the next, at least. One that"
            " takes longer is followed at once: 8MiB per second are 4.6 TiB in a week.",
            "14d",
        ),
    ] = Duration(7 * 86400)
    listen: Annotated[
        list[str],
        key("Addresses besides that socket, each HOST:PORT or unix:/path.", ["127.0.0.1:7711"]),
    ] = []
    insecure_listen: Annotated[
        bool,
        key("Allow TCP addresses that others can reach: nothing authenticates them yet.", False),
    ] = False
    socket_mode: Annotated[Mode, key("Permissions of the unix sockets.", "0660")] = Mode(0o660)
    socket_group: Annotated[str | None, key("Group of the unix sockets.", "millpond")] = None


class StoreFile(Table, frozen=True, kw_only=True):
    """`/etc/millpond/store.toml`, for `millpond store serve`."""

    store: StoreTable


FILES: dict[str, type[CacheFile] | type[StoreFile]] = {"cache": CacheFile, "store": StoreFile}
