"""One volume at this cache: epochs, "dirty" on record, destage, giving back.

States: CLOSED -> OPEN -> CLOSING -> CLOSED, and FAILED, which only a restart leaves.  All calls to
the stores about a volume run under its lock, one at a time.  README.md has the order of steps and
what a crash between any two of them leaves behind.

Rules:
* open: compare-and-swap at the stores first, the engine second; positions.py says when never.
* dirty: the stores first, the engine second (it acknowledges nothing before); the other way round
  when it is taken off the record.
* giving back: the engine first, the stores second.
* a call of unknown outcome is repeated; of taking "dirty" off the record: "dirty" is put on again.
"""

import asyncio
import logging
import socket
from contextlib import suppress
from enum import StrEnum

import msgspec

from millpond.cache import limits
from millpond.cache.continuing import Continuing
from millpond.cache.destage import VolumeDestage, find_volume
from millpond.cache.errors import CacheError, StoreAway, VolumeRefused, escaped
from millpond.cache.exports import NOBODY, Agreed, Owner
from millpond.cache.opening import Opening, open_at_engine, open_at_stores
from millpond.cache.positions import check_still_ours, has_arrived
from millpond.cache.replicas import ReplicaSet, VolumeRecord
from millpond.cache.settings import VolumeSettings
from millpond.cache.shaping import Admission, Shaper
from millpond.cache.stores import Found
from millpond.cache.tasks import Backoff
from millpond.cache.world import Client, World
from millpond.native.engine import Closed, DirtyClear, NativeError, Position

log = logging.getLogger("millpond.cache")


class State(StrEnum):
    """Of a volume at this cache."""

    CLOSED = "closed"
    OPEN = "open"
    CLOSING = "closing"
    FAILED = "failed"


