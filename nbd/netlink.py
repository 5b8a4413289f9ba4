"""The kernel's generic netlink family "nbd": connect, reconfigure, disconnect.

Rules: worker threads only, every call may block (CONNECT for tens of milliseconds, DISCONNECT while
a socket's buffer is full).  pyroute2 runs an asyncio loop of its own inside and cannot run it on
uvloop: it works because no loop policy is installed.  It is imported on first use, because that
takes as long as the rest of the start, and most daemons never attach anything.

Attributes and their meaning: linux/include/uapi/linux/nbd-netlink.h, drivers/block/nbd.c.

Happy path: connect(...) -> index; reconfigure(index, ...); disconnect(index).
Failure modes: the family is missing, no CAP_SYS_ADMIN, the device is taken, anything else that the
kernel or pyroute2 says: each a CacheError of one line.  When an answer is lost, what was asked for
may have happened.
"""

import errno
import functools
import os
import socket
import threading
from typing import Any, Final

from millpond.cache.errors import CacheError, NotPermitted, VolumeBusy

FAMILY: Final = "nbd"
_CONNECT: Final = 1
_DISCONNECT: Final = 2
_RECONFIGURE: Final = 3

# pyroute2 has 180 addresses for the sockets of one process, and the kernel answers one message of
# this family at a time anyway.
AT_A_TIME: Final = 8

Attributes = list[tuple[str, Any]]

_turns = threading.BoundedSemaphore(AT_A_TIME)


def connect(
    sock: socket.socket,
    *,
    index: int | None,
    size_bytes: int,
    block_bytes: int,
    server_flags: int,
    dead_timeout_s: int,
    backend: str,
) -> int:
    """Make a device of a connected socket; which one.  The kernel takes its own reference.

    index: None is the first unused device.  TIMEOUT 0: with one socket, the kernel waits for a slow
    server for ever; it never kills the connection of one that lives.
    """
    attributes: Attributes = [
        ("NBD_ATTR_SIZE_BYTES", size_bytes),
        ("NBD_ATTR_BLOCK_SIZE_BYTES", block_bytes),
        ("NBD_ATTR_TIMEOUT", 0),
        ("NBD_ATTR_SERVER_FLAGS", server_flags),
        ("NBD_ATTR_DEAD_CONN_TIMEOUT", dead_timeout_s),
        ("NBD_ATTR_BACKEND_IDENTIFIER", backend),
        _sockets(sock),
    ]
    if index is not None:
        attributes.insert(0, ("NBD_ATTR_INDEX", index))
    label = f"/dev/nbd{index}" if index is not None else "a device"
    for reply in _request(_CONNECT, attributes, label):
        found = reply.get_attr("NBD_ATTR_INDEX")
        if found is not None:
            return int(found)
    raise CacheError("the kernel connected a device and did not say which")


def reconfigure(
    index: int,
    *,
    backend: str,
    sock: socket.socket | None = None,
    size_bytes: int | None = None,
    dead_timeout_s: int | None = None,
) -> None:
    """Give a device a new socket in the dead one's place, or another size; never both.

    A socket is ignored without a word while the old one lives: its other end is closed then.
    """
    assert sock is None or size_bytes is None, "the size waits for what the socket would serve"
    attributes: Attributes = [
        ("NBD_ATTR_INDEX", index),
        ("NBD_ATTR_BACKEND_IDENTIFIER", backend),
    ]
    if size_bytes is not None:
        attributes.append(("NBD_ATTR_SIZE_BYTES", size_bytes))
    if dead_timeout_s is not None:
        attributes.append(("NBD_ATTR_DEAD_CONN_TIMEOUT", dead_timeout_s))
    if sock is not None:
        attributes.append(_sockets(sock))
    _request(_RECONFIGURE, attributes, f"/dev/nbd{index}")


def disconnect(index: int) -> None:
    """End a device: what it has in flight and what still waits fails."""
    _request(_DISCONNECT, [("NBD_ATTR_INDEX", index)], f"/dev/nbd{index}")


def load() -> None:
    """Import what takes long now."""
    _messages()


def _sockets(sock: socket.socket) -> tuple[str, Any]:
    item = {"attrs": [("NBD_SOCK_FD", sock.fileno())]}
    return "NBD_ATTR_SOCKETS", {"attrs": [("NBD_SOCK_ITEM", item)]}


def _request(command: int, attributes: Attributes, label: str) -> list[Any]:
    """One request and its replies."""
    from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST
    from pyroute2.netlink.exceptions import NetlinkError
    from pyroute2.netlink.generic import GenericNetlinkSocket

    kind = _messages()
    try:
        with _turns, GenericNetlinkSocket() as netlink:
            try:
                netlink.bind(FAMILY, kind)
            except NetlinkError as error:
                raise refusal(error.code, label, binding=True) from None
            message = kind()
            message["cmd"] = command
            message["version"] = 1
            message["attrs"] = attributes
            flags = NLM_F_REQUEST | NLM_F_ACK
            return list(netlink.nlm_request(message, msg_type=netlink.prid, msg_flags=flags))
    except NetlinkError as error:
        raise refusal(error.code, label) from None
    except OSError as error:
        raise refusal(error.errno or errno.EIO, label) from None
    except CacheError:
        raise
    except Exception as error:  # pyroute2 has no list of what it raises: KeyError, for one
        reason = f"{type(error).__name__}: {error}"
        raise CacheError(f"no answer of the kernel about {label}: {reason}") from error


def refusal(code: int, label: str, *, binding: bool = False) -> CacheError:
    """What the kernel's no means for an operator."""
    code = abs(code)
    if binding and code == errno.ENOENT:
        return CacheError("this kernel has no NBD driver loaded: modprobe nbd")
    if code in (errno.EPERM, errno.EACCES):
        return NotPermitted(
            "this cache may not attach kernel devices: it needs CAP_SYS_ADMIN, run it as root"
        )
    if code == errno.EBUSY:
        return VolumeBusy(f"{label} is in use by another NBD client")
    return CacheError(f"the kernel refuses {label}: {os.strerror(code)}")


@functools.cache
def _messages() -> Any:
    """The class of this family's messages, for pyroute2."""
    from pyroute2.netlink import genlmsg, nla

    class NbdMessage(genlmsg):  # type: ignore[misc]  # pyroute2 is untyped
        prefix = "NBD_ATTR_"
        nla_map = (
            ("NBD_ATTR_UNSPEC", "none"),
            ("NBD_ATTR_INDEX", "uint32"),
            ("NBD_ATTR_SIZE_BYTES", "uint64"),
            ("NBD_ATTR_BLOCK_SIZE_BYTES", "uint64"),
            ("NBD_ATTR_TIMEOUT", "uint64"),
            ("NBD_ATTR_SERVER_FLAGS", "uint64"),
            ("NBD_ATTR_CLIENT_FLAGS", "uint64"),
            ("NBD_ATTR_SOCKETS", "sockets"),
            ("NBD_ATTR_DEAD_CONN_TIMEOUT", "uint64"),
            ("NBD_ATTR_DEVICE_LIST", "none"),
            ("NBD_ATTR_BACKEND_IDENTIFIER", "asciiz"),
        )

        class sockets(nla):  # type: ignore[misc]
            nla_map = (("NBD_SOCK_ITEM_UNSPEC", "none"), ("NBD_SOCK_ITEM", "item"))

            class item(nla):  # type: ignore[misc]
                nla_map = (("NBD_SOCK_UNSPEC", "none"), ("NBD_SOCK_FD", "uint32"))

    return NbdMessage
