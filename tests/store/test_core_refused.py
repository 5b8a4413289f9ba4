"""What the store refuses, and what it takes again: epochs, lineages, gaps, repeats, streams."""

from collections.abc import Iterator

import pytest

from millpond.native import lib, record
from millpond.native.store import Lineage, ProtocolError
from store_support import BLOCK, LINEAGE, VOLUME, World, Write, batch_payload, fill

OK = lib.MP_STATUS_OK


@pytest.fixture
def world() -> Iterator[World]:
    made = World().format().open()
    made.create(blocks=64)
    yield made
    made.close()


def test_gap_is_refused_and_overlap_is_taken(world: World) -> None:
    assert world.write([Write(0, fill(1))], first=2) == lib.MP_STATUS_GAP
    assert world.write([Write(0, fill(1)), Write(1, fill(2))], first=1) == OK
    assert world.write([Write(0, fill(3)), Write(1, fill(4))], first=2) == OK
    assert world.read(0, 2).data == fill(3) + fill(4)
    assert world.state().applied_sequence == 3


def test_repeated_batch_is_answered_and_not_applied(world: World) -> None:
    assert world.write([Write(0, fill(1))], first=1) == OK
    assert world.write([Write(0, fill(2))], first=2) == OK
    appended = world.store.counters()["payload_bytes"]
    assert world.write([Write(0, fill(1))], first=1) == OK
    assert world.read(0, 1).data == fill(2)
    assert world.store.counters()["repeated_batches"] == 1
    assert world.store.counters()["payload_bytes"] > appended


def test_repeat_is_not_answered_before_the_first_is_durable(world: World) -> None:
    one = world.send_write([Write(0, fill(1))], first=1)
    two = world.send_write([Write(0, fill(1))], first=1)
    syncs = world.store.counters()["syncs"]
    assert world.wait(two).status == OK
    assert world.store.counters()["syncs"] > syncs
    assert world.wait(one).status == OK


def test_lower_epoch_is_refused_for_ever(world: World) -> None:
    state = world.state()
    assert world.put(state.with_changes(epoch=5)) == OK
    for _ in range(2):
        assert world.write([Write(0, fill(1))], first=1, epoch=4) == lib.MP_STATUS_STALE_EPOCH
        assert world.read(0, 1, epoch=4).status == lib.MP_STATUS_STALE_EPOCH
        assert world.put(state.with_changes(epoch=4)) == lib.MP_STATUS_STALE_EPOCH
        assert world.write([Write(0, fill(1))], first=1, epoch=6) == lib.MP_STATUS_INVALID
        assert world.checkpoint() == OK
        world.reopen()
    assert world.write([Write(0, fill(1))], first=1, epoch=5) == OK


def test_fault_old_epoch_is_what_the_check_prevents() -> None:
    world = World(test_faults=lib.MP_STORE_FAULT_OLD_EPOCH).format().open()
    world.create(epoch=5)
    assert world.write([Write(0, fill(1))], first=1, epoch=4) == OK
    world.close()


def test_fault_apply_gap_is_what_the_check_prevents() -> None:
    world = World(test_faults=lib.MP_STORE_FAULT_APPLY_GAP).format().open()
    world.create()
    assert world.write([Write(0, fill(1))], first=9) == OK
    world.close()


def test_only_lineages_on_record_and_not_older_ones(world: World) -> None:
    assert world.write([Write(0, fill(1))], first=1, lineage=5) == lib.MP_STATUS_LINEAGE
    state = world.state()
    newer = state.with_changes(lineages=(Lineage(LINEAGE, 1), Lineage(5, 2)))
    assert world.put(newer) == OK
    assert world.write([Write(0, fill(1))], first=1) == OK
    assert world.write([Write(0, fill(1))], first=2, lineage=5) == OK
    assert world.write([Write(0, fill(1))], first=3) == lib.MP_STATUS_LINEAGE
    assert world.state().lineage == 5


