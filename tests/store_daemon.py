"""A real daemon on a real directory, and a client that can misbehave byte by byte."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from millpond.store import limits, wire
from millpond.store.client import StoreClient
from millpond.store.daemon import StoreDaemon

ME = bytes(range(16))
OTHER = bytes(range(16, 32))
SEGMENT_BYTES = 8 * limits.MIB

RunTest = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> RunTest:
    """Run a coroutine on each event loop that we support."""
    factory = uvloop.new_event_loop if request.param == "uvloop" else None

    def run_it(coroutine: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(_bounded(coroutine))

    return run_it


async def _bounded(coroutine: Coroutine[Any, Any, None]) -> None:
    async with asyncio.timeout(60):  # against hanging for ever, not a claim of speed
        await coroutine


class Running:
    """A daemon and the ways to reach it."""

    def __init__(self, daemon: StoreDaemon) -> None:
        self.daemon = daemon
        self.address = str(daemon.addresses[0])

    async def client(self, client_id: bytes = ME) -> StoreClient:
        return await StoreClient.connect(self.address, client_id=client_id, client_name="test")

    async def raw(self) -> "RawClient":
        reader, writer = await asyncio.open_unix_connection(self.daemon.addresses[0].path)
        return RawClient(reader, writer)


class RawClient:
    """A peer that sends what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def frame(self) -> wire.Frame:
        """The next frame from the store; IncompleteReadError at the end of the stream."""
        header = await self.reader.readexactly(wire.HEADER_BYTES)
        rest = await self.reader.readexactly(int.from_bytes(header[16:20], "little"))
        frames = wire.FrameReader(
            payload_max_bytes=wire.PAYLOAD_MAX_BYTES, types=range(1, 16), peer="the store"
        )
        frames.feed(header + rest)
        frame = frames.next_frame()
        assert frame is not None
        return frame

    async def hello(self, role: str = "control") -> wire.Frame:
        self.writer.write(hello(role))
        return await self.frame()

    async def ended(self) -> bool:
        return await self.reader.read(1) == b""

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


def hello(role: str = "control", **changes: object) -> bytes:
    fields = {"role": role, "wire_version": 1, "features": [], "client_id": ME.hex()}
    return wire.encode_json(wire.HELLO, {**fields, "client_name": "raw", **changes})


@contextlib.asynccontextmanager
async def running(directory: Path, **options: Any) -> AsyncIterator[Running]:
    settings: dict[str, Any] = {"format_when_empty": True, "segment_bytes": SEGMENT_BYTES}
    daemon = await StoreDaemon.start(str(directory), **{**settings, **options})
    serving = asyncio.create_task(daemon.serve())
    try:
        yield Running(daemon)
    finally:
        daemon.request_stop()
        await serving
