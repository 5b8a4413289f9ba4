"""Where a store listens: "unix:/path", "host:port", "tcp:host:port", "[v6]:port".

TCP without authentication is for this machine alone: `is_loopback` decides what may be bound
without `--insecure-listen`. Only literal addresses and "localhost" count as loopback: what a name
resolves to is not ours to trust.
"""

import asyncio
import ipaddress
import os
import socket
from dataclasses import dataclass

from millpond.store import limits
from millpond.store.errors import Code, StoreError, Unreachable, one_line

UNIX_PATH_MAX_BYTES = 107  # sun_path of Linux, without the final NUL


@dataclass(frozen=True, slots=True)
class Address:
    """path for a unix socket, else host and port."""

    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Reachable from this machine only."""
        if self.path or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.partition("%")[0]).is_loopback
        except ValueError:
            return False


def parse_address(text: str) -> Address:
    """The address a person wrote; StoreError E_INVALID says how to write it."""
    shown = one_line(text)
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path or "\0" in path:
            raise StoreError(Code.INVALID, f"{shown!r} names no socket; write unix:/path")
        if len(os.fsencode(path)) > UNIX_PATH_MAX_BYTES:
            raise StoreError(
                Code.INVALID,
                f"{shown!r} is longer than the {UNIX_PATH_MAX_BYTES} bytes a unix socket may have",
            )
        return Address(path=path)
    host, colon, port = text.removeprefix("tcp:").rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise StoreError(
            Code.INVALID, f"{shown!r} is no address; write unix:/path, HOST:PORT or tcp:HOST:PORT"
        )
    return Address(host=host, port=int(port))


def check_exposure(address: Address, *, insecure_listen: bool) -> None:
    """Refuse to listen where strangers could reach us, unless the operator insists."""
    if not address.is_loopback and not insecure_listen:
        raise StoreError(
            Code.INVALID,
            f"{address} is reachable from the network and nothing authenticates clients;"
            " listen on 127.0.0.1, or insist with --insecure-listen",
        )


async def connect_transport(address: Address, protocol: asyncio.BaseProtocol) -> None:
    """Connect a protocol, with a time-out; Unreachable (or E_PERMISSION) names the address."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(limits.CONNECT_TIMEOUT_S):
            if address.path:
                await loop.create_unix_connection(lambda: protocol, address.path)
            else:
                await loop.create_connection(lambda: protocol, address.host, address.port)
    except PermissionError:
        raise StoreError(
            Code.PERMISSION, f"no permission to use the store at {address}; join its group"
        ) from None
    except TimeoutError:
        raise Unreachable(f"the store at {address} did not answer; is it running?") from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise Unreachable(f"cannot reach the store at {address}: {one_line(reason)}") from None


def keep_alive(transport: asyncio.BaseTransport) -> None:
    """Let TCP notice a peer that vanished without a word (60 s idle, then 4 probes)."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
