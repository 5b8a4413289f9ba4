"""Control connections: JSON calls to the catalogue, many in flight, answered as they finish.

Rules: a call is decoded strictly (unknown fields are from the future and ignored), runs as a task
of the server, and always gets one reply. A call goes on when its connection is lost: a change that
was put must be waited for (catalogue.py). At most CONTROL_IN_FLIGHT_MAX of a connection run;
then, and while the peer does not read its replies, we stop reading.
Failure modes: an expected failure is a reply with code and message; a malformed call is E_INVALID;
anything else is our bug and takes the server down.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec

from millpond.native.store import NO_ID, VolumeState
from millpond.store import limits, wire
from millpond.store.catalogue import Catalogue
from millpond.store.errors import Code, ProtocolError, StoreError, one_line
from millpond.store.session import Peer, Session

Id = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
Count = Annotated[int, msgspec.Meta(ge=0)]
Selector = Annotated[str, msgspec.Meta(max_length=limits.NAME_BYTES_MAX)]


class Create(msgspec.Struct, tag_field="op", tag="volume.create", frozen=True):
    """volume.create"""

    name: str
    size_bytes: Count


class ListVolumes(msgspec.Struct, tag_field="op", tag="volume.list", frozen=True):
    """volume.list"""


class Show(msgspec.Struct, tag_field="op", tag="volume.show", frozen=True):
    """volume.show"""

    name: Selector | None = None
    id: Id | None = None


class Delete(msgspec.Struct, tag_field="op", tag="volume.delete", frozen=True):
    """volume.delete"""

    name: Selector | None = None
    id: Id | None = None
    force: bool = False


class Open(msgspec.Struct, tag_field="op", tag="volume.open", frozen=True):
    """volume.open"""

    id: Id
    cache_id: Id
    lineage: Count
    expected_epoch: Count
    first_sequence: Count | None = None
    accept_loss: bool = False


class Dirty(msgspec.Struct, tag_field="op", tag="volume.dirty", frozen=True):
    """volume.dirty"""

    id: Id
    epoch: Count
    cache_id: Id
    dirty: bool


class Close(msgspec.Struct, tag_field="op", tag="volume.close", frozen=True):
    """volume.close"""

    id: Id
    epoch: Count
    cache_id: Id


class Resize(msgspec.Struct, tag_field="op", tag="volume.resize", frozen=True):
    """volume.resize"""

    size_bytes: Count
    name: Selector | None = None
    id: Id | None = None
    shrink: bool = False


class Rename(msgspec.Struct, tag_field="op", tag="volume.rename", frozen=True):
    """volume.rename"""

    new_name: str
    name: Selector | None = None
    id: Id | None = None


class Status(msgspec.Struct, tag_field="op", tag="status", frozen=True):
    """status"""


Call = Create | ListVolumes | Show | Delete | Open | Dirty | Close | Resize | Rename | Status
DECODER = msgspec.json.Decoder(Call)


class VolumeJson(msgspec.Struct, frozen=True):
    """A volume as control replies show it."""

    name: str
    id: str
    size_bytes: int
    epoch: int
    lineage: int
    applied_sequence: int
    dirty_holder: str | None
    open_holder: str | None
    stored_bytes: int
    created_commit: int
    lineages: tuple[tuple[int, int], ...]  # id and first sequence, oldest first


class ControlOperations:
    """What each call does."""

    def __init__(
        self,
        catalogue: Catalogue,
        stored_bytes: Callable[[bytes], int],
        status: Callable[[], dict[str, Any]],
    ) -> None:
        self._catalogue = catalogue
        self._stored_bytes = stored_bytes
        self._status = status

    async def run(self, payload: wire.Bytes) -> dict[str, Any]:
        """Decode and run one call; the reply's JSON."""
        try:
            call = DECODER.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return _refusal(Code.INVALID, f"malformed call: {one_line(str(error))}")
        try:
            return {"ok": True, **await self._dispatch(call)}
        except StoreError as error:
            return _refusal(error.code, error.message)

    async def _dispatch(self, call: Call) -> dict[str, Any]:
        match call:
            case ListVolumes():
                return {"volumes": [self._json(state) for state in self._catalogue.list()]}
            case Status():
                return {"store": self._status()}
            case Show():
                return self._volume(self._find(call))
            case Create():
                return self._volume(await self._catalogue.create(call.name, call.size_bytes))
            case Delete():
                state = self._find(call)
                before = self._volume(state)
                await self._catalogue.delete(state.id, force=call.force)
                return before
            case Resize():
                found = self._find(call).id
                return self._volume(
                    await self._catalogue.resize(
                        found, size_bytes=call.size_bytes, shrink=call.shrink
                    )
                )
            case Rename():
                found = self._find(call).id
                return self._volume(await self._catalogue.rename(found, call.new_name))
        return self._volume(await self._change(call))

    async def _change(self, call: Open | Dirty | Close) -> VolumeState:
        volume_id, cache_id = bytes.fromhex(call.id), bytes.fromhex(call.cache_id)
        if cache_id == NO_ID:
            raise StoreError(Code.INVALID, "a cache id of zero means nobody")
        match call:
            case Open():
                return await self._catalogue.open(
                    volume_id,
                    cache_id=cache_id,
                    lineage=call.lineage,
                    first_sequence=call.first_sequence,
                    expected_epoch=call.expected_epoch,
                    accept_loss=call.accept_loss,
                )
            case Dirty():
                return await self._catalogue.set_dirty(
                    volume_id, epoch=call.epoch, cache_id=cache_id, dirty=call.dirty
                )
            case Close():
                return await self._catalogue.close(volume_id, epoch=call.epoch, cache_id=cache_id)

    def _find(self, call: Show | Delete | Resize | Rename) -> VolumeState:
        volume_id = bytes.fromhex(call.id) if call.id is not None else None
        return self._catalogue.find(name=call.name, volume_id=volume_id)

    def _volume(self, state: VolumeState) -> dict[str, Any]:
        return {"volume": self._json(state)}

    def _json(self, state: VolumeState) -> VolumeJson:
        return VolumeJson(
            name=state.name,
            id=state.id.hex(),
            size_bytes=state.size_bytes,
            epoch=state.epoch,
            lineage=state.lineage,
            applied_sequence=state.applied_sequence,
            dirty_holder=_holder(state.dirty_holder),
            open_holder=_holder(state.open_holder),
            stored_bytes=self._stored_bytes(state.id),
            created_commit=state.created_commit,
            lineages=tuple((known.id, known.first_sequence) for known in state.lineages),
        )