class Volume:
    """One volume, from the first client until it is given back.  Event loop only."""

    def __init__(self, volume_id: bytes, world: World) -> None:
        self.id = volume_id
        self.state = State.CLOSED
        self.problem = ""
        self.record: VolumeRecord | None = None
        self.connections: set[int] = set()
        self.continuing = Continuing(self._nobody_continues)
        self.dirty_recorded = False
        self.destage: VolumeDestage | None = None
        self.settings = VolumeSettings()
        self.shaper = Shaper(Admission(world.volume_rates), world.host)
        self._place: ReplicaSet | None = None
        self._world = world
        self._lock = asyncio.Lock()
        self._users = 0  # handshakes under way: attached, not handed over yet
        self._drained = True
        self._stopping = False
        self._engine_bytes = 0  # the size that the engine serves
        self._idle_timer: asyncio.TimerHandle | None = None
        self._destage_task: asyncio.Task[None] | None = None
        self._closed_epoch: int | None = None  # given back under it, with everything shipped
        self._not_open = asyncio.Event()
        self._not_open.set()

    @property
    def label(self) -> str:
        """For logs: the name when we know it."""
        return escaped(self.record.name if self.record is not None else self.id.hex())

    @property
    def store_addresses(self) -> list[str]:
        """Where it lives, as far as we know."""
        return self._place.addresses if self._place is not None else []

    @property
    def opened(self) -> Found | None:
        """What is known of it while it is open here."""
        if self.state is not State.OPEN or self.record is None or self._place is None:
            return None
        return Found(self.record, self._place.in_sync[0])

    def lives(self, found: Found) -> None:
        """It was found at a store.  VolumeRefused: it is open, at another one."""
        if self._place is None or self.state is State.CLOSED:
            self._place = found.replicas
        elif self._place.addresses != found.replicas.addresses:
            raise VolumeRefused(
                f"the volume is open at the store {escaped(self._place.addresses[0])}, and"
                f" {escaped(found.node.address)} has one with the same id: one is a copy"
            )
        self._learn(found.record)

    @property
    def _replicas(self) -> ReplicaSet:
        assert self._place is not None, "opening begins with the place"
        return self._place

    # -- clients

    async def attach(self) -> VolumeRecord:
        """A client wants the volume: open it unless it is.  Every attach needs one detach."""
        if self.state is not State.OPEN:
            outcome: asyncio.Future[CacheError | None]
            outcome = asyncio.get_running_loop().create_future()
            self._world.tasks.spawn(self._open_for_client(outcome), f"open-{self.id.hex()}")
            error = await asyncio.shield(outcome)
            if error is not None:
                raise error
        if self.state is not State.OPEN:
            raise VolumeRefused(self.problem or "the volume is being given back; try again")
        assert self.record is not None
        self._grow(self.record.size_bytes)
        if not self._stopping:
            self.continuing.serve(self.connect, self.label)
        self._users += 1
        self._cancel_idle()
        return self.record

    @property
    def is_in_use(self) -> bool:
        """Not to be given back."""
        return self._users > 0 or bool(self.connections) or bool(self.continuing)

    def _nobody_continues(self) -> None:
        if self.state is State.OPEN:
            self._arm_idle()
        elif self._place is not None and not self._world.tasks.closing:
            self._world.tasks.spawn(self._give_back_if_ours(), f"give-back-{self.id.hex()}")

    def _learn(self, found: VolumeRecord) -> None:
        """What the store says about it now: a new name, a larger size."""
        if self.record is None:
            self.record = found
            return
        size_bytes = max(found.size_bytes, self.record.size_bytes)
        if self.state is State.CLOSED:
            size_bytes = found.size_bytes
        self.record = msgspec.structs.replace(self.record, name=found.name, size_bytes=size_bytes)

    def _grow(self, size_bytes: int) -> None:
        """The store's record grew before: from the next connection on the engine serves it all.

        Commands take effect in order, so a client that is handed over after this is served.
        """
        if size_bytes > self._engine_bytes:
            self._world.engine.grow_volume(self.id, size_bytes=size_bytes)
            log.info("volume grown volume=%s size=%d", self.label, size_bytes)
            self._engine_bytes = size_bytes

    async def grow(self) -> int:
        """Serve all that the store's record has; how much that is."""
        assert self.record is not None and self.state is State.OPEN
        size_bytes = self.record.size_bytes
        self._grow(size_bytes)
        await self._position()  # commands take effect in order: with its answer, so has this
        return size_bytes

    def detach(self) -> None:
        """The client of an attach was handed over, or went away."""
        self._users -= 1
        assert self._users >= 0
        self._arm_idle()

    def connect(
        self, sock: socket.socket, received: bytes, agreed: Agreed, owner: Owner = NOBODY
    ) -> None:
        """Hand the client's socket to the engine, which owns it from here.

        VolumeRefused or NativeError: it is closed, and nobody hears of it again.
        """
        if self.state is not State.OPEN:
            sock.close()
            raise VolumeRefused(self.problem or "the volume is being given back; try again")
        cookie = self._world.events.new_cookie()
        self._world.engine.connect(
            self.id,
            sock.detach(),
            read_only=self._world.read_only or agreed.read_only,
            received=received,
            cookie=cookie,
            structured=agreed.structured,
            allocation=agreed.allocation,
        )
        self.connections.add(cookie)
        self._world.connected(cookie, Client(self, agreed, owner))

    def connection_closed(self, cookie: int) -> None:
        """The engine is done with a connection."""
        self.connections.discard(cookie)
        self._arm_idle()

    def disconnect_all(self) -> None:
        """End every connection; accepted mutations finish."""
        for cookie in list(self.connections):
            with suppress(NativeError):  # gone already: ConnectionClosed is under way
                self._world.engine.disconnect(cookie)

    # -- news from the engine and from destage

    def dirty_ready(self) -> None:
        """There is something to ship."""
        self._drained = False
        self._cancel_idle()
        if self.destage is not None:
            self.destage.ready()

    def need_dirty(self) -> None:
        """Mutations wait until "dirty here" is on record."""
        self._world.tasks.spawn(self._record_dirty(), f"record-dirty-{self.id.hex()}")

    def fail(self, problem: str) -> None:
        """Stop this volume loudly; what is dirty stays on the device."""
        if self.state is State.FAILED:
            return
        self.state = State.FAILED
        self.problem = problem
        self._not_open.set()
        self._cancel_idle()
        log.error("volume failed volume=%s problem=%s", self.label, escaped(problem))
        self.disconnect_all()
        if self._destage_task is not None and self._destage_task is not asyncio.current_task():
            self._destage_task.cancel()

    def _is_drained(self) -> None:
        self._drained = True
        self._arm_idle()

    async def flush(self, *, ignore_rates: bool) -> Position:
        """Ship all that was acknowledged by now, without waiting for company; the goal.

        Whoever asked watches destaged_sequence: it may take as long as the rates make it.
        """
        position = await self._position()
        if self.destage is not None and position.last_sequence > position.first_sequence:
            self.destage.hurry_until(position.last_sequence, ignore_rates=ignore_rates)
        return position

    async def _position(self) -> Position:
        cookie = self._world.events.new_cookie()
        return await self._world.events.ask(
            Position, cookie, lambda: self._world.engine.position(self.id, cookie=cookie)
        )

    # -- start and stop of the daemon

    async def resume(self) -> None:
        """The device holds dirty records: open again, destage goes on by itself."""
        backoff = Backoff()
        while True:
            try:
                async with self._lock:
                    if self.state is State.CLOSED and not await self._has_arrived():
                        await self._open()
                return
            except StoreAway as error:
                self.problem = self.problem if self.state is State.FAILED else str(error)
                await backoff.wait()
            except CacheError as error:
                self.fail(f"writes on this device were not shipped and are kept: {error}")
                return

    async def _has_arrived(self) -> bool:
        """The stores have it all, and the volume has moved on: the log may forget it."""
        known = find_volume(self._world.engine, self.id)
        if known is None:
            return False
        if self._place is None:
            self.lives(await self._world.stores.find_id(self.id))
        record = await self._replicas.show(self.id)
        if not has_arrived(record, known, self._world.cache_id):
            return False
        self._world.engine.destaged(self.id, known.last_sequence)
        log.info("writes had arrived volume=%s sequence=%d", self.label, known.last_sequence)
        return True

    async def give_back_leftover(self, record: VolumeRecord) -> None:
        """A crash left the volume open at the store, with nothing of ours to ship."""
        async with self._lock:
            known = find_volume(self._world.engine, self.id)
            if self.state is not State.CLOSED or (known is not None and known.has_undestaged):
                return
            if self.is_in_use:
                return
            self.record = record
            try:
                check_still_ours(record, known, self._world.cache_id)
            except VolumeRefused as error:
                self.fail(str(error))
                return
            await self._tell_closed(record)

    def begin_stop(self) -> None:
        """No connection of the process before is served any more."""
        self._stopping = True

    async def stop(self) -> None:
        """Give the volume back as soon as it is drained; the caller bounds the wait.

        One that somebody goes on with stays ours.
        """
        self._stopping = True
        if self.continuing:
            return
        if self.state is State.OPEN and self.destage is not None:
            self.destage.hurry()
            self._arm_idle()
        await self._not_open.wait()

    # -- opening; the lock is held from _open on

    async def _open_for_client(self, outcome: "asyncio.Future[CacheError | None]") -> None:
        """A task of its own: a client that gives up must not leave a volume half open."""
        error: CacheError | None = None
        try:
            async with self._lock:
                if self.state is State.CLOSED:
                    await self._open()
        except CacheError as refused:
            error, self.problem = refused, str(refused)  # in status until it opens
        finally:
            outcome.set_result(error)
        if isinstance(error, StoreAway):
            await self._give_back_if_ours()

    async def _give_back_if_ours(self) -> None:
        """The store may have it open for us: it opened it without our hearing of it, or whoever
        went on with it has ended."""
        backoff = Backoff()
        while self.state is State.CLOSED and not self.is_in_use:
            await backoff.wait()
            try:
                record = await self._replicas.show(self.id)
            except StoreAway:
                continue
            except CacheError:
                return
            if record.open_holder == self._world.cache_id.hex():
                await self.give_back_leftover(record)
            return

    async def _open(self) -> None:
        """Fence the others, then tell the engine."""
        if self._place is None:
            self.lives(await self._world.stores.find_id(self.id))
        opening = await open_at_stores(
            self._world,
            self.id,
            self._replicas,
            given_back_epoch=self._closed_epoch,
            part=lambda: self.continuing.forsake(self.label),
        )
        self.record = opening.record
        refusal = await open_at_engine(
            self._world, self.id, opening, store=self._replicas.fetch_store
        )
        if refusal:
            if not opening.undestaged:
                with suppress(CacheError):
                    await self._replicas.close(opening.record, cache_id=self._world.cache_id)
            raise VolumeRefused(refusal)
        self.state = State.OPEN
        self.problem = ""
        self._engine_bytes = opening.record.size_bytes
        self._apply_settings(opening.record.name)
        self._not_open.clear()
        self._drained = not opening.undestaged
        self._start_destage(opening.record.name)
        self._after_open(opening)
        self._arm_idle()

    def _apply_settings(self, name: str) -> None:
        """Shares, rates and bound, for as long as it is open."""
        self.settings = self._world.settings_of(name)
        rates = self._world.rates_of(self.settings)
        if self.shaper.volume_limits != rates:
            self.shaper = Shaper(Admission(rates), self._world.host)
        self._world.engine.configure_volume(self.id, self.settings.shares)

    def _after_open(self, opening: Opening) -> None:
        """Bring "dirty" and destage to where the stores and the device are."""
        record = opening.record
        log.info(
            "volume opened volume=%s epoch=%d applied=%d keep_slots=%s undestaged=%s",
            self.label,
            record.epoch,
            record.applied_sequence,
            opening.keep_slots,
            opening.undestaged,
        )
        if record.dirty_holder == self._world.cache_id.hex():
            self._told_dirty()
        if opening.undestaged:
            assert self.destage is not None
            self.destage.ready()

    def _start_destage(self, name: str) -> None:
        world = self._world
        self.destage = VolumeDestage(
            self.id,
            name,
            engine=world.engine,
            events=world.events,
            streams=self._replicas.destage,
            shaper=self.shaper,
            bound_s=self.settings.rates_bound_s,
            on_drained=self._is_drained,
        )
        self._destage_task = world.tasks.spawn(self._ship(self.destage), f"destage-{self.id.hex()}")

    async def _ship(self, destage: VolumeDestage) -> None:
        try:
            await destage.run()
        except CacheError as error:
            if not self._world.events.failed:
                self.fail(str(error))

    # -- "dirty" on record

    async def _record_dirty(self) -> None:
        """The stores first; only then may the engine acknowledge what only we have."""
        async with self._lock:
            await self._put_dirty()

    async def _put_dirty(self) -> None:
        """Lock held."""
        backoff = Backoff()
        while self.state is State.OPEN and not self.dirty_recorded:
            assert self.record is not None
            try:
                self.record = await self._replicas.record_dirty(
                    self.record, cache_id=self._world.cache_id, dirty=True
                )
            except StoreAway as error:
                self._wait_note(error, backoff)
                await backoff.wait()
            except CacheError as error:
                self.fail(str(error))
            else:
                self._told_dirty()

    def _told_dirty(self) -> None:
        """It is on the record of every in-sync store."""
        self.dirty_recorded = True
        self._world.engine.dirty_recorded(self.id, True)

    async def _clear_at_engine(self) -> bool:
        """From True on the engine acknowledges no mutation before it has asked for "dirty"."""
        answer = await self._world.events.ask(
            DirtyClear, self.id, lambda: self._world.engine.dirty_recorded(self.id, False)
        )
        if answer.status != 0:  # written since
            self.dirty_ready()
            return False
        self.dirty_recorded = False
        return True

    async def _clear_dirty(self) -> None:
        """Drained, with clients: take "dirty" off the record.  Lock held."""
        if not await self._clear_at_engine():
            return
        assert self.record is not None
        try:
            self.record = await self._replicas.record_dirty(
                self.record, cache_id=self._world.cache_id, dirty=False
            )
        except StoreAway as error:
            log.warning("unknown outcome volume=%s reason=%s", self.label, escaped(str(error)))
            await self._put_dirty()
        except CacheError as error:
            self.fail(str(error))

    def _wait_note(self, error: StoreAway, backoff: Backoff) -> None:
        if backoff.is_first:
            log.warning("waiting volume=%s reason=%s", self.label, escaped(str(error)))

    # -- idle

    def _cancel_idle(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def _arm_idle(self) -> None:
        """Drained: take "dirty" off the record after a while, give back what nobody uses."""
        self._cancel_idle()
        if self.state is not State.OPEN or not self._drained:
            return
        if self.is_in_use and not self.dirty_recorded:
            return
        delay_s = limits.DIRTY_IDLE_S if self.is_in_use else limits.RELEASE_IDLE_S
        self._idle_timer = asyncio.get_running_loop().call_later(
            0.0 if self._stopping else delay_s, self._idle
        )

    def _idle(self) -> None:
        self._idle_timer = None
        if not self._world.tasks.closing:
            self._world.tasks.spawn(self._settle(), f"settle-{self.id.hex()}")

    async def _settle(self) -> None:
        async with self._lock:
            if self.state is not State.OPEN or not self._drained:
                return
            if not self.is_in_use:
                await self._release()
            elif self.dirty_recorded:
                await self._clear_dirty()

    # -- giving back; the lock is held

    async def _release(self) -> None:
        """No client, nothing to ship: the engine first, the stores second."""
        assert self.record is not None
        self.state = State.CLOSING
        was_recorded = self.dirty_recorded
        if was_recorded and not await self._clear_at_engine():
            self._stay_open()
            return
        if not await self._close_at_engine():
            if was_recorded:  # the stores still have it on record
                self._told_dirty()
            self._stay_open()
            return
        await self._end_destage()
        if self.state is State.CLOSING:
            self.state = State.CLOSED
            self._closed_epoch = self.record.epoch
        await self._tell_closed(self.record)
        self._not_open.set()

    def _stay_open(self) -> None:
        """Something came in between: try again later."""
        if self.state is State.CLOSING:
            self.state = State.OPEN
            self._arm_idle()

    async def _close_at_engine(self) -> bool:
        world = self._world
        cookie = world.events.new_cookie()
        answer = await world.events.ask(
            Closed,
            cookie,
            lambda: world.engine.close_volume(self.id, forget_slots=False, cookie=cookie),
        )
        return answer.status == 0

    async def _end_destage(self) -> None:
        task, self._destage_task = self._destage_task, None
        self.destage = None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _tell_closed(self, record: VolumeRecord) -> None:
        """The stores may give the volume to others.  A new epoch cancels a call that got lost."""
        backoff = Backoff()
        while True:
            try:
                await self._replicas.close(record, cache_id=self._world.cache_id)
            except StoreAway as error:
                self._wait_note(error, backoff)
                await backoff.wait()
            except CacheError as error:
                # Somebody took it over; everything of ours had arrived before.
                log.warning("taken over volume=%s reason=%s", self.label, escaped(str(error)))
                return
            else:
                log.info("volume given back volume=%s epoch=%d", self.label, record.epoch)
                return
