"""One way to make a listening unix socket, for every daemon: the store, guests, the control socket.

Rules: permissions and group are set between bind and listen, so nobody can connect before them.
The socket is bound at its final path, not renamed into place: tools show the right name.  A dead
socket file, recognised by its refusal, is replaced; a full backlog is a sign of life.

Happy path: bind_unix(path, mode=, group=) -> (socket, SocketFile); listen; SocketFile.remove().
Failure modes, each a StoreError with one line:
    somebody answers at the path   -> E_BUSY: two servers of one path would hide each other
    anything else at the path      -> E_EXISTS: we do not delete what we did not make
    no such group, no permission   -> E_NOT_FOUND, E_PERMISSION
"""

import grp
import os
import socket
import stat
from dataclasses import dataclass

from millpond.store.errors import Code, StoreError

SOCKET_MODE = 0o660  # owner and group; whoever may connect may do everything


@dataclass(frozen=True, slots=True)
class SocketFile:
    """A socket file that we made, by identity: the path may be somebody else's by now."""

    path: str
    device: int
    inode: int

    def remove(self) -> None:
        """Remove the file if it is still ours."""
        try:
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == (self.device, self.inode):
                os.unlink(self.path)
        except FileNotFoundError:
            pass


def bind_unix(
    path: str, *, mode: int = SOCKET_MODE, group: str | int | None = None
) -> tuple[socket.socket, SocketFile]:
    """A non-blocking socket bound at path, not listening yet; group None: the process's own."""
    group_id = -1 if group is None else _group_id(path, group)
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setblocking(False)
        listener.bind(path)
        made = os.lstat(path)
        os.chmod(path, mode)
        os.chown(path, -1, group_id)
    except OSError as error:
        listener.close()
        raise _cannot(path, error) from None
    except BaseException:
        listener.close()
        raise
    return listener, SocketFile(path, made.st_dev, made.st_ino)


def _group_id(path: str, group: str | int) -> int:
    if isinstance(group, int):
        return group
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise StoreError(
            Code.NOT_FOUND,
            f"cannot listen on {path!a}: there is no group {group!a}; create it or name another",
        ) from None


def _remove_stale(path: str) -> None:
    """Remove a socket file that nobody listens on."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _cannot(path, error) from None
    if not stat.S_ISSOCK(found.st_mode):
        raise StoreError(
            Code.EXISTS,
            f"cannot listen on {path!a}: a file that is not a socket is there; move it away or"
            " choose another path",
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # Non-blocking: a live server whose backlog is full answers EAGAIN, a dead one refuses.
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            pass
        except OSError as error:
            raise _cannot(path, error) from None
    raise StoreError(
        Code.BUSY,
        f"cannot listen on {path!a}: another process serves there; stop it or choose another path",
    )


def _cannot(path: str, error: OSError) -> StoreError:
    code = Code.PERMISSION if isinstance(error, PermissionError) else Code.IO
    reason = os.strerror(error.errno) if error.errno else str(error)
    return StoreError(code, f"cannot listen on {path!a}: {reason}")
