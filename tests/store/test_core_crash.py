"""Crash sweep: a small history cut after every Nth I/O, then recovery held against the model.

What must hold after every cut: all acknowledged batches are there; the image is the model at
exactly one batch boundary, not before the acknowledged one; an acknowledged deletion stays.
"""

from dataclasses import dataclass, field

import pytest

from millpond.native import lib
from millpond.native.drivers import SimOptions
from store_support import BLOCK, VOLUME, World, WorldEnded, Write, fill

OK = lib.MP_STATUS_OK
BLOCKS = 96
OTHER = b"other volume id."
SEGMENT_BYTES = 128 * 1024


@dataclass
class Model:
    """Images of one volume after each batch; index = applied sequence."""

    images: list[bytes] = field(default_factory=lambda: [bytes(BLOCKS * BLOCK)])
    acknowledged: int = 0

    def apply(self, writes: list[Write]) -> None:
        """One batch, numbered by its only sequence."""
        image = bytearray(self.images[-1])
        for write in writes:
            data = write.data or bytes(write.block_count * BLOCK)
            at = write.first_block * BLOCK
            image[at : at + len(data)] = data
        self.images.append(bytes(image))


def history(seed: int) -> list[list[Write]]:
    """Batches with overwrites, trims and compressible data."""
    batches = []
    for index in range(14):
        first = (index * 13 + seed) % 60
        writes = [
            Write(first, fill(seed * 100 + index, 9, compressible=index % 3 == 0)),
            Write((first + 20) % 80, fill(seed * 100 + 50 + index, 2)),
        ]
        if index % 4 == 3:
            writes.append(Write(first + 2, block_count=20))
        batches.append(writes)
    return batches


def play(world: World, model: Model, seed: int) -> bool:
    """The history; True when the other volume's deletion was acknowledged. WorldEnded."""
    world.create(blocks=BLOCKS)
    world.create(OTHER, blocks=BLOCKS)
    world.write([Write(0, fill(9, 30))], first=1, volume=OTHER)
    deleted = False
    pending: list[tuple[int, int]] = []
    for index, writes in enumerate(history(seed)):
        sequence = index + 1
        model.apply(writes)
        parts = 1 + index % 3
        request = world.send_write(writes, first=sequence, last=sequence, parts=parts)
        pending.append((sequence, request))
        if index % 3 == 2:
            for number, request in pending:
                assert world.wait(request).status == OK
                model.acknowledged = number
            pending = []
        if index in (5, 11):
            assert world.checkpoint() == OK
        if index == 7:
            deleted = world.delete(OTHER) == OK
            world.DELETED = True  # type: ignore[attr-defined]
    for number, request in pending:
        assert world.wait(request).status == OK
        model.acknowledged = number
    return deleted


def check(world: World, model: Model) -> None:
    """After recovery."""
    state = world.store.volume(VOLUME)
    if state is None:
        assert model.acknowledged == 0
        return
    assert state.applied_sequence >= model.acknowledged
    assert world.image(BLOCKS) == model.images[state.applied_sequence]
    if getattr(world, "DELETED", False):
        assert world.store.volume(OTHER) is None
    # The store works: write, checkpoint, read back.
    data = fill(1234, 5)
    assert world.write([Write(40, data)], first=state.applied_sequence + 1) == OK
    assert world.checkpoint() == OK
    assert world.read(40, 5).data == data


def cut_at(nth: int, seed: int, *, lose: bool, tear: bool, reorder: bool, faults: int = 0) -> bool:
    """One history cut after the nth mutating I/O; False when it ran to its end."""
    world = World(
        SimOptions(seed=seed, latency_ns=5000, reorder=reorder),
        test_faults=faults,
        page_cache_bytes=64 * 4096,
    )
    model = Model()
    try:
        world.format(segment_bytes=SEGMENT_BYTES)
        world.sim.set(
            SimOptions(
                seed=seed * 1000 + nth,
                latency_ns=5000,
                reorder=reorder,
                lose_unsynced=lose,
                tear=tear,
                crash_after_io=nth,
            )
        )
        try:
            world.open()
            play(world, model, seed)
            cut = False
        except (WorldEnded, OSError):
            cut = True
        except Exception as error:
            if not world.sim.crashed:
                raise
            assert "108" in str(error), error  # opening was cut: -ESHUTDOWN
            cut = True
        world.shut()
        world.sim.set(SimOptions(seed=seed, latency_ns=5000, reorder=reorder))
        world.open()
        check(world, model)
        world.reopen()
        state = world.store.volume(VOLUME)
        if state is not None:
            assert world.read(40, 5).data == fill(1234, 5)
        return cut
    finally:
        world.close()


KINDS = {
    "daemon": {"lose": False, "tear": False, "reorder": False},
    "power": {"lose": True, "tear": False, "reorder": False},
    "power-torn": {"lose": True, "tear": True, "reorder": False},
    "power-torn-reordered": {"lose": True, "tear": True, "reorder": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_crash_after_every_io(kind: str) -> None:
    seed = 1 + list(KINDS).index(kind)
    nth = 1
    while cut_at(nth, seed, **KINDS[kind]):
        nth += 1
        assert nth < 2000
    assert nth > 30
