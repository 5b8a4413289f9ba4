"""Listening sockets for guests: unix, and TCP on loopback unless the operator insists.

Happy path: listen_unix(path) -> socket that listens; SocketFile.remove() when it is closed.
listen_tcp(address) -> sockets that listen; prepare_tcp(sock) for each connection.
Failure modes: those of store/unixsocket.py, as ListenError; an address that strangers can reach,
that is taken, or that cannot be resolved: ListenError.
"""

import errno
import logging
import os
import socket

from millpond.nbd.errors import ListenError
from millpond.nbd.limits import VANISHED_AFTER_S
from millpond.store.address import Address, check_exposure
from millpond.store.errors import StoreError, one_line
from millpond.store.unixsocket import SocketFile, bind_unix

_log = logging.getLogger(__name__)


def listen_unix(
    path: str, *, mode: int, group: str | int | None, backlog: int
) -> tuple[socket.socket, SocketFile]:
    """Listen at path.  Permissions are set before listen, so nobody can connect in between.

    Raises ListenError.
    """
    try:
        listener, made = bind_unix(path, mode=mode, group=group)
    except StoreError as error:
        raise ListenError(error.message) from None
    try:
        listener.listen(backlog)
    except BaseException:
        listener.close()
        made.remove()
        raise
    return listener, made


def listen_tcp(address: Address, *, insecure_listen: bool, backlog: int) -> list[socket.socket]:
    """Listen on every address that host and port mean (localhost: often two).

    Port 0 is the system's choice: the first socket's name tells it.  Raises ListenError.
    """
    try:
        check_exposure(address, insecure_listen=insecure_listen)
    except StoreError as error:
        raise ListenError(error.message) from None
    if not address.is_loopback:
        _log.warning("NBD listens insecurely on %s: whoever reaches it has every volume", address)
    sockets: list[socket.socket] = []
    try:
        port = address.port
        flags = socket.AI_PASSIVE
        found = socket.getaddrinfo(address.host, port, type=socket.SOCK_STREAM, flags=flags)
        for family, kind, protocol, _, where in dict.fromkeys(found):
            sock = socket.socket(family, kind, protocol)
            sockets.append(sock)
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                sock.bind((where[0], port, *where[2:]))
            except OSError as error:
                # "localhost" has an IPv6 address where IPv6 is switched off, too.
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
                sockets.pop().close()
                continue
            port = port or int(sock.getsockname()[1])
            sock.listen(backlog)
        if not sockets:
            raise OSError(errno.EADDRNOTAVAIL, "")
    except OSError as error:
        for sock in sockets:
            sock.close()
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise ListenError(f"cannot listen on {address}: {one_line(reason)}") from None
    return sockets


def prepare_tcp(sock: socket.socket) -> None:
    """No waiting for more to send; a client that vanished without a word ends in a minute or two.

    Keepalive finds it while the connection is idle, TCP_USER_TIMEOUT while replies are unanswered.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, VANISHED_AFTER_S // 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, VANISHED_AFTER_S // 8)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, VANISHED_AFTER_S * 1000)
