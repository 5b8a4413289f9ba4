"""An NBD transmission server over a bytearray: slow, complete, and obviously right.

It takes over sockets as the engine does, so it lets nbd/ be tested without the engine; and it is
the oracle for tests/hostile: what it answers is what the engine must answer.  One thread per
connection, one request at a time, one lock per disk.
"""

import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field

from millpond.cache.exports import Agreed, Export, ExportError, OnClosed
from millpond.nbd import wire
from millpond.nbd.handshake import transmission_flags
from millpond.nbd.limits import PAYLOAD_BYTES_MAX
from millpond.nbd.wire import Command, CommandFlag, Error, TransmissionFlag

_ALLOWED = {  # flags beside FUA
    Command.READ: 0,
    Command.WRITE: 0,
    Command.FLUSH: 0,
    Command.TRIM: 0,
    Command.WRITE_ZEROES: CommandFlag.NO_HOLE,
}
_NEEDS = {
    Command.FLUSH: TransmissionFlag.SEND_FLUSH,
    Command.TRIM: TransmissionFlag.SEND_TRIM,
    Command.WRITE_ZEROES: TransmissionFlag.SEND_WRITE_ZEROES,
}
_MUTATIONS = (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)
_DISCARD_BYTES = 1 << 20


@dataclass
class MemoryDisk:
    """Bytes of one export, and the connections that serve them."""

    export: Export
    data: bytearray = field(init=False)
    lock: threading.Lock = field(default_factory=threading.Lock)
    threads: list[threading.Thread] = field(default_factory=list)
    sockets: list[socket.socket] = field(default_factory=list)
    released: int = 0

    def __post_init__(self) -> None:
        self.data = bytearray(self.export.size_bytes)

    def serve(self, descriptor: int, received: bytes) -> None:
        """Own a connected socket in its transmission phase."""
        sock = socket.socket(fileno=descriptor)
        sock.setblocking(True)
        self.sockets.append(sock)
        thread = threading.Thread(target=_Transmission(self, sock, received).run)
        self.threads.append(thread)
        thread.start()

    def stop(self) -> None:
        """End all connections and wait for their threads."""
        for sock in self.sockets:
            with suppress(OSError):  # it ended by itself
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(timeout=10)
            assert not thread.is_alive()


class MemoryExports:
    """Exports over memory disks; "" is the only one, if there is only one."""

    def __init__(self, *exports: Export) -> None:
        self.disks = {export.name: MemoryDisk(export) for export in exports}
        self.refusal: ExportError | None = None
        self.opened = 0

    def names(self) -> list[str]:
        """For LIST."""
        return list(self.disks)

    async def describe(self, name: str) -> Export:
        """For INFO."""
        return self._disk(name).export

    async def open(self, name: str) -> "MemoryOpenExport":
        """For GO and EXPORT_NAME."""
        disk = self._disk(name)
        self.opened += 1
        return MemoryOpenExport(disk)

    def stop(self) -> None:
        """End all connections of all disks."""
        for disk in self.disks.values():
            disk.stop()

    def _disk(self, name: str) -> MemoryDisk:
        if self.refusal is not None:
            raise self.refusal
        if name == "" and len(self.disks) == 1:
            return next(iter(self.disks.values()))
        if name not in self.disks:
            raise ExportError("unknown", f"there is no volume {name!a}")
        return self.disks[name]


class MemoryOpenExport:
    """One client's hold on a memory disk."""

    def __init__(self, disk: MemoryDisk) -> None:
        self.export = disk.export
        self._disk = disk

    def handover(
        self, sock: socket.socket, received: bytes, agreed: Agreed, closed: OnClosed = None
    ) -> None:
        """Start the transmission thread; it owns the descriptor."""
        self._disk.serve(sock.detach(), received)

    async def release(self) -> None:
        """Counted, so that tests can ask."""
        self._disk.released += 1


class _Transmission:
    """One connection; requests are answered in order, each before the next is read."""

    def __init__(self, disk: MemoryDisk, sock: socket.socket, received: bytes) -> None:
        self._disk = disk
        self._sock = sock
        self._received = bytearray(received)
        self._flags = transmission_flags(disk.export)

    def run(self) -> None:
        """Until DISC, the end of the stream or a broken frame."""
        with self._sock:
            try:
                while self._request():
                    pass
            except OSError:
                pass  # the client is gone

    def _request(self) -> bool:
        header = self._take(wire.REQUEST.size)
        if header is None:
            return False
        magic, flags, command, cookie, offset, length_bytes = wire.REQUEST.unpack(header)
        if magic != wire.REQUEST_MAGIC or command == Command.DISC:
            return False
        payload: bytes | None = b""
        error = self._judge(flags, command, offset, length_bytes)
        if command == Command.WRITE:
            too_long = length_bytes > PAYLOAD_BYTES_MAX
            payload = self._discard(length_bytes) if too_long else self._take(length_bytes)
        if payload is None:
            return False
        data = b""
        if error is Error.OK:
            data = self._perform(command, offset, length_bytes, payload)
        self._sock.sendall(wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, error, cookie) + data)
        return True

    def _judge(self, flags: int, command: int, offset: int, length_bytes: int) -> Error:
        """The error that a request deserves before anything is done."""
        if command not in _ALLOWED:
            return Error.EINVAL
        # int: the complement of an IntFlag has only the bits that have names.
        if flags & ~int(_ALLOWED[Command(command)] | CommandFlag.FUA):
            return Error.EINVAL
        if command in _MUTATIONS and TransmissionFlag.READ_ONLY in self._flags:
            return Error.EPERM
        if command in _NEEDS and _NEEDS[Command(command)] not in self._flags:
            return Error.EINVAL
        if command == Command.FLUSH:
            return Error.OK
        if command in (Command.READ, Command.WRITE) and length_bytes > PAYLOAD_BYTES_MAX:
            return Error.EINVAL
        if offset + length_bytes > self._disk.export.size_bytes:
            past_end_is_full = command in (Command.WRITE, Command.WRITE_ZEROES)
            return Error.ENOSPC if past_end_is_full else Error.EINVAL
        return Error.OK

    def _perform(self, command: int, offset: int, length_bytes: int, payload: bytes) -> bytes:
        with self._disk.lock:
            if command == Command.READ:
                return bytes(self._disk.data[offset : offset + length_bytes])
            if command == Command.WRITE:
                self._disk.data[offset : offset + length_bytes] = payload
            elif command in (Command.TRIM, Command.WRITE_ZEROES):
                self._disk.data[offset : offset + length_bytes] = bytes(length_bytes)
        return b""

    def _take(self, length_bytes: int) -> bytes | None:
        """Exactly so many bytes; None at the end of the stream."""
        while len(self._received) < length_bytes:
            data = self._sock.recv(1 << 20)
            if not data:
                return None
            self._received += data
        taken = bytes(self._received[:length_bytes])
        del self._received[:length_bytes]
        return taken

    def _discard(self, length_bytes: int) -> bytes | None:
        """Read and drop a payload that is too long, to stay in step with the client."""
        while length_bytes:
            piece = self._take(min(length_bytes, _DISCARD_BYTES))
            if piece is None:
                return None
            length_bytes -= len(piece)
        return b""
