"""A listening unix socket for guests.

Happy path: listen_unix(path) -> socket that listens; SocketFile.remove() when it is closed.
Failure modes: those of store/unixsocket.py, as ListenError.
"""

import socket

from millpond.nbd.errors import ListenError
from millpond.store.errors import StoreError
from millpond.store.unixsocket import SocketFile, bind_unix


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
