"""Every limit of this room, with its reason and its relations to the others.

A guest's connection is trusted with its own volume and with nothing else: it may not use up
memory, descriptors or patience of the process that serves the other guests.
"""

from dataclasses import dataclass

from millpond.nbd.wire import OPTION_HEADER, STRING_BYTES_MAX

# What INFO_BLOCK_SIZE says.  Minimum 1: any alignment is served, partial blocks are merged in
# the engine.  Preferred: the block of the formats (4 KiB).  Maximal payload: what the kernel's
# client sends at most, and the default that a client without this information may assume.
BLOCK_BYTES_MIN = 1
BLOCK_BYTES_PREFERRED = 4096
PAYLOAD_BYTES_MAX = 32 << 20

# A TCP client that answers nothing for so long is gone.  Longer than a switch that reboots, short
# enough that its connections do not pile up.
VANISHED_AFTER_S = 120

# Kernel devices.  With no daemon, the kernel lets I/O wait for so long, then fails it: longer than
# any repair that somebody is at work on (ydb's block store has the same day).
DEAD_TIMEOUT_S = 24 * 3600
# A start waits so long for its devices to be served, then says that it is ready all the same.
ADOPT_WAIT_S = 5.0
# A volume that is not what its device was is looked at again so often: to look, it is opened, which
# is a new epoch at its stores each time.
REFUSED_WAIT_S = 60.0
# A connection that lived for so long was no failed attempt.
SETTLED_S = 5.0
# A device that somebody kept open is looked at so often after its detach, until it is let go.
HELD_POLL_S = 1.0
# After DISCONNECT the engine answers what it has; then its end closes.
DETACH_WAIT_S = 10.0
# How late a device grows with its volume: one call to each store for all of them.
GROW_POLL_S = 5.0
# Whoever closes a device makes udev look at it: a detach waits so long for that to pass.
UDEV_WAIT_S = 2.0
UDEV_POLL_S = 0.1
# Before a volume is looked for by its name, the stores are asked for renames.  One that is silent
# for so long is away, and what is known stands.
NAMES_WAIT_S = 2.0
# Of each direction of a device's socket: one large request fits; more than the usual 208 KiB only
# where net.core.wmem_max permits it.
SOCKET_BUFFER_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class NbdLimits:
    """Limits of one NbdServer; the defaults ship, tests shrink them."""

    # One option's data.  Two strings of the longest kind and all info kinds fit many times.
    option_data_bytes_max: int = 64 << 10
    # Options of one handshake, and more for each listed export, because `nbdinfo --list` asks
    # for INFO on every one of them.
    options_max: int = 64
    options_per_listed_export: int = 8
    # One receive.  What is read beyond the last option goes to the engine in one piece.
    receive_bytes: int = 64 << 10
    # Handshakes at a time; more wait in the listen backlog.  Idle ones end by the deadline.
    handshakes_max: int = 64
    # Connections of all exports, those in the engine included.  Beyond it: accepted and closed.
    connections_max: int = 1024
    # Clients that connect without blocking (libnbd) fail at once when the backlog is full.
    listen_backlog: int = 1024
    # How long one handshake may wait for its client, all waits together (qemu: 10 s too).
    client_timeout_s: float = 10.0
    # How long an export may take to be described or opened: a store that does not answer.
    export_timeout_s: float = 30.0
    # How long close() lets handshakes finish that are under way.
    drain_timeout_s: float = 2.0
    # Pause after accept failed (out of descriptors): without it the loop would spin.
    accept_pause_s: float = 0.5

    def __post_init__(self) -> None:
        """The relations that the code relies on."""
        assert self.option_data_bytes_max >= 2 * STRING_BYTES_MAX
        assert self.options_max >= 1
        assert self.handshakes_max <= self.connections_max
        assert min(self.client_timeout_s, self.export_timeout_s, self.accept_pause_s) > 0

    @property
    def buffered_bytes_max(self) -> int:
        """What one handshake holds at most: an option that lacks its last byte, and a receive."""
        return OPTION_HEADER.size + self.option_data_bytes_max + self.receive_bytes
