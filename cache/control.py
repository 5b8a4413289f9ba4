"""The control socket: one JSON object per line in, one per line out.

    {"op": "status"}            -> {"ok": true, ...}     see status.py
    {"op": "volumes"}           -> {"ok": true, "volumes": [...], "engine": {...}}: asks no store
    {"op": "flush", "volume": NAME or id, "now": bool}
                                -> {"ok": true, "id": ..., "destaged_sequence": ..., "target": ...}
                                   shipping hurries; the asker watches "volumes"
    {"op": "devices"}, {"op": "attach", "volume": NAME, "device": PATH or "", "read_only": bool},
    {"op": "detach", "volume": NAME or PATH, "force": bool}: kernel devices, see nbd/devices.py
    {"op": "stop"}              -> {"ok": true}, then the daemon stops
    anything else               -> {"ok": false, "code": "E_INVALID", "message": one line}

Rules: permission of the socket file is the authentication (0660).  Lines, connections and idle
time are bounded.  A call never changes what a guest sees, except stop and detach.
Refusals carry a code of CODES, and become the same exception again at the client's end.
Failure modes: a malformed line is answered and the connection goes on; too long a line ends it.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from millpond.cache import limits
from millpond.cache.errors import (
    AlreadyThere,
    CacheAway,
    CacheError,
    NotPermitted,
    StoreAway,
    UnderWay,
    VolumeBusy,
    VolumeUnknown,
    escaped,
)
from millpond.cache.tasks import Tasks
from millpond.store.errors import StoreError
from millpond.store.unixsocket import SOCKET_MODE, SocketFile, bind_unix

log = logging.getLogger("millpond.cache")


class Request(msgspec.Struct, frozen=True):
    """One line; what an operation does not know is ignored (it is from the future)."""

    op: str
    volume: str = ""
    now: bool = False
    device: str = ""
    read_only: bool = False
    force: bool = False


Handler = Callable[[Request], Awaitable[dict[str, Any]]]
# The first that fits names the refusal.
CODES: tuple[tuple[str, type[CacheError]], ...] = (
    ("E_NOT_FOUND", VolumeUnknown),
    ("E_UNDER_WAY", UnderWay),
    ("E_BUSY", VolumeBusy),
    ("E_EXISTS", AlreadyThere),
    ("E_PERMISSION", NotPermitted),
    ("E_UNREACHABLE", StoreAway),
    ("E_FAILED", CacheError),
)


class ControlServer:
    """Serves operations on a unix socket."""

    def __init__(self, handlers: dict[str, Handler], tasks: Tasks) -> None:
        self._handlers = handlers
        self._tasks = tasks
        self._server: asyncio.Server | None = None
        self._file: SocketFile | None = None
        self._connections = 0

    async def listen(
        self, path: str, *, mode: int = SOCKET_MODE, group: str | int | None = None
    ) -> None:
        """Listen; nobody can connect before the socket file has its mode and group."""
        try:
            sock, self._file = bind_unix(path, mode=mode, group=group)
        except StoreError as error:
            raise CacheError(error.message) from None
        self._server = await asyncio.start_unix_server(
            self._connected, sock=sock, limit=limits.CONTROL_LINE_BYTES
        )

    async def close(self) -> None:
        """Stop listening; connections end with the tasks of the daemon."""
        if self._server is not None:
            self._server.close()
        if self._file is not None:
            self._file.remove()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._connections >= limits.CONTROL_CONNECTIONS_MAX or self._tasks.closing:
            writer.close()
            return
        self._connections += 1
        self._tasks.spawn(self._serve(reader, writer), "control-connection")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                async with asyncio.timeout(limits.CONTROL_IDLE_S):
                    line = await reader.readline()
                if not line:
                    return
                writer.write(msgspec.json.encode(await self._answer(line)) + b"\n")
                async with asyncio.timeout(limits.CONTROL_IDLE_S):
                    await writer.drain()
        except (TimeoutError, ConnectionError, ValueError):
            return  # idle, gone, or a line longer than the limit
        finally:
            self._connections -= 1
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = msgspec.json.decode(line, type=Request)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return _refusal("E_INVALID", f"malformed request: {error}")
        handler = self._handlers.get(request.op)
        if handler is None:
            known = ", ".join(sorted(self._handlers))
            return _refusal("E_INVALID", f"unknown op {escaped(request.op)}; known: {known}")
        try:
            return {"ok": True, **await handler(request)}
        except CacheError as error:
            code = next(code for code, kind in CODES if isinstance(error, kind))
            return _refusal(code, str(error))


def _refusal(code: str, message: str) -> dict[str, Any]:
    return {"ok": False, "code": code, "message": message}


async def call(path: str, op: str, *, timeout_s: float = 10.0, **arguments: Any) -> dict[str, Any]:
    """The client's end: one operation, its answer without `ok`.  CacheError with one line."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(path, limit=64 * limits.MIB)
            try:
                writer.write(msgspec.json.encode({"op": op, **arguments}) + b"\n")
                line = await reader.readline()
            finally:
                writer.close()
        reply = msgspec.json.decode(line, type=dict[str, Any])
    except TimeoutError:
        # It lives, and goes on with what it was asked.
        hint = "; see `millpond device list`" if op in ("attach", "detach") else ""
        raise CacheAway(
            f"the cache at {escaped(path)} has not finished after {timeout_s:g} s{hint}"
        ) from None
    except (OSError, ValueError, msgspec.DecodeError) as error:
        reason = (
            os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "no answer"
        )
        raise CacheAway(f"no cache answers at {escaped(path)}: {reason}") from None
    if not reply.pop("ok", False):
        kind = dict(CODES).get(str(reply.get("code")), CacheError)
        raise kind(str(reply.get("message", "refused")))
    return reply
