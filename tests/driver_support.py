"""Drive any struct mp_driver from a test: queue operations, turn, collect what completed.

Happy path: Harness(driver), write/read/sync and so on block; queue + submit + collect do not.
Failure modes: negative results are returned, not raised: tests assert on them.
"""

from dataclasses import dataclass
from typing import Any

from millpond.native import ffi, lib
from millpond.native.drivers import Op

BLOCK = lib.MP_BLOCK_BYTES
PAUSE_NS = 1_000_000_000


@dataclass(frozen=True)
class Event:
    """A completed operation (op, result) or, with op 0, a ready socket (ready)."""

    cookie: int
    op: int
    ready: int
    result: int


class Harness:
    """One driver under test."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self._test = lib.mp_driver_test_new(driver)
        self._cookie = 1 << 32
        self.ended = False

    def close(self) -> None:
        """Free the harness and destroy the driver."""
        lib.mp_driver_test_free(self._test)
        lib.mp_driver_destroy(self.driver)

    def queue(
        self,
        cookie: int,
        op: Op,
        *,
        file: int = 0,
        offset: int = 0,
        data: bytes = b"",
        length: int = 0,
        pieces: int = 1,
    ) -> None:
        """Prepare one operation; submit() hands over all that are prepared."""
        length = len(data) or length
        lib.mp_driver_test_queue(self._test, cookie, op, file, offset, length, data, pieces)

    def submit(self) -> None:
        """Submit all queued operations in one call."""
        lib.mp_driver_test_submit(self._test)

    def wait(self, timeout_ns: int = PAUSE_NS) -> int:
        """One turn of the driver."""
        result: int = lib.mp_driver_test_wait(self._test, timeout_ns)
        self.ended = result < 0
        return result

    def take(self) -> list[Event]:
        """Events so far, in order."""
        out = ffi.new("struct mp_driver_test_event[4096]")
        count = lib.mp_driver_test_take(self._test, out, 4096)
        return [Event(e.cookie, e.op, e.ready, e.result) for e in out[0:count]]

    def collect(self, count: int) -> list[Event]:
        """Turn until count events have come, or the world ended."""
        events: list[Event] = []
        while len(events) < count and self.wait() >= 0:
            events += self.take()
        return events + self.take()

    def data(self, cookie: int, length: int) -> bytes:
        """What a completed READ has read."""
        out = ffi.new("uint8_t[]", length)
        got = lib.mp_driver_test_data(self._test, cookie, out, length)
        assert got == length
        return bytes(ffi.buffer(out, length))

    def do(self, op: Op, **arguments: Any) -> int:
        """One operation, until it is done: its result.  -ESHUTDOWN: the world ended."""
        self._cookie += 1
        self.queue(self._cookie, op, **arguments)
        self.submit()
        while True:
            result = self.wait()
            for event in self.take():
                if event.cookie == self._cookie:
                    return event.result
            if result < 0:
                return result

    def write(self, offset: int, data: bytes, *, file: int = 0, pieces: int = 1) -> int:
        """Write and wait."""
        return self.do(Op.WRITE, file=file, offset=offset, data=data, pieces=pieces)

    def read(self, offset: int, length: int, *, file: int = 0, pieces: int = 1) -> bytes | int:
        """Read and wait: the bytes, or -errno."""
        result = self.do(Op.READ, file=file, offset=offset, length=length, pieces=pieces)
        data = self.data(self._cookie, length) if not self.ended else b""
        return data if result >= 0 else result

    def sync(self, *, file: int = 0) -> int:
        """Sync and wait."""
        return self.do(Op.SYNC, file=file)

    def length(self, file: int = 0) -> int:
        """file_length_bytes."""
        result: int = lib.mp_driver_test_length(self._test, file)
        return result

    def list(self) -> list[int]:
        """list_files."""
        out = ffi.new("uint64_t[]", 4096)
        return list(out[0 : lib.mp_driver_test_list(self._test, out, 4096)])

    def now_ns(self) -> int:
        """The driver's clock."""
        result: int = lib.mp_driver_test_now_ns(self._test)
        return result

    def random(self, length: int) -> bytes:
        """The driver's chance."""
        out = ffi.new("uint8_t[]", length)
        lib.mp_driver_test_random(self._test, out, length)
        return bytes(ffi.buffer(out, length))

    def wake(self) -> None:
        """Any thread."""
        lib.mp_driver_test_wake(self._test)

    def notify(self) -> None:
        """Any thread."""
        lib.mp_driver_test_notify(self._test)

    def watch(self, socket: int, interest: int, cookie: int) -> int:
        """Watch a socket; its events carry cookie."""
        result: int = lib.mp_driver_test_watch(self._test, socket, interest, cookie)
        return result

    def close_socket(self, socket: int) -> None:
        """close_socket."""
        lib.mp_driver_test_close(self._test, socket)

    def close_on_ready(self, cookie: int, socket: int, replacement: int = -1) -> None:
        """Inside the next on_ready of cookie, close that socket; let another take its number."""
        lib.mp_driver_test_close_on_ready(self._test, cookie, socket, replacement)

    def receive(self, socket: int, capacity: int = 65536) -> bytes | int:
        """Bytes, or -errno."""
        out = ffi.new("uint8_t[]", capacity)
        got = lib.mp_driver_test_receive(self._test, socket, out, capacity)
        return bytes(ffi.buffer(out, got)) if got >= 0 else got

    def send(self, socket: int, data: bytes) -> int:
        """Bytes sent, or -errno."""
        result: int = lib.mp_driver_test_send(self._test, socket, data, len(data))
        return result


def block(token: int) -> bytes:
    """A block that says which it is in each of its sectors."""
    return token.to_bytes(8, "little") * (BLOCK // 8)