def test_newer_writer_cannot_repeat_an_older_ones_batch(world: World) -> None:
    assert world.write([Write(0, fill(1))], first=1) == OK
    state = world.state()
    assert world.put(state.with_changes(lineages=(*state.lineages, Lineage(5, 2)))) == OK
    assert world.write([Write(0, fill(2))], first=1, lineage=5) == lib.MP_STATUS_CONFLICT
    assert world.read(0, 1).data == fill(1)


def test_batch_whose_sequence_no_checkpoint_can_hold(world: World) -> None:
    """Else the next start would find a checkpoint that cannot be: one batch, and no store."""
    state = world.state()
    for last in (2**63 - 1, 2**64 - 2):
        refused = world.write([Write(0, fill(1))], first=1, last=last)
        assert refused == lib.MP_STATUS_INVALID
    fresh = state.with_changes(id=b"another volume..", applied_sequence=2**63 - 1)
    assert world.put(fresh) == lib.MP_STATUS_INVALID
    assert world.write([Write(0, fill(1))], first=1, last=2**63 - 2) == OK
    assert world.checkpoint() == OK
    world.reopen()
    assert world.state().applied_sequence == 2**63 - 2


def test_batch_with_data_of_another_origin(world: World) -> None:
    """Made-up origins would fill the store's table of them, which only grows."""
    stranger, stored = record.encode_extent(b"somebody else...", 0, fill(1), sequence=1)
    whole = record.encode_record(
        record.Record(
            type=lib.MP_RECORD_BATCH,
            volume=VOLUME,
            lineage=LINEAGE,
            first_sequence=1,
            last_sequence=1,
            epoch=1,
            last_of_batch=True,
            extents=(stranger,),
        ),
        stored,
    )
    status = world.call(lib.MP_FRAME_BATCH, whole, connection=1).status
    assert status == lib.MP_STATUS_INVALID
    assert world.read(0, 1).data == bytes(BLOCK)


def test_unknown_volume(world: World) -> None:
    other = b"nobody's volume."
    refused = lib.MP_STATUS_UNKNOWN_VOLUME
    assert world.write([Write(0, fill(1))], first=1, volume=other) == refused
    assert world.read(0, 1, volume=other).status == refused
    assert world.store.volume(other) is None


def test_beyond_the_end(world: World) -> None:
    assert world.write([Write(63, fill(1, 2))], first=1) == lib.MP_STATUS_RANGE
    assert world.write([Write(60, block_count=5)], first=1) == lib.MP_STATUS_RANGE
    assert world.read(63, 2).status == lib.MP_STATUS_RANGE
    assert world.read(2**60, 1).status == lib.MP_STATUS_RANGE
    assert world.read(0, 0).status == lib.MP_STATUS_INVALID
    assert world.read(0, 257).status == lib.MP_STATUS_INVALID
    assert world.read(63, 1).status == OK


def test_read_that_needs_more_than_is_applied(world: World) -> None:
    assert world.read(0, 1, minimum=1).status == lib.MP_STATUS_BEHIND
    assert world.write([Write(0, fill(1))], first=1) == OK
    reply = world.read(0, 1, minimum=1)
    assert (reply.status, reply.sequence, reply.data) == (OK, 1, fill(1))