class ControlSession(Session):
    """One control connection after its handshake."""

    role: Literal["control"] = "control"

    def __init__(self, peer: Peer, operations: ControlOperations) -> None:
        self._peer = peer
        self._operations = operations
        self._running = 0
        self._writable = True
        self._lost = False
        self._reader = wire.FrameReader(
            payload_max_bytes=limits.CONTROL_PAYLOAD_MAX_BYTES,
            types=(wire.CONTROL,),
            peer="the client",
        )

    def received(self, data: memoryview) -> None:
        self._reader.feed(data)
        self._pump()

    def writable(self, writable: bool) -> None:
        self._writable = writable
        self._pump()

    def lost(self) -> None:
        self._lost = True

    def _pump(self) -> None:
        """Start calls while the limits allow; read on only then."""
        while not self._lost and self._may_start():
            try:
                frame = self._reader.next_frame()
            except ProtocolError as error:
                self._peer.refuse(wire.encode_error(error.message), error.message)
                return
            if frame is None:
                break
            self._running += 1
            self._peer.spawn(self._answer(frame))
        self._peer.set_reading(self._may_start())

    def _may_start(self) -> bool:
        return self._writable and self._running < limits.CONTROL_IN_FLIGHT_MAX

    async def _answer(self, frame: wire.Frame) -> None:
        reply = await self._operations.run(frame.payload)
        self._running -= 1
        if self._lost:
            return
        self._peer.send(wire.encode_json(wire.CONTROL_REPLY, reply, request_id=frame.request_id))
        self._pump()


def _holder(holder: bytes) -> str | None:
    return holder.hex() if holder != NO_ID else None


def _refusal(code: str, message: str) -> dict[str, Any]:
    return {"ok": False, "code": str(code), "message": message}
