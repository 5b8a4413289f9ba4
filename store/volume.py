"""A volume's state as the core logs it (struct mp_volume_state), wrapped for Python.

Rules: the bytes are the truth. An edit copies them and changes the named fields only, so that
fields which Python does not know (parent, flags, reserved) survive. Never mutated in place.
"""

from collections.abc import Sequence
from typing import Any

from millpond.native import ffi, lib

NOBODY = bytes(16)
STATE_BYTES = ffi.sizeof("struct mp_volume_state")
LINEAGE_MAX = 2**64 - 1
LINEAGES_MAX: int = lib.MP_LINEAGES


class VolumeState:
    """Committed (or wanted) state of one volume."""

    __slots__ = ("_state", "raw")

    def __init__(self, raw: bytes) -> None:
        assert len(raw) == STATE_BYTES
        self.raw = raw
        self._state: Any = ffi.cast("struct mp_volume_state *", ffi.from_buffer(raw))

    @classmethod
    def new(cls, volume_id: bytes, *, name: str, size_bytes: int) -> "VolumeState":
        """A volume that was never opened and holds nothing."""
        state = ffi.new("struct mp_volume_state *")
        state.id = volume_id
        state.size_bytes = size_bytes
        ffi.memmove(state.name, name.encode(), len(name.encode()))
        return cls(bytes(ffi.buffer(state)))

    def edit(
        self,
        *,
        epoch: int | None = None,
        open_holder: bytes | None = None,
        dirty_holder: bytes | None = None,
        lineages: Sequence[tuple[int, int]] | None = None,
    ) -> "VolumeState":
        """A copy with these fields changed."""
        state = ffi.new("struct mp_volume_state *")
        ffi.memmove(state, self._state, STATE_BYTES)
        if epoch is not None:
            state.epoch = epoch
        if open_holder is not None:
            state.open_holder = open_holder
        if dirty_holder is not None:
            state.dirty_holder = dirty_holder
        if lineages is not None:
            assert len(lineages) <= LINEAGES_MAX
            for index in range(LINEAGES_MAX):
                known = lineages[index] if index < len(lineages) else (0, 0)
                state.lineages[index].id, state.lineages[index].first_sequence = known
        return VolumeState(bytes(ffi.buffer(state)))

    @property
    def id(self) -> bytes:
        """Random, 16 bytes, never reused."""
        return bytes(ffi.buffer(self._state.id))

    @property
    def name(self) -> str:
        """An alias of the id, unique in its store."""
        return ffi.string(self._state.name).decode("utf-8", "replace")  # type: ignore[union-attr]

    @property
    def size_bytes(self) -> int:
        """As the guest sees it."""
        return int(self._state.size_bytes)

    @property
    def epoch(self) -> int:
        """Counts writable opens: the fence."""
        return int(self._state.epoch)

    @property
    def lineage(self) -> int:
        """Of the newest applied record, 0 when there is none."""
        return int(self._state.lineage)

    @property
    def applied_sequence(self) -> int:
        """Position of the image."""
        return int(self._state.applied_sequence)

    @property
    def created_commit(self) -> int:
        """Store-wide commit number of its birth."""
        return int(self._state.created_commit)

    @property
    def open_holder(self) -> bytes:
        """Cache that has it open for writing; NOBODY."""
        return bytes(ffi.buffer(self._state.open_holder))

    @property
    def dirty_holder(self) -> bytes:
        """Cache that may hold acknowledged writes not shipped; NOBODY."""
        return bytes(ffi.buffer(self._state.dirty_holder))

    @property
    def lineages(self) -> list[tuple[int, int]]:
        """(id, first sequence) of the remembered writable opens, newest last."""
        known = self._state.lineages
        return [
            (int(known[i].id), int(known[i].first_sequence))
            for i in range(LINEAGES_MAX)
            if known[i].id != 0
        ]
