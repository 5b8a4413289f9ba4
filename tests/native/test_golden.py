"""Golden images: bytes made once by the plain model, read by C for ever."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from golden import generate
from millpond.native import ffi, lib, record

VOLUME = generate.VOLUME
HEADERS = Path(__file__).resolve().parents[2] / "native"


def image(name: str) -> bytes:
    """The bytes as checked in."""
    return generate.path_of(name).read_bytes()


@pytest.mark.parametrize("make", generate.IMAGES)
def test_golden_images_are_what_the_model_writes(make: Callable[[], bytes]) -> None:
    assert image(make.__name__) == make()


@pytest.mark.parametrize("name", ["record_log", "record_batch", "record_volume"])
def test_golden_records_are_read_and_written_alike(name: str) -> None:
    data = image(name)
    decoded = record.decode_record(data)
    assert decoded is not None and decoded.length_bytes == len(data)
    record.check_payload(data)
    assert record.encode_record(decoded, data[decoded.header_length_bytes :]) == data


def test_golden_batch_decodes_to_its_blocks() -> None:
    data = image("record_batch")
    decoded = record.decode_record(data)
    assert decoded is not None
    packed, raw, hole = decoded.extents
    at = decoded.header_length_bytes
    middle = at + packed.stored_length_bytes
    assert record.decode_extent(packed, data[at:middle]) == generate.PATTERN * 1024
    assert record.decode_extent(raw, data[middle:]) == generate.noise("batch", 1)
    assert (hole.first_block, hole.block_count, hole.codec) == (5000, 1234, lib.MP_CODEC_ZERO)
    assert decoded.last_of_batch and decoded.volume == VOLUME


def fields_of(name: str, struct: str) -> Any:
    """The start of an image as C sees it."""
    out = ffi.new(f"struct {struct} *")
    ffi.memmove(out, image(name), ffi.sizeof(f"struct {struct}"))
    return out


def magic_of(macro: str) -> int:
    """A #define of format.h."""
    text = (HEADERS / "format.h").read_text()
    found = re.search(rf"#define {macro} (0x[0-9a-f]+)ULL", text)
    assert found
    return int(found[1], 16)


@pytest.mark.parametrize(
    ("name", "struct", "macro"),
    [
        ("cache_super", "mp_cache_super", "MP_CACHE_SUPER_MAGIC"),
        ("store_super", "mp_store_super", "MP_STORE_SUPER_MAGIC"),
        ("group", "mp_group", "MP_GROUP_MAGIC"),
        ("record_log", "mp_record", "MP_RECORD_MAGIC"),
    ],
)
def test_golden_headers_carry_magic_and_checksum(name: str, struct: str, macro: str) -> None:
    header = fields_of(name, struct)
    covered = 4096 if name == "record_log" else ffi.sizeof(f"struct {struct}")
    assert header.magic == magic_of(macro)
    assert header.checksum == record.xxh3(image(name)[16:covered])


def test_golden_superblocks_and_group_lay_their_fields_where_c_reads_them() -> None:
    cache = fields_of("cache_super", "mp_cache_super")
    assert (bytes(cache.cache_id), cache.generation) == (generate.CACHE_ID, 5)
    assert (cache.log_offset_bytes, cache.slots_offset_bytes) == (1 << 20, 9 << 30)
    assert (cache.slot_bytes, cache.slot_count) == (16384, 5_000_000)
    assert list(cache.checkpoint_offset_bytes) == [95 << 30, 97 << 30]
    assert (cache.checkpoint_checksum, cache.clean) == (0x1111222233334444, 1)
    store = fields_of("store_super", "mp_store_super")
    assert (bytes(store.store_id), store.generation) == (generate.STORE_ID, 6)
    assert (store.segment_bytes, store.checkpoint_segment) == (64 << 20, 17)
    assert store.checkpoint_checksum == 0x5555666677778888
    group = fields_of("group", "mp_group")
    assert (group.commit, group.segment, group.offset_bytes) == (4711, 17, 86016)
    assert (group.length_bytes, group.record_count) == (len(image("group")), 2)
    inside = image("group")[128:]
    volume, batch = image("record_volume"), image("record_batch")
    assert inside.startswith(volume + batch)
    state = ffi.new("struct mp_volume_state *")
    ffi.memmove(state, volume[192:], 688)
    assert ffi.string(state.name) == "Mühlteich".encode()
    assert (state.applied_sequence, state.lineages[1].first_sequence) == (1003, 900)
