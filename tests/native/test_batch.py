"""Whole BATCH payloads from a flat range: what import writes and a store reads."""

import errno
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golden import generate
from millpond.native import ffi, lib, record
from models import record_model as model

VOLUME = generate.VOLUME
BLOCK = 4096
PATCH = Random(7).randbytes(BLOCK)
KINDS = {"zero": bytes(BLOCK), "random": PATCH, "text": (b"the pond " * 456)[:BLOCK]}


def encode(first_block: int, data: bytes, *, first_sequence: int = 10) -> tuple[bytes, int]:
    """A batch of VOLUME, lineage 5, epoch 2."""
    return record.encode_batch(
        VOLUME,
        lineage=5,
        epoch=2,
        first_sequence=first_sequence,
        first_block=first_block,
        data=data,
    )


def decode(payload: bytes, *, first_block: int, block_count: int) -> bytes:
    """All blocks of a batch, by the model; every block must be written exactly once, in order."""
    out = b""
    for part in model.unpack_batch(payload):
        for extent, stored in model.extents_of(part):
            assert extent.first_block == first_block + len(out) // BLOCK
            out += model.decode_extent(extent, stored)
    assert len(out) == block_count * BLOCK
    return out


ranges = st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=24)


@settings(max_examples=60)
@given(ranges, st.integers(0, 2**40), st.integers(1, 2**60))
def test_a_batch_is_what_the_model_reads(kinds: list[str], first: int, sequence: int) -> None:
    data = b"".join(KINDS[kind] for kind in kinds)
    payload, last = encode(first, data, first_sequence=sequence)
    assert decode(payload, first_block=first, block_count=len(kinds)) == data
    (part,) = model.unpack_batch(payload)
    assert (part.flags, part.part_index, part.lineage, part.epoch) == (1, 0, 5, 2)
    assert (part.volume, part.first_sequence, part.last_sequence) == (VOLUME, sequence, last)
    runs = [(e.first_block, e.block_count, e.codec == model.ZERO) for e in part.extents]
    assert runs == model.split_runs(first, data)
    assert [e.sequence for e in part.extents] == list(range(sequence, last + 1))


@pytest.mark.parametrize("tail", ["", "zero", "text"])
def test_a_batch_of_many_parts_shares_its_sequences(tail: str) -> None:
    random = Random(3)
    data = random.randbytes(BLOCK * 2100) + KINDS.get(tail, b"")
    payload, last = encode(3, data)
    parts = list(record.iterate_records(payload))
    assert [part.part_index for part, _ in parts] == [0, 1, 2]
    assert [part.last_of_batch for part, _ in parts] == [False, False, True]
    assert {(part.first_sequence, part.last_sequence) for part, _ in parts} == {(10, last)}
    assert all(part.payload_length_bytes <= lib.MP_RECORD_PAYLOAD_MAX for part, _ in parts)
    assert last == 10 + sum(len(part.extents) for part, _ in parts) - 1
    assert len(payload) % 8 == 0
    assert decode(payload, first_block=3, block_count=len(data) // BLOCK) == data


def test_parts_are_aligned_when_a_payload_has_an_odd_length() -> None:
    text = b"".join(f"line {i * i} of the ledger\n".encode() for i in range(400_000))
    data = text[: BLOCK * 1500]
    payload, _ = encode(0, data)
    parts = list(record.iterate_records(payload))
    assert len(parts) == 2
    assert any(part.payload_length_bytes % 8 for part, _ in parts)
    assert decode(payload, first_block=0, block_count=1500) == data


def test_a_range_of_zeroes_is_one_extent() -> None:
    payload, last = encode(1, bytes(BLOCK * 5000))
    (part,) = model.unpack_batch(payload)
    assert (len(payload), last) == (192 + 120, 10)
    assert (part.extents[0].block_count, part.extents[0].codec) == (5000, model.ZERO)


def raw_encode(data: bytes, capacity: int) -> int:
    """mp_batch_encode into exactly capacity bytes."""
    out = ffi.new("uint64_t[]", max(capacity // 8, 1))
    last = ffi.new("uint64_t *")
    count = len(data) // BLOCK
    result = lib.mp_batch_encode(VOLUME, 5, 2, 10, 0, count, data, out, capacity, last)
    return result


def test_too_small_a_room_is_said_and_not_overrun() -> None:
    random = Random(5)
    data = random.randbytes(5 * BLOCK) + bytes(BLOCK) + random.randbytes(BLOCK)
    need = raw_encode(data, 1 << 20)
    assert need == 192 + 4 * 120 + 6 * BLOCK
    for capacity in (*range(0, 1024, 8), *range(need - 32, need, 8)):
        assert raw_encode(data, capacity) == -errno.ENOSPC
    assert raw_encode(data, need) == need


def test_more_than_a_frame_can_carry_is_refused() -> None:
    data = Random(1).randbytes(BLOCK * 4096)
    assert raw_encode(data, 1 << 25) == -errno.ENOSPC
    with pytest.raises(OSError) as caught:
        encode(0, data)
    assert caught.value.errno == errno.ENOSPC


def test_arguments_that_no_batch_can_carry() -> None:
    out = ffi.new("uint64_t[]", 4096)
    last = ffi.new("uint64_t *")
    good = [VOLUME, 5, 2, 10, 0, 1, PATCH, out, 32768, last]
    assert lib.mp_batch_encode(*good) > 0
    for position, value in ((0, bytes(16)), (3, 0), (3, 2**64 - 1), (4, 2**51), (4, 2**64 - 1),
                            (5, 0), (5, 2**64 - 1), (5, 2**52)):  # fmt: skip
        bad = [*good]
        bad[position] = value
        assert lib.mp_batch_encode(*bad) == -errno.EINVAL


def test_a_batch_cut_off_between_parts_or_within_one() -> None:
    payload, _ = encode(0, PATCH * 1100)
    first = next(record.iterate_records(payload))[0]
    assert [r.part_index for r, _ in record.iterate_records(payload[: first.length_bytes])] == [0]
    for length in (1, 100, 192, first.length_bytes - 1, first.length_bytes + 8, len(payload) - 9):
        with pytest.raises(OSError) as caught:
            list(record.iterate_records(payload[:length]))
        assert caught.value.errno == errno.EPROTO
