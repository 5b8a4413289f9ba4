"""Connections to one store: control calls on demand, byte streams that reconnect by themselves.

Rules: a lost connection says nothing about what the store did.  Whoever calls must be safe to ask
again, or fence the call that may still come with a new epoch (volumes.py).

Happy path: `ControlLink.call`; `Stream.run` as a task: connect, up(), bytes, lost, down(), again.
Failure modes: the store is away: StoreAway for control calls at once, back-off for streams (logged
once per outage); the store refuses with words: StoreError as it came.
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

from millpond.cache import limits
from millpond.cache.errors import StoreAway, escaped
from millpond.cache.tasks import Backoff
from millpond.native.engine import NativeError
from millpond.store.client import DataLink, StoreClient, connect_data
from millpond.store.errors import Code, StoreError

log = logging.getLogger("millpond.cache")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who we are towards a store."""

    cache_id: bytes
    name: str


class ControlLink:
    """Control calls to one store."""

    def __init__(self, address: str, identity: Identity) -> None:
        self.address = address
        self._identity = identity
        self._client: StoreClient | None = None
        self._connecting = asyncio.Lock()

    async def call(
        self, op: str, /, timeout_s: float = limits.CALL_TIMEOUT_S, **arguments: Any
    ) -> dict[str, Any]:
        """One call.  StoreAway: it may or may not have happened.  StoreError: the store's no."""
        client: StoreClient | None = None
        try:
            async with asyncio.timeout(timeout_s):
                client = await self._connected()
                return await client.call(op, **arguments)
        except TimeoutError:
            await self._drop(client)
            raise StoreAway(f"the store at {self.address} did not answer {op}") from None
        except StoreError as error:
            if error.code not in (Code.UNREACHABLE, Code.PROTOCOL):
                raise
            await self._drop(client)
            raise StoreAway(error.message) from None
        except OSError as error:
            await self._drop(client)
            raise StoreAway(f"cannot reach the store at {self.address}: {error}") from None

    async def close(self) -> None:
        """Close the connection, if any."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def _connected(self) -> StoreClient:
        async with self._connecting:
            if self._client is not None and not self._client.writable:
                await self._drop(self._client)  # lost while nobody was calling
            if self._client is None:
                self._client = await StoreClient.connect(
                    self.address,
                    role="control",
                    client_id=self._identity.cache_id,
                    client_name=self._identity.name,
                )
            return self._client

    async def _drop(self, client: StoreClient | None) -> None:
        """This connection failed: the next call makes a new one."""
        if client is None:
            return
        if self._client is client:
            self._client = None
        await client.close()


class Stream(ABC):
    """A data connection that is kept up: fetch.py and destage.py say what it carries."""

    role: Literal["fetch", "destage"]

    def __init__(self, address: str, identity: Identity) -> None:
        self.address = address
        self.problem = "not connected yet"  # empty while up
        self.connects = 0
        self._identity = identity
        self._link: DataLink | None = None
        self._lost: asyncio.Future[str] | None = None

    @property
    def is_up(self) -> bool:
        """Connected, handshake done."""
        return self._link is not None

    @abstractmethod
    def up(self) -> None:
        """Connected; nothing of an earlier connection will come."""

    @abstractmethod
    def down(self, reason: str) -> None:
        """Lost; nothing more of it will come."""

    @abstractmethod
    def received(self, data: memoryview) -> None:
        """Bytes from the store, valid in the call only.  StoreError: drop the connection."""

    async def run(self) -> None:
        """Keep the connection up, for ever."""
        backoff = Backoff()
        while True:
            lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            try:
                link = await self._connect(lost)
            except (StoreError, OSError) as error:
                self._note(str(error), backoff)
            else:
                try:
                    await self._carry(link, lost, backoff)
                except (StoreError, OSError, NativeError) as error:
                    self._note(str(error), backoff)  # no descriptor left for the engine, say
                finally:
                    await link.close()
            await backoff.wait()

    async def _connect(self, lost: asyncio.Future[str]) -> DataLink:
        def on_lost(error: Exception | None) -> None:
            if not lost.done():
                lost.set_result(str(error) if error is not None else "closed")

        return await connect_data(
            self.address,
            role=self.role,
            client_id=self._identity.cache_id,
            client_name=self._identity.name,
            on_bytes=self.received,
            on_lost=on_lost,
        )

    async def _carry(self, link: DataLink, lost: asyncio.Future[str], backoff: Backoff) -> None:
        self._link, self._lost = link, lost
        self.problem = ""
        self.connects += 1
        log.info("store link up role=%s store=%s", self.role, escaped(self.address))
        reason = "closed"
        try:
            self.up()
            began_s = asyncio.get_running_loop().time()
            reason = await lost
            if asyncio.get_running_loop().time() - began_s > limits.BACKOFF_MAX_S:
                backoff.reset()  # one that breaks at once is as bad as one that cannot connect
        finally:
            self._link = self._lost = None
            self.problem = reason
            self.down(reason)
        self._note(reason, backoff)

    def _note(self, reason: str, backoff: Backoff) -> None:
        self.problem = reason
        if backoff.is_first:
            log.warning(
                "store link down role=%s store=%s reason=%s",
                self.role,
                escaped(self.address),
                escaped(reason),
            )

    def drop(self, reason: str) -> None:
        """Give the connection up: run() makes a new one."""
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(reason)
