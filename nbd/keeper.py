"""One kernel device of ours: a connection to the engine, and a new one whenever that ends.

Happy path: `connect` (attach), or `keep` (it is there already) -> served -> `disconnect`.
Failure modes: those of devices.py.  A device that cannot be served says why in `problem`.
"""

import asyncio
import dataclasses
import logging
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from millpond.cache.errors import CacheError, VolumeRefused, escaped
from millpond.cache.exports import (
    Agreed,
    DeviceExports,
    Export,
    ExportError,
    OpenExport,
    Owner,
)
from millpond.cache.handover import Kept
from millpond.cache.tasks import Backoff, Tasks
from millpond.nbd.devicelinks import DeviceLinks
from millpond.nbd.handshake import transmission_flags
from millpond.nbd.limits import REFUSED_WAIT_S, SETTLED_S, SOCKET_BUFFER_BYTES
from millpond.nbd.sysfs import Backend, KernelDevice, Sysfs
from millpond.nbd.wire import REQUEST, REQUEST_MAGIC, Command
from millpond.nbd.worker import in_thread

_log = logging.getLogger(__name__)

# Images have partition tables in sectors of 512 bytes, and a guest's firmware reads them so.
BLOCK_BYTES: Final = 512
# As the kernel sends it: no flags, and nothing else set.
DISCONNECT: Final = REQUEST.pack(REQUEST_MAGIC, 0, Command.DISC, 0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What all devices of a daemon work with."""

    exports: DeviceExports
    tasks: Tasks
    sysfs: Sysfs
    links: DeviceLinks
    netlink: Any  # the module, or a test's
    dead_timeout_s: int


class _Gone(Exception):
    """The kernel has no such device any more."""


def _ends_with(sock: socket.socket, request: bytes) -> bool:
    """What nobody has read of a connection; more than its buffer holds is none that has ended."""
    unread, left = b"", 2 * SOCKET_BUFFER_BYTES
    with suppress(OSError):
        while left > 0 and (part := sock.recv(1 << 20, socket.MSG_DONTWAIT)):
            unread = (unread + part)[-len(request) :]
            left -= len(part)
    return unread == request


class End:
    """Of a connection that the engine has: when it comes, and how to bring it about."""

    def __init__(self, sock: socket.socket) -> None:
        self.is_wanted = False  # by the kernel, which was told to disconnect the device
        self._came: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Not sock.dup(), which makes both block: the engine has the other one.
        self._sock = socket.socket(fileno=os.dup(sock.fileno()))

    def done(self) -> bool:
        """The engine has nothing to do with it any more."""
        return self._came.done()

    async def wait(self, timeout_s: float | None = None) -> None:
        """Until it comes, or for so long."""
        await asyncio.wait([self._came], timeout=timeout_s)

    def want(self) -> None:
        """The engine says, before it comes, that it has read NBD_CMD_DISC."""
        self.is_wanted = True

    def come(self) -> None:
        """The engine says so.  Before, the kernel would not see the end of the connection.

        The kernel hangs up right behind NBD_CMD_DISC, and then the engine reads no more.
        """
        self.is_wanted = self.is_wanted or _ends_with(self._sock, DISCONNECT)
        self._sock.close()
        if not self._came.done():
            self._came.set_result(None)

    def cut(self) -> None:
        """The kernel's next send fails, and the one that waits for the engine to read."""
        with suppress(OSError):  # it came
            self._sock.shutdown(socket.SHUT_RDWR)


def give_to_engine(
    opened: OpenExport, sock: socket.socket, agreed: Agreed, *, received: bytes = b"", tag: str
) -> End:
    """The engine serves it from here, until the end."""
    end = End(sock)
    try:
        opened.handover(sock, received, agreed, Owner(end.come, tag, end.want))
    except BaseException:
        end.come()
        raise
    return end


def connected_pair(
    opened: OpenExport, backend: Backend, *, read_only: bool
) -> tuple[End, socket.socket]:
    """A new connection: the engine serves one end, the other is for the kernel.

    When it raises, the export is still held.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for each in (ours, theirs):
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    ours.setblocking(False)
    agreed = Agreed(read_only=read_only)
    return give_to_engine(opened, ours, agreed, tag=str(backend)), theirs


class Keeper:
    """Keeps one device served.  Event loop only."""

    def __init__(self, kernel: Kernel, device: KernelDevice, backend: Backend, name: str) -> None:
        """device: as the kernel has it now."""
        self.index = device.index
        self.size_bytes = device.size_bytes
        self.read_only = device.read_only
        self.backend = backend
        self.name = name
        self.problem = ""
        self.settled = asyncio.Event()  # the first attempt to serve it has ended, well or not
        self.gone: Callable[[Keeper], None] = lambda keeper: None
        self.kept: Kept | None = None  # its connection, of the process before
        self.over = False  # disconnected, or about to be by force: nobody serves it any more
        self.linked = ""  # the name that its link was made of
        self._unlinked: bool | None = None  # what unlink() said
        self._kernel = kernel
        self._closed: End | None = None
        self._offered: End | None = None  # given to the engine; the kernel may not have it yet
        # What the kernel is told of it, one at a time: a thread that nobody waits for any more must
        # not give a connection to a device that is over.
        self._turn = threading.Lock()
        self._task: asyncio.Task[None] | None = None

    @property
    def path(self) -> str:
        """Of the device."""
        return f"/dev/nbd{self.index}"

    @property
    def served(self) -> bool:
        """The engine has its connection."""
        return self._closed is not None and not self._closed.done()

    def keep(self, closed: End | None = None) -> None:
        """Serve it from here; closed: the end of the connection that it has already."""
        assert self._task is None and not self.over
        self._closed = closed or self._closed
        name = f"keep-nbd{self.index}"
        self._task = self._kernel.tasks.spawn(self._keep(), name)

    async def pause(self) -> None:
        """Leave it alone, for keep() or for ever; a connection goes on."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def resume(self) -> None:
        """Undo a pause, if there was one."""
        if self._task is None and not self.over:
            self.keep()

    async def ended(self, timeout_s: float) -> None:
        """Until the engine is done with the connection."""
        if self._closed is not None:
            await self._closed.wait(timeout_s)

    def disconnect(self) -> None:
        """The device is no device any more; paused before.  Worker thread."""
        with self._turn:
            self._kernel.netlink.disconnect(self.index)

    def disconnect_by_force(self) -> None:
        """As disconnect, when the guest or a thread of ours is stuck in it.  Worker thread.

        A send of the kernel's that waits for the engine has a lock that DISCONNECT needs, and no
        time limit: cut it off first.
        """
        assert self.over
        for end in (self._closed, self._offered):
            if end is not None:
                end.cut()
        self.disconnect()

    async def grow(self, size_bytes: int) -> None:
        """The engine serves more: tell the kernel.

        Only while it is served: from Linux 6.9 on the kernel waits for what is in flight, with a
        lock held that RECONFIGURE needs.
        """
        assert self.served, "it would wait for a socket that waits for it"

        def tell() -> None:
            with self._turn:
                if not self.over:
                    self._kernel.netlink.reconfigure(
                        self.index, backend=str(self.backend), size_bytes=size_bytes
                    )

        await in_thread(tell, f"grow-nbd{self.index}")
        self.size_bytes = size_bytes
        _log.info("kernel device grown device=%s size=%d", self.path, size_bytes)

    async def learn(self, export: Export) -> None:
        """What the stores say of its volume now."""
        self.name = export.name
        if self.linked != self.name:
            await in_thread(self.link, f"link-nbd{self.index}")
        if self.served and export.size_bytes > self.size_bytes:
            await self.grow(export.size_bytes)

    def link(self) -> None:
        """Make its link.  Worker thread."""
        with self._turn:
            if not self.over:
                name = self.name
                self._kernel.links.make(self.index, name, self.backend)
                self.linked = name

    def unlink(self) -> bool:
        """It is over, and its link goes; False: somebody still has the device open, and it is
        marked.  Worker thread.

        Once: a second one, late, would take the link of a new device of this volume.
        """
        with self._turn:
            self.over = True
            if self._unlinked is None:
                held = self._kernel.sysfs.has(self.index, self.backend)
                if held:
                    self._kernel.links.mark_detached(self.index, self.backend)
                else:
                    self._kernel.links.remove(self.index, self.backend)
                self._unlinked = not held
            return self._unlinked

    # -- the task

    async def _keep(self) -> None:
        backoff = Backoff()
        loop = asyncio.get_running_loop()
        while True:
            if self._closed is not None:
                closed, began_s = self._closed, loop.time()
                await closed.wait()
                self._closed = None
                if closed.is_wanted:
                    self._leave()
                    return
                if loop.time() - began_s > SETTLED_S:
                    backoff.reset()
                else:
                    await backoff.wait()
            try:
                await self._reconnect()
                self.problem = ""
            except _Gone:
                self._leave()
                return
            except (ExportError, CacheError, OSError) as error:
                if str(error) != self.problem:
                    self.problem = str(error)
                    _log.warning(
                        "kernel device waits device=%s reason=%s", self.path, escaped(self.problem)
                    )
                self.settled.set()
                if isinstance(error, VolumeRefused):
                    await asyncio.sleep(REFUSED_WAIT_S)
                else:
                    await backoff.wait()
            finally:
                self.settled.set()

    def _leave(self) -> None:
        _log.warning("kernel device was disconnected by others device=%s", self.path)
        self.gone(self)

    async def _reconnect(self) -> None:
        """A new connection in the place of one that ended."""
        kernel = self._kernel
        device = kernel.sysfs.device(self.index)
        if device is None or device.backend != str(self.backend):
            raise _Gone
        opened = await kernel.exports.open_id(self.backend.volume_id)
        if self.over:
            await opened.release()
            raise _Gone
        export = opened.export
        try:
            self._check(export, device)
            if self.kept is not None:
                self._go_on(opened)
                return
            closed, theirs = connected_pair(opened, self.backend, read_only=self.read_only)
        except BaseException:
            await opened.release()
            raise
        self._offered = closed

        def give() -> None:
            with theirs, self._turn:
                if self.over:
                    return
                # Never a size with it: the kernel sets that first, and first waits for all I/O in
                # flight, which waits for this socket.  Growth comes once it is served.
                kernel.netlink.reconfigure(
                    self.index,
                    backend=str(self.backend),
                    sock=theirs,
                    dead_timeout_s=kernel.dead_timeout_s,
                )

        await in_thread(give, f"adopt-nbd{self.index}")
        self._closed = closed
        self.size_bytes = device.size_bytes
        self.name = export.name
        _log.info("kernel device served again device=%s volume=%s", self.path, escaped(export.name))
        # Not awaited: while something is in flight the kernel may let a setting wait.
        kernel.tasks.spawn(self._settings(), f"settings-nbd{self.index}")

    def _go_on(self, opened: OpenExport) -> None:
        """With the connection of the process before: the kernel has noticed nothing."""
        kept, self.kept = self.kept, None
        assert kept is not None
        sock = socket.socket(fileno=kept.fd)
        self._closed = give_to_engine(
            opened, sock, kept.agreed, received=kept.received, tag=kept.tag
        )
        self.name = opened.export.name
        _log.info("kernel device goes on device=%s volume=%s", self.path, escaped(self.name))

    def drop_kept(self) -> None:
        """Nobody goes on with it."""
        kept, self.kept = self.kept, None
        if kept is not None:
            os.close(kept.fd)

    async def _settings(self) -> None:
        """What a crash between two steps of an attach left undone."""
        await in_thread(lambda: finish(self._kernel, self), f"settings-nbd{self.index}")

    def _check(self, export: Export, device: KernelDevice) -> None:
        """Never serve a guest something else than it has seen."""
        if export.size_bytes < device.size_bytes:
            raise VolumeRefused(
                f"volume {escaped(export.name)} has {export.size_bytes} bytes, {self.path} has"
                f" {device.size_bytes}: it was made smaller, or is another one; detach --force"
            )
        if export.read_only and not device.read_only:
            raise VolumeRefused(
                f"{self.path} was attached writable, and this cache is read-only now"
            )


def finish(kernel: Kernel, keeper: Keeper) -> None:
    """The steps of an attach behind CONNECT, each harmless when done before.  Worker thread."""
    try:
        kernel.sysfs.apply_queue_settings(keeper.index)
    except CacheError as error:  # it works without them, and after a crash it waits longer
        _log.warning("settings left out device=%s reason=%s", keeper.path, escaped(str(error)))
    keeper.link()


async def _check_backend(kernel: Kernel, index: int, backend: Backend) -> None:
    """Without it the device would be nobody's after this process."""
    device = kernel.sysfs.device(index)
    if device is None or device.backend not in ("", str(backend)):
        raise CacheError(f"/dev/nbd{index} was disconnected by others at once")
    if not device.backend:
        await in_thread(lambda: kernel.netlink.disconnect(index), f"undo-nbd{index}")
        raise CacheError("kernel devices need Linux 5.14: this one forgets whose they are")


async def connect(
    kernel: Kernel, opened: OpenExport, cache_id: bytes, *, index: int | None, read_only: bool
) -> Keeper:
    """Make a kernel device of an open export; it is served from before it exists.

    When it raises, the export may still be held.
    """
    export = dataclasses.replace(opened.export, read_only=read_only or opened.export.read_only)
    backend = Backend(cache_id, export.volume_id)
    try:
        closed, theirs = connected_pair(opened, backend, read_only=export.read_only)
    except OSError as error:  # out of descriptors, say
        reason = os.strerror(error.errno or 0)
        raise CacheError(f"no connection for volume {escaped(export.name)}: {reason}") from None

    def give() -> int:
        with theirs:
            return int(
                kernel.netlink.connect(
                    theirs,
                    index=index,
                    size_bytes=export.size_bytes,
                    block_bytes=BLOCK_BYTES,
                    server_flags=int(transmission_flags(export)),
                    dead_timeout_s=kernel.dead_timeout_s,
                    backend=str(backend),
                )
            )

    try:
        made = await in_thread(give, "attach")
    except CacheError as error:
        # Not there before, and nobody else makes it: it is of this CONNECT, whose answer was lost.
        found = [each.index for each in kernel.sysfs.devices() if each.backend == str(backend)]
        if not found:
            raise
        _log.warning("device made all the same index=%d reason=%s", found[0], escaped(str(error)))
        made = found[0]
    await _check_backend(kernel, made, backend)
    device = KernelDevice(made, str(backend), export.size_bytes, export.read_only)
    keeper = Keeper(kernel, device, backend, export.name)
    keeper.keep(closed)
    with suppress(OSError):
        await in_thread(lambda: finish(kernel, keeper), f"finish-nbd{made}")
    return keeper
