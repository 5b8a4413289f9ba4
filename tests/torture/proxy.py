"""A TCP port in front of a store's socket: a network whose connections break and whose bytes stop.

    proxy = Proxy(store_socket)      # proxy.address is what the cache is given
    proxy.cut()                      # every connection, wherever in a frame it is
    proxy.hold(); proxy.let()        # bytes wait in between, as behind a switch that hangs
    proxy.close()

Happy path: bytes pass both ways, a thread each.  Failure modes: the store is away: a connection is
accepted and closed, as by a machine whose daemon is down.
"""

import socket
import threading
from contextlib import suppress
from pathlib import Path

PIECE_BYTES = 1 << 16


class Proxy:
    """Any thread may call anything."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._flows = threading.Event()
        self._flows.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        host, port = self._listener.getsockname()
        self.address = f"{host}:{port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End every connection now; new ones are accepted."""
        with self._lock:
            ends, self._open = self._open, set()
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def hold(self) -> None:
        """Nothing passes any more."""
        self._flows.clear()

    def let(self) -> None:
        """What waited goes on its way."""
        self._flows.set()

    def close(self) -> None:
        """For good."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.let()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            store = socket.socket(socket.AF_UNIX)
            try:
                store.connect(str(self._target))
            except OSError:
                client.close()
                store.close()
                continue
            with self._lock:
                self._open |= {client, store}
            pair = _Pair(client, store)
            for source, sink in ((client, store), (store, client)):
                threading.Thread(target=self._pump, args=[pair, source, sink], daemon=True).start()

    def _pump(self, pair: "_Pair", source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(PIECE_BYTES):
                self._flows.wait()
                sink.sendall(data)
        with self._lock:
            self._open -= {source, sink}
        pair.one_ended()


class _Pair:
    """Both ends of one connection; closed when nobody uses them any more."""

    def __init__(self, *ends: socket.socket) -> None:
        self._ends = ends
        self._lock = threading.Lock()
        self._users = 2

    def one_ended(self) -> None:
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._users -= 1
            if self._users:
                return
        for end in self._ends:
            end.close()
