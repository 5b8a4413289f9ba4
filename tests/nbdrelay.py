"""A relay between an NBD client and a real server that writes down what the client asks for.

    with NbdRelay(path, server_path) as relay:
        ... a client of path ...
        assert relay.count(Command.WRITE, fua=True) == 1

It changes nothing: bytes go both ways as they come. Knows the fixed newstyle handshake and simple
requests; the export must be opened with GO or EXPORT_NAME as the connection's last option.
"""

import socket
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final

from millpond.nbd.wire import CLIENT_FLAGS, OPTION_HEADER, REQUEST, Command, CommandFlag, Option

_LAST_OPTIONS: Final = (Option.EXPORT_NAME, Option.GO)


class _Watcher:
    """The client's side of one connection, bytes in, requests out."""

    def __init__(self, seen: "Counter[tuple[int, bool]]") -> None:
        self._seen = seen
        self._buffer = bytearray()
        self._skip_bytes = CLIENT_FLAGS.size
        self._negotiated = False

    def feed(self, data: bytes) -> None:
        """What the client sent."""
        self._buffer += data
        while self._step():
            pass

    def _step(self) -> bool:
        if self._skip_bytes:
            skipped = min(self._skip_bytes, len(self._buffer))
            del self._buffer[:skipped]
            self._skip_bytes -= skipped
            return skipped > 0
        shape = REQUEST if self._negotiated else OPTION_HEADER
        if len(self._buffer) < shape.size:
            return False
        fields = shape.unpack_from(self._buffer)
        self._skip_bytes = shape.size
        if not self._negotiated:
            _, option, length_bytes = fields
            self._skip_bytes += length_bytes
            self._negotiated = option in _LAST_OPTIONS
            return True
        _, flags, command, _, _, length_bytes = fields
        self._seen[(command, bool(flags & CommandFlag.FUA))] += 1
        self._skip_bytes += length_bytes if command == Command.WRITE else 0
        return True


class NbdRelay:
    """Listens at one unix socket, connects to another for each client."""

    def __init__(self, path: Path, server: Path) -> None:
        self.path = path
        self._server = server
        self._seen: Counter[tuple[int, bool]] = Counter()
        self._listener = socket.socket(socket.AF_UNIX)
        self._sockets: list[socket.socket] = [self._listener]
        self._accepting = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> "NbdRelay":
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._accepting.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self._accepting.join()

    def count(self, command: int, *, fua: bool = False) -> int:
        """How many of these were asked for so far."""
        return self._seen[(command, fua)]

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                self._sockets += [client, server]
                server.connect(str(self._server))
            except OSError:
                return
            watcher = _Watcher(self._seen)
            for arguments in ((client, server, watcher), (server, client, None)):
                threading.Thread(target=_carry, args=arguments, daemon=True).start()


def _carry(source: socket.socket, sink: socket.socket, watcher: _Watcher | None) -> None:
    """One direction, to its end."""
    with suppress(OSError):
        while data := source.recv(1 << 16):
            if watcher is not None:
                watcher.feed(data)
            sink.sendall(data)
    for sock in (source, sink):
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
