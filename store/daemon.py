"""The store daemon: one directory, one core, one server.

Happy path: lock the directory, (format it when told and empty), recover, start the core's reactor,
listen, serve until asked to stop, then finish what was accepted, checkpoint, unlock.
Failure modes: the directory is served by another process: refused with one line, nothing touched.
It holds no store: refused unless told to format. The core stops (disk failed), or a task dies:
serve() raises it, so the process ends with a line and a supervisor may start it anew.
"""

import asyncio
import logging
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from typing import Any

from millpond.native.store import ScrubFinding, ScrubKind
from millpond.store import limits, wire
from millpond.store.address import Address, check_exposure, parse_address
from millpond.store.catalogue import Catalogue
from millpond.store.control import ControlOperations, ControlSession
from millpond.store.data import DestageSession, FetchSession
from millpond.store.directory import SOCKET_NAME, OpenStore
from millpond.store.errors import one_line
from millpond.store.link import CoreLink
from millpond.store.server import Connection, Server
from millpond.store.session import Session
from millpond.store.unixsocket import SOCKET_MODE

log = logging.getLogger("millpond.store")


class StoreDaemon:
    """A running store. Create with `await StoreDaemon.start(...)`; then serve(), then close()."""

    def __init__(self, directory: str, store: OpenStore) -> None:
        self.directory = directory
        self.addresses: list[Address] = []
        self.core = store.core
        self.store_id = store.store_id
        self._store = store
        self._started_s = asyncio.get_running_loop().time()
        self._stop = asyncio.Event()
        self.failure: BaseException | None = None  # why it stopped by itself
        self._closed = False
        self.link = CoreLink(self.core, store.notify_fd, self._fail, self._scrub_found)
        self.catalogue = Catalogue(self.link)
        self._operations = ControlOperations(self.catalogue, self.core.volume_bytes, self.status)
        self.greeting = wire.HelloReply(
            wire_version=wire.WIRE_VERSION,
            features=[wire.FEATURE_BLOCK_STATUS],
            store_id=store.store_id.hex(),
            max_frame_bytes=wire.PAYLOAD_MAX_BYTES,
            version=f"millpond {own_version()}",
        )
        self.server: Server | None = None

    @classmethod
    async def start(
        cls,
        directory: str,
        *,
        listen: Sequence[str] = (),
        insecure_listen: bool = False,
        format_when_empty: bool = False,
        segment_bytes: int = 0,
        page_cache_bytes: int = 0,
        scrub_bytes_per_s: int = 0,
        scrub_interval_s: float = 0.0,
        unix_mode: int = SOCKET_MODE,
        unix_group: str | int | None = None,
        handshake_timeout_s: float = limits.HANDSHAKE_TIMEOUT_S,
        connections_max: int = limits.CONNECTIONS_MAX,
    ) -> "StoreDaemon":
        """Open the store in directory and listen on its socket and on every address given.

        segment_bytes: of a newly formatted store; page_cache_bytes: see StoreOptions. 0 takes
        the default. scrub_bytes_per_s: 0 turns scrubbing off; scrub_interval_s: from the start of
        a pass to that of the next.
        """
        addresses = [parse_address(f"unix:{os.path.join(directory, SOCKET_NAME)}")]
        addresses += [parse_address(text) for text in listen]
        addresses = list(dict.fromkeys(addresses))
        for address in addresses:
            check_exposure(address, insecure_listen=insecure_listen)
        store = OpenStore(
            directory,
            format_when_empty=format_when_empty,
            segment_bytes=segment_bytes,
            page_cache_bytes=page_cache_bytes,
            scrub_bytes_per_s=scrub_bytes_per_s,
            scrub_interval_s=scrub_interval_s,
        )
        daemon = None
        try:
            store.core.start()
            daemon = cls(directory, store)
            daemon.link.start()
            await daemon.listen(
                addresses,
                insecure_listen=insecure_listen,
                unix_mode=unix_mode,
                unix_group=unix_group,
                handshake_timeout_s=handshake_timeout_s,
                connections_max=connections_max,
            )
        except BaseException:
            if daemon is not None:
                await daemon.close()
            else:
                store.close()
            raise
        return daemon

    async def listen(
        self,
        addresses: Sequence[Address],
        *,
        insecure_listen: bool = False,
        unix_mode: int = SOCKET_MODE,
        unix_group: str | int | None = None,
        handshake_timeout_s: float = limits.HANDSHAKE_TIMEOUT_S,
        connections_max: int = limits.CONNECTIONS_MAX,
    ) -> None:
        """Let clients in; StoreError when an address cannot be had."""
        self.server = Server(
            greeting=self.greeting,
            make_session=self._make_session,
            on_failure=self._fail,
            insecure_listen=insecure_listen,
            handshake_timeout_s=handshake_timeout_s,
            connections_max=connections_max,
        )
        for address in addresses:
            self.addresses.append(
                await self.server.listen(address, mode=unix_mode, group=unix_group)
            )

    async def stop_requested(self) -> None:
        """Until request_stop() or a failure; serve() then closes at once."""
        await self._stop.wait()

    async def serve(self) -> None:
        """Serve until request_stop() or a failure, then close. Raises the failure."""
        try:
            await self._stop.wait()
        finally:
            await self.close()
        if self.failure is not None:
            raise self.failure

    def request_stop(self) -> None:
        """Make serve() return; event loop only (a signal handler of the loop)."""
        self._stop.set()

    async def close(self) -> None:
        """Finish what was accepted, checkpoint, give the directory back. Twice is no error."""
        if self._closed:
            return
        self._closed = True
        if self.server is not None:
            await self.server.close()
        self.link.stop()
        self._store.close()

    def status(self) -> dict[str, Any]:
        """Counters of the core and of the daemon, for the status call."""
        server = self.server
        assert server is not None
        return {
            "store_id": self.store_id.hex(),
            "version": self.greeting.version,
            "directory": self.directory,
            "listening": [str(address) for address in self.addresses],
            "uptime_s": asyncio.get_running_loop().time() - self._started_s,
            "connections": len(server.connections),
            "connections_max": server.connections_max,
            "refused_connections": server.refused_connections,
            **self._counters(),
        }

    def _counters(self) -> dict[str, Any]:
        """Of the core. A moment by its clock, which is the event loop's too, becomes an age."""
        counters = dict(self.core.counters())
        finished_ns = counters.pop("scrub_finished_ns")
        now_s = asyncio.get_running_loop().time()
        return {
            **counters,
            "scrub_bytes_per_s": self._store.options.scrub_bytes_per_s,
            "scrub_finished_ago_s": now_s - finished_ns / 1e9 if finished_ns else None,
        }

    def _scrub_found(self, finding: ScrubFinding) -> None:
        """One line per finding and pass: what, which volume and blocks, where on the disk."""
        state = self.core.volume(finding.volume)
        name = repr(one_line(state.name)) if state is not None else finding.volume.hex()
        what = {
            ScrubKind.EXTENT: "stored bytes that do not verify",
            ScrubKind.UNREADABLE: "cannot be read",
            ScrubKind.RECORD: "a record that does not verify",
            ScrubKind.TABLE: "a page of the extent table that does not verify",
        }[finding.kind]
        where = f"segment={finding.segment} offset={finding.offset_bytes}"
        if finding.block_count and finding.kind is not ScrubKind.TABLE:
            last = finding.first_block + finding.block_count - 1
            where = f"volume={name} blocks={finding.first_block}-{last} {where}"
        log.warning(
            "scrub found damage: %s: %s; check the disk, restore these blocks from a backup",
            where,
            what,
        )

    def _make_session(self, connection: Connection, hello: wire.Hello) -> Session:
        if hello.role == "control":
            return ControlSession(connection, self._operations)
        if hello.role == "fetch":
            return FetchSession(connection, self.link)
        return DestageSession(connection, self.link)

    def _fail(self, error: BaseException) -> None:
        """Whatever died takes the daemon down, loudly; the first cause is the one to report."""
        if self.failure is None:
            self.failure = error
            log.error("store stopped directory=%s: %s", self.directory, one_line(str(error)))
        self._stop.set()


def own_version() -> str:
    try:
        return package_version("millpond")
    except PackageNotFoundError:  # run from a checkout
        return "unversioned"