def test_batch_that_does_not_verify(world: World) -> None:
    good = batch_payload([Write(0, fill(1, 8))], first=1, parts=2)
    for at in (0, 20, 250, 500, len(good) // 2 + 300, len(good) - 4):
        bad = bytearray(good)
        bad[at] ^= 1
        status = world.call(lib.MP_FRAME_BATCH, bytes(bad), connection=1).status
        assert status in (lib.MP_STATUS_CORRUPT, lib.MP_STATUS_INVALID), at
    for cut in (0, 8, 192, len(good) // 2, len(good) - 8):
        status = world.call(lib.MP_FRAME_BATCH, good[:cut], connection=1).status
        assert status in (lib.MP_STATUS_CORRUPT, lib.MP_STATUS_INVALID), cut
    assert world.read(0, 8).data == bytes(8 * BLOCK)
    assert world.call(lib.MP_FRAME_BATCH, good, connection=1).status == OK


def test_batch_without_its_last_part(world: World) -> None:
    whole = batch_payload([Write(0, fill(1, 8))], first=1, parts=2)
    first = next(record.iterate_records(whole))[1]
    status = world.call(lib.MP_FRAME_BATCH, bytes(first), connection=1).status
    assert status == lib.MP_STATUS_INVALID


def test_put_volume_does_not_move_the_position_back(world: World) -> None:
    """PUT_VOLUME racing batches: the daemon's copy of the position is older than the log."""
    state = world.state()
    requests = []
    for sequence in range(1, 20):
        requests.append(world.send_write([Write(sequence, fill(sequence))], first=sequence))
        changed = state.with_changes(dirty_holder=bytes([sequence]) * 16)
        requests.append(world.send(lib.MP_FRAME_PUT_VOLUME, changed.encode()))
    assert [world.wait(request).status for request in requests] == [OK] * len(requests)
    for _ in range(2):
        after = world.state()
        assert (after.applied_sequence, after.lineage) == (19, LINEAGE)
        assert after.dirty_holder == bytes([19]) * 16
        world.reopen()


def test_commands_of_the_daemon_are_refused_elsewhere(world: World) -> None:
    for frame_type in (
        lib.MP_FRAME_PUT_VOLUME,
        lib.MP_FRAME_DELETE_VOLUME,
        lib.MP_FRAME_CHECKPOINT,
        lib.MP_FRAME_HELLO,
        lib.MP_FRAME_READ_REPLY,
    ):
        with pytest.raises(ProtocolError):
            world.store.feed(100 + frame_type, record.encode_frame(frame_type))
        found = record.decode_frame(world.store.take(100 + frame_type))
        assert found and found[0].type == lib.MP_FRAME_ERROR
        with pytest.raises(ProtocolError):
            world.store.feed(100 + frame_type, record.encode_frame(lib.MP_FRAME_READ))
        assert world.store.take(100 + frame_type) == b""


def test_a_query_that_announces_more_than_a_query_needs_is_refused(world: World) -> None:
    """Else each connection could have 16 MiB of memory reserved by 64 bytes."""
    for frame_type in (lib.MP_FRAME_READ, lib.MP_FRAME_BLOCK_STATUS):
        frame = record.encode_frame(frame_type, bytes(lib.MP_BLOCK_BYTES + 8))
        with pytest.raises(ProtocolError):
            world.store.feed(100 + frame_type, frame[: lib.MP_FRAME_HEADER_BYTES])
    world.store.feed(7, record.encode_frame(lib.MP_FRAME_READ, bytes(lib.MP_BLOCK_BYTES)))


def test_stream_split_at_every_position(world: World) -> None:
    assert world.write([Write(0, fill(1))], first=1) == OK
    payload = batch_payload([Write(1, block_count=1)], first=1)
    frames = b"".join(
        record.encode_frame(kind, body, checked_bytes=0, request_id=10 + index)
        for index, (kind, body) in enumerate(
            [(lib.MP_FRAME_BATCH, payload), (lib.MP_FRAME_BATCH, b"")]
        )
    )
    for split in range(1, len(frames)):
        world.store.feed(7, frames[:split])
        world.store.feed(7, frames[split:])
        assert world.store.pending_bytes(7) == len(frames)
        data = b""
        while world.store.pending_bytes(7):
            world.store.step(1000)
        data = world.store.take(7, 10) + world.store.take(7)
        statuses = []
        while data:
            found = record.decode_frame(data)
            assert found
            frame, length = found
            statuses.append((frame.request_id, frame.status))
            data = data[length:]
        assert sorted(statuses) == [(10, OK), (11, lib.MP_STATUS_INVALID)]


def test_hangup_drops_replies_and_work_goes_on(world: World) -> None:
    world.send_write([Write(0, fill(1))], first=1)
    world.store.hangup(1)
    world.settle(20)
    assert world.store.take(1) == b"" and world.store.ready() == []
    assert world.read(0, 1).data == fill(1)
