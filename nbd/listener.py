"""A listening unix socket with the right permissions, at a path that a crash may have left behind.

Happy path:
    listen_unix(path) -> socket that listens; UnixPath.remove() when it is closed
Failure modes:
    somebody answers at the path   -> ListenError: two servers of one path would hide each other
    a dead socket file at the path -> replaced
    anything else at the path      -> ListenError; we do not delete what we did not make
"""

import grp
import os
import socket
import stat
from dataclasses import dataclass

from millpond.nbd.errors import ListenError


@dataclass(frozen=True)
class UnixPath:
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


def listen_unix(
    path: str, *, mode: int, group: str | int | None, backlog: int
) -> tuple[socket.socket, UnixPath]:
    """Listen at path.  Permissions are set before listen, so nobody can connect in between.

    Raises ListenError.
    """
    group_id = -1 if group is None else _group_id(path, group)
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        listener.bind(path)
        made = os.lstat(path)
        os.chmod(path, mode)
        os.chown(path, -1, group_id)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise ListenError(f"cannot listen on {path!a}: {error.strerror or error}") from error
    except BaseException:
        listener.close()
        raise
    return listener, UnixPath(path, made.st_dev, made.st_ino)


def _group_id(path: str, group: str | int) -> int:
    if isinstance(group, int):
        return group
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        reason = f"there is no group {group!a}; create it or name another"
        raise ListenError(f"cannot listen on {path!a}: {reason}") from None


def _remove_stale(path: str) -> None:
    """Remove a socket file that nobody listens on."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ListenError(f"cannot listen on {path!a}: {error.strerror}") from error
    if not stat.S_ISSOCK(found.st_mode):
        reason = "a file that is not a socket is there; move it away or choose another path"
        raise ListenError(f"cannot listen on {path!a}: {reason}")
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
            raise ListenError(f"cannot listen on {path!a}: {error.strerror}") from error
    reason = "another process serves there; stop it or choose another path"
    raise ListenError(f"cannot listen on {path!a}: {reason}")
