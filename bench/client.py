"""One NBD connection that does nothing but wait for its replies: first requests, idle guests.

Failure modes: a refused or lost connection is an OSError; an error reply too.
"""

import socket
import struct
import time
from pathlib import Path

OPTION_MAGIC, REQUEST_MAGIC, REPLY_MAGIC = 0x49484156454F5054, 0x25609513, 0x67446698
EXPORT_NAME, READ, WRITE = 1, 0, 1  # of NBD's options and commands


class Client:
    """Connected to one export of a unix socket."""

    def __init__(self, path: Path, export: str, timeout_s: float = 60) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout_s)
        try:
            self.socket.connect(str(path))
            self._receive(18)
            name = export.encode()
            self.socket.sendall(struct.pack(">IQII", 3, OPTION_MAGIC, EXPORT_NAME, len(name)))
            self.socket.sendall(name)
            self.size_bytes, _ = struct.unpack(">QH", self._receive(10))
        except OSError:
            self.socket.close()
            raise

    def _receive(self, length_bytes: int) -> bytes:
        received = b""
        while len(received) < length_bytes:
            more = self.socket.recv(length_bytes - len(received))
            if not more:
                raise ConnectionResetError("the server closed the connection")
            received += more
        return received

    def _request(self, command: int, offset_bytes: int, length_bytes: int, data: bytes) -> None:
        header = struct.pack(">IHHQQI", REQUEST_MAGIC, 0, command, 1, offset_bytes, length_bytes)
        self.socket.sendall(header + data)
        magic, error, _ = struct.unpack(">IIQ", self._receive(16))
        if magic != REPLY_MAGIC or error:
            raise OSError(error, "the request failed")

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Read and wait."""
        self._request(READ, offset_bytes, length_bytes, b"")
        return self._receive(length_bytes)

    def write(self, offset_bytes: int, data: bytes) -> None:
        """Write and wait."""
        self._request(WRITE, offset_bytes, len(data), data)

    def close(self) -> None:
        """Without goodbye, as a guest that ends."""
        self.socket.close()


def connect_soon(path: Path, export: str, *, timeout_s: float) -> Client:
    """Try again and again until the server is there."""
    end = time.perf_counter() + timeout_s
    while True:
        try:
            return Client(path, export, timeout_s=timeout_s)
        except OSError:
            if time.perf_counter() > end:
                raise
            time.sleep(0.01)
