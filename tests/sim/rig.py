"""One cache and one store on simulated disks, and a tester that says what happens next.

Where World plays whole histories, a Rig sets up one situation: each call runs the turns that it
needs.  Happy path: open(), write and read, ship(), fall(), open() again.
Failure modes: Illegal when an answer does not come, or is an error that was not asked for.
"""

import struct
from collections.abc import Callable

from millpond.native import ffi, lib, record
from millpond.native.drivers import Sim, SimOptions, destroy
from millpond.native.engine import (
    Batch,
    Engine,
    EngineOptions,
    Event,
    Opened,
    VolumeFailed,
)
from millpond.native.store import StoreOptions
from sim.nodes import MIB, FetchSocket, StoreNode
from sim.oracle import Illegal

BLOCK = 4096
REQUEST = struct.Struct(">IHHQQI")
READ, WRITE, FLUSH, TRIM, ZEROES = 0, 1, 3, 4, 6
REPLY_BYTES = 16
VOLUME = b"volume of a test"
TURNS = 20_000


class Rig:
    """See the module."""

    def __init__(
        self,
        *,
        device_bytes: int = 64 * MIB,
        log_bytes: int = 24 * MIB,
        segment_bytes: int = 3 * MIB // 2,
        options: EngineOptions | None = None,
        sim: SimOptions | None = None,
    ) -> None:
        self.options = options or EngineOptions()
        self.sim = Sim(sim or SimOptions(device_bytes=device_bytes))
        self.store = StoreNode(StoreOptions(segment_bytes=MIB))
        self.store.start()
        self.engine: Engine
        self.events: list[Event] = []
        self.epoch: dict[bytes, int] = {}
        self.carrying = True  # fetches reach the store, and replies the cache
        self._up = False
        self._cookie = 0
        self._replies = bytearray()
        self._sizes = device_bytes, log_bytes, segment_bytes
        self.format_again()

    def format_again(self) -> None:
        """An empty device, as before the first start."""
        device_bytes, log_bytes, segment_bytes = self._sizes
        driver = self.sim.driver()
        chosen = ffi.new("struct mp_cache_format_options *")
        chosen.device_bytes, chosen.slot_bytes = device_bytes, 16384
        chosen.log_bytes, chosen.segment_bytes = log_bytes, segment_bytes
        message = ffi.new("char[]", 256)
        result = lib.mp_cache_format(driver, chosen, ffi.NULL, message, 256)
        assert result == 0, ffi.string(message)
        destroy(driver)

    def close(self) -> None:
        """Give everything back."""
        self.fall()
        self.store.die()
        self.store.sim.close()
        self.sim.close()

    # -- life

    def start(self) -> None:
        """Recover."""
        self.engine = Engine.open_driver(self.sim.driver(), self.options)
        self._up = True
        self.connect_fetch()

    def fall(self, options: SimOptions | None = None) -> None:
        """Crash; the disk keeps all that reached it unless options say otherwise."""
        if self._up:
            self.sim.crash()
            self.engine.free()
            self._up = False
        self.sim.set(options or SimOptions(seed=1))
        self.events.clear()

    def stop(self) -> None:
        """The engine stops cleanly."""
        self.engine.request_stop()
        self.until(self.engine.stopped)
        self.engine.free()
        self._up = False
        self.sim.set(SimOptions(seed=1))
        self.events.clear()

    def turn(self, timeout_ns: int = 1_000_000) -> None:
        """One turn of both; what is between them is carried."""
        if self.engine.step(timeout_ns) < 0:
            raise Illegal("the world ended")
        self.store.step()
        if self.carrying:
            self.carry()
        self.events += self.engine.events()

    def carry(self) -> None:
        """Misses to the store, answers back."""
        if data := self.fetch.take():
            self.store.core.feed(2, data)
        while data := self.store.core.take(2):
            self.fetch.feed(data)

    def store_says(self, frame_type: int, payload: bytes, request_id: int) -> None:
        """A frame of the tester's own, as if from the store."""
        frame = record.encode_frame(frame_type, payload, request_id=request_id)
        self.fetch.feed(frame)

    def connect_fetch(self) -> None:
        """A fetch connection between both."""
        self.fetch = FetchSocket(self.sim, self.engine)

    def lose_fetch_connection(self) -> None:
        """It ends under what is asked; there is another."""
        self.fetch.hang_up()
        self.store.core.hangup(2)
        self.turn()
        self.connect_fetch()

    def asked(self) -> list[int]:
        """First blocks of the READ frames on their way, which are lost by this."""
        stream, firsts = self.fetch.take(), []
        while (found := record.decode_frame(stream)) is not None:
            frame, length = found
            wanted = ffi.new("struct mp_read_request *")
            ffi.memmove(wanted, frame.payload, ffi.sizeof(wanted[0]))
            firsts.append(int(wanted.first_block))
            stream = stream[length:]
        return firsts

    def disconnect_all(self) -> None:
        """Every guest leaves."""
        for cookie in range(1001, 1001 + self._cookie):
            self.engine.disconnect(cookie)
        for _ in range(10):
            self.turn()

    def until(self, done: Callable[[], object]) -> None:
        """Turns, until something is so.  Illegal."""
        for _ in range(TURNS):
            if done():
                return
            self.turn()
        raise Illegal("it does not come")

    def take(self, kind: type[Event]) -> Event | None:
        """The oldest event of a kind, which is removed."""
        for at, event in enumerate(self.events):
            if isinstance(event, kind):
                return self.events.pop(at)
        return None

    def wait(self, kind: type[Event]) -> Event:
        """The next event of a kind.  Illegal."""
        self.until(lambda: any(isinstance(event, kind) for event in self.events))
        event = self.take(kind)
        assert event is not None
        return event

    @property
    def failures(self) -> list[Event]:
        """Volumes that failed."""
        return [event for event in self.events if isinstance(event, VolumeFailed)]

    # -- volumes

    def applied(self, volume: bytes) -> int:
        """The store's position."""
        state = self.store.core.volume(volume)
        return 0 if state is None else state.applied_sequence

    def put(self, volume: bytes, size_bytes: int, *, dirty: bool = True) -> None:
        """Tell the store of the volume and of a new epoch."""
        self.epoch[volume] = self.epoch.get(volume, 0) + 1
        state = ffi.new("struct mp_volume_state *")
        state.id, state.size_bytes, state.epoch = volume, size_bytes, self.epoch[volume]
        state.applied_sequence = self.applied(volume)
        state.lineage = state.lineages[0].id = 7
        state.lineages[0].first_sequence = 1
        state.name = b"volume " + volume[:1]
        request = self.store.send(lib.MP_FRAME_PUT_VOLUME, bytes(ffi.buffer(state)))

        def answered() -> bool:
            self.store.step(1_000_000)
            self.store.collect(0)
            return request in self.store.replies

        for _ in range(TURNS):
            if answered():
                break
        assert self.store.replies.pop(request).status == 0

    def open(self, volume: bytes, *, size_bytes: int = MIB << 10, keep_slots: bool = True) -> None:
        """A new epoch at the store, then the engine; "dirty" is on record."""
        self.put(volume, size_bytes)
        self.engine.open_volume(
            volume,
            size_bytes=size_bytes,
            epoch=self.epoch[volume],
            lineage=7,
            applied_sequence=self.applied(volume),
            keep_slots=keep_slots,
            cookie=1,
        )
        opened = self.wait(Opened)
        assert isinstance(opened, Opened) and opened.status == 0, opened
        self.engine.dirty_recorded(volume, True)

    def connect(self, volume: bytes, *, allocation: bool = False) -> int:
        """A guest's socket."""
        socket = self.sim.socket()
        self._cookie += 1
        self.engine.connect(
            volume,
            socket,
            read_only=False,
            received=b"",
            cookie=1000 + self._cookie,
            structured=allocation,
            allocation=allocation,
        )
        self.turn()
        return socket

    def ship(self, volume: bytes) -> None:
        """Destage everything."""
        while True:
            self.engine.cut(volume, max_bytes=4 * MIB, cookie=3)
            batch = self.wait(Batch)
            assert isinstance(batch, Batch)
            if batch.status:
                if self.status(volume).last_sequence == self.status(volume).destaged_sequence:
                    return
                self.turn()
                continue
            self.deliver(volume, bytes(self.engine.take_batch(volume, batch.bytes_count)))

    def deliver(self, volume: bytes, frame: bytes) -> None:
        """A batch to the store, its answer to the cache."""
        self.store.core.feed(3, frame)
        stream = bytearray()
        for _ in range(TURNS):
            self.store.step(1_000_000)
            stream += self.store.core.take(3)
            if found := record.decode_frame(bytes(stream)):
                assert found[0].status == 0, found[0].status
                break
        self.engine.destaged(volume, self.applied(volume))
        self.turn()

    def status(self, volume: bytes):  # type: ignore[no-untyped-def]
        """What the engine publishes of it."""
        return next(v for v in self.engine.list_volumes() if v.id == volume)

    # -- the guest

    def ask(
        self, socket: int, command: int, offset: int = 0, length: int = 0, data: bytes = b""
    ) -> None:
        """Send one request."""
        self.push(socket, self.request(command, offset, length, data))

    def request(self, command: int, offset: int, length: int, data: bytes = b"") -> bytes:
        """The bytes of one."""
        return REQUEST.pack(0x25609513, 0, command, 1, offset, length) + data

    def push(self, socket: int, data: bytes) -> None:
        """Bytes from the guest."""
        self.sim.push(socket, data)

    def answers(self, socket: int, length_bytes: int) -> bytes:
        """Wait for that many bytes.  Illegal."""
        got = bytearray()

        def enough() -> bool:
            got.extend(self.sim.pop(socket))
            return len(got) >= length_bytes

        self.until(enough)
        assert len(got) == length_bytes
        return bytes(got)

    def done(
        self,
        socket: int,
        command: int,
        offset: int = 0,
        length: int = 0,
        data: bytes = b"",
    ) -> bytes:
        """One request and its whole answer, which is not an error."""
        self.ask(socket, command, offset, length, data)
        answer = self.answers(socket, REPLY_BYTES + (length if command == READ else 0))
        assert answer[4:8] == bytes(4), f"error {answer[4:8].hex()}"
        return answer[REPLY_BYTES:]

    def write(self, socket: int, block: int, token: int, blocks: int = 1) -> None:
        """Write blocks that are full of one byte."""
        data = bytes([token]) * (blocks * BLOCK)
        self.done(socket, WRITE, block * BLOCK, len(data), data)

    def read(self, socket: int, block: int) -> int:
        """The byte that a block is full of."""
        data = self.done(socket, READ, block * BLOCK, BLOCK)
        assert data == data[:1] * BLOCK
        return data[0]

    def trim(self, socket: int, block: int, blocks: int) -> None:
        """Trim."""
        self.done(socket, TRIM, block * BLOCK, blocks * BLOCK)

    def flush(self, socket: int) -> None:
        """Flush."""
        self.done(socket, FLUSH)
