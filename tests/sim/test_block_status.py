"""BLOCK_STATUS and CACHE: what is said of a range, wherever its blocks are, against a plain model.

A hole may only be claimed of what reads as zeroes; and once everything is at the store, what was
never written, or trimmed, must be found again as a hole.
"""

import random
import struct
from collections.abc import Iterator

import pytest

from millpond.native import lib
from millpond.nbd import wire
from millpond.nbd.wire import Allocation, Command
from sim.nodes import FetchSocket
from sim.rig import BLOCK, Rig

VOLUME = b"status of a disk"
BLOCKS = 4096
HOLE = Allocation.HOLE | Allocation.ZERO
Runs = list[tuple[int, int]]  # blocks, flags


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A cache and a store with an open volume."""
    rig = Rig()
    rig.start()
    rig.open(VOLUME, size_bytes=BLOCKS * BLOCK)
    yield rig
    rig.close()


def chunk(rig: Rig, socket: int) -> bytes:
    """The payload of one BLOCK_STATUS chunk."""
    got = bytearray()

    def whole() -> bool:
        got.extend(rig.sim.pop(socket))
        if len(got) < wire.CHUNK.size:
            return False
        return len(got) >= wire.CHUNK.size + int(wire.CHUNK.unpack_from(got)[4])

    rig.until(whole)
    magic, flags, kind, _, length_bytes = wire.CHUNK.unpack_from(got)
    assert (magic, flags, kind) == (wire.CHUNK_MAGIC, wire.CHUNK_DONE, wire.Chunk.BLOCK_STATUS)
    assert len(got) == wire.CHUNK.size + length_bytes
    return bytes(got[wire.CHUNK.size + wire.CONTEXT_ID.size :])


def once(rig: Rig, socket: int, first: int, count: int) -> Runs:
    """One answer, in blocks."""
    rig.ask(socket, Command.BLOCK_STATUS, first * BLOCK, count * BLOCK)
    runs = [*wire.STATUS_DESCRIPTOR.iter_unpack(chunk(rig, socket))]
    assert all(length_bytes % BLOCK == 0 for length_bytes, _ in runs)
    assert all(left[1] != right[1] for left, right in zip(runs, runs[1:], strict=False))
    return [(length_bytes // BLOCK, flags) for length_bytes, flags in runs]


def flags_of(rig: Rig, socket: int, first: int = 0, count: int = BLOCKS) -> list[int]:
    """The flags of each block; asks again as long as the answers are partial."""
    found: list[int] = []
    while len(found) < count:
        for blocks, flags in once(rig, socket, first + len(found), count - len(found)):
            found += [flags] * blocks
    assert len(found) == count
    return found


def test_fresh_volume_is_one_hole(rig: Rig) -> None:
    socket = rig.connect(VOLUME, allocation=True)
    assert once(rig, socket, 0, BLOCKS) == [(BLOCKS, HOLE)]


def test_what_is_only_in_the_log_is_seen(rig: Rig) -> None:
    socket = rig.connect(VOLUME, allocation=True)
    rig.write(rig.connect(VOLUME), 10, 1, 2)
    rig.trim(rig.connect(VOLUME), 11, 1)
    assert once(rig, socket, 0, 100) == [(10, HOLE), (1, 0), (89, HOLE)]


def test_trim_that_is_not_shipped_hides_what_the_store_has(rig: Rig) -> None:
    guest, socket = rig.connect(VOLUME), rig.connect(VOLUME, allocation=True)
    rig.write(guest, 0, 1, 64)
    rig.ship(VOLUME)
    rig.trim(guest, 8, 40)
    assert once(rig, socket, 0, 64) == [(8, 0), (40, HOLE), (16, 0)]
    rig.ship(VOLUME)
    assert once(rig, socket, 0, 64) == [(8, 0), (40, HOLE), (16, 0)]


def test_zero_blocks_are_holes_once_they_are_written(rig: Rig) -> None:
    guest, socket = rig.connect(VOLUME), rig.connect(VOLUME, allocation=True)
    rig.write(guest, 0, 1, 4)
    rig.write(guest, 1, 0, 2)
    assert once(rig, socket, 0, 4) == [(1, 0), (2, HOLE), (1, 0)]


def test_without_the_store_the_unknown_is_data(rig: Rig) -> None:
    guest, socket = rig.connect(VOLUME), rig.connect(VOLUME, allocation=True)
    rig.write(guest, 4, 1, 4)
    rig.trim(guest, 6, 1)
    rig.carrying = False
    rig.engine.fetch_close(0)
    assert once(rig, socket, 0, 16) == [(6, 0), (1, HOLE), (9, 0)]


def test_store_that_does_not_know_the_question_is_not_asked(rig: Rig) -> None:
    socket = rig.connect(VOLUME, allocation=True)
    rig.fetch = FetchSocket(rig.sim, rig.engine, block_status=False)
    assert once(rig, socket, 0, 16) == [(16, 0)]
    assert rig.fetch.take() == b""


def test_store_that_goes_away_with_the_question_leaves_it_answered(rig: Rig) -> None:
    socket = rig.connect(VOLUME, allocation=True)
    rig.carrying = False
    rig.ask(socket, Command.BLOCK_STATUS, 0, 16 * BLOCK)
    rig.until(lambda: rig.fetch.take())
    rig.engine.fetch_close(0)
    assert chunk(rig, socket) == wire.STATUS_DESCRIPTOR.pack(16 * BLOCK, 0)


def test_unaligned_range_is_answered_to_the_byte(rig: Rig) -> None:
    guest, socket = rig.connect(VOLUME), rig.connect(VOLUME, allocation=True)
    rig.write(guest, 1, 1, 1)
    rig.ask(socket, Command.BLOCK_STATUS, 100, 3 * BLOCK)
    pack = wire.STATUS_DESCRIPTOR.pack
    assert chunk(rig, socket) == (
        pack(BLOCK - 100, HOLE) + pack(BLOCK, 0) + pack(BLOCK + 100, HOLE)
    )


def test_ragged_range_is_answered_in_part(rig: Rig) -> None:
    guest, socket = rig.connect(VOLUME), rig.connect(VOLUME, allocation=True)
    for block in range(0, 2200, 2):
        rig.write(guest, block, 1, 1)
    answer = once(rig, socket, 0, BLOCKS)
    assert len(answer) == 1024
    assert flags_of(rig, socket, 0, 2200) == [0, HOLE] * 1100
    rig.ship(VOLUME)
    assert flags_of(rig, socket, 0, 2200) == [0, HOLE] * 1100


@pytest.mark.parametrize("seed", range(6))
def test_status_never_lies_and_finds_every_hole_in_the_end(rig: Rig, seed: int) -> None:
    chance = random.Random(seed)
    guest, socket = rig.connect(VOLUME), rig.connect(VOLUME, allocation=True)
    model = bytearray(BLOCKS)  # what each block is full of
    logged = 0
    for step in range(120):
        first = chance.randrange(BLOCKS)
        count = chance.randrange(1, min(BLOCKS - first, chance.choice((3, 60, 900))) + 1)
        action = chance.randrange(12)
        if action < 6:
            fill = chance.choice((0, 1 + step))
            for at in range(first, first + count, 60):
                blocks = min(60, first + count - at)
                rig.write(guest, at, fill, blocks)
            model[first : first + count] = bytes([fill]) * count
            logged += count
        elif action < 9:
            rig.trim(guest, first, count)
            model[first : first + count] = bytes(count)
        if action == 9 or logged > 2000:  # the log has room for 6000
            rig.ship(VOLUME)
            logged = 0
        elif action == 10:
            rig.done(guest, Command.CACHE, first * BLOCK, count * BLOCK)
        claimed = flags_of(rig, socket, first, count)
        for block, flags in enumerate(claimed, start=first):
            assert flags == 0 or model[block] == 0, f"block {block} is data, not a hole"
    rig.ship(VOLUME)
    assert flags_of(rig, socket) == [0 if fill else HOLE for fill in model]


def test_cache_brings_blocks_into_slots_and_reads_then_ask_no_store(rig: Rig) -> None:
    guest = rig.connect(VOLUME)
    rig.write(guest, 0, 7, 60)
    rig.ship(VOLUME)
    rig.stop()
    rig.start()
    rig.open(VOLUME, size_bytes=BLOCKS * BLOCK, keep_slots=False)
    guest = rig.connect(VOLUME)
    rig.done(guest, Command.CACHE, 0, BLOCKS * BLOCK)
    rig.until(lambda: rig.engine.counters()["slot_writes"] >= 15)
    for _ in range(200):
        rig.turn()
    fetches = rig.engine.counters()["fetches"]
    assert [rig.read(guest, block) for block in range(60)] == [7] * 60
    assert rig.engine.counters()["fetches"] == fetches
    assert rig.engine.counters()["misses"] == 0, "prefetched blocks are no misses of the guest"


def test_cache_without_the_store_succeeds_and_does_nothing(rig: Rig) -> None:
    guest = rig.connect(VOLUME)
    rig.carrying = False
    rig.engine.fetch_close(0)
    rig.done(guest, Command.CACHE, 0, BLOCKS * BLOCK)
    assert rig.engine.counters()["fetches"] == 0


@pytest.mark.parametrize(
    "spoil",
    ["no_runs", "too_long", "empty_run", "strange_hole", "reserved", "elsewhere", "cut"],
)
def test_answer_of_the_store_that_makes_no_sense_ends_its_link(rig: Rig, spoil: str) -> None:
    socket = rig.connect(VOLUME, allocation=True)
    rig.carrying = False
    rig.ask(socket, Command.BLOCK_STATUS, 0, 16 * BLOCK)
    frame = b""

    def asked() -> bool:
        nonlocal frame
        frame += rig.fetch.take()
        return len(frame) >= 112

    rig.until(asked)
    (request_id,) = struct.unpack_from("<Q", frame, 32)
    head = struct.pack(
        "<16sQQQII",
        VOLUME,
        7,
        0,
        spoil == "elsewhere",
        0 if spoil == "no_runs" else 1,
        spoil == "reserved",
    )
    blocks = {"too_long": 17, "empty_run": 0}.get(spoil, 16)
    run = struct.pack("<QII", blocks, 2 if spoil == "strange_hole" else 1, 0)
    payload = head + (b"" if spoil == "no_runs" else run)
    if spoil == "cut":
        payload = payload[:-8]
    rig.store_says(lib.MP_FRAME_BLOCK_STATUS_REPLY, payload, request_id)
    rig.until(lambda: any("LinkBroken" in type(event).__name__ for event in rig.events))
    assert chunk(rig, socket) == wire.STATUS_DESCRIPTOR.pack(16 * BLOCK, 0)
