"""Space comes back, memory stays bounded, a full disk stalls and recovers."""

import ctypes
import errno
import os
from pathlib import Path

from millpond.native import lib
from millpond.native.drivers import Op, SimOptions
from store_support import BLOCK, SEGMENT_BYTES, VOLUME, World, Write, fill

OK = lib.MP_STATUS_OK


def fill_up(world: World, blocks: int, *, first: int = 1, seed: int = 0) -> int:
    """Write all blocks, 32 at a time; the next sequence."""
    sequence = first
    for block in range(0, blocks, 32):
        data = fill(seed + block, 32)
        assert world.write([Write(block, data)], first=sequence) == OK
        sequence += 1
    return sequence


def test_space_returns_after_trim_and_checkpoint() -> None:
    world = World().format().open()
    world.create(blocks=4096)
    sequence = fill_up(world, 1024)
    assert world.checkpoint() == OK
    full = world.sim.allocated_bytes
    assert full >= 1024 * BLOCK
    assert world.write([Write(0, block_count=1000)], first=sequence) == OK
    world.settle()
    assert world.checkpoint() == OK
    world.settle()
    assert world.checkpoint() == OK
    world.settle()
    assert world.sim.allocated_bytes < full - 900 * BLOCK
    assert world.store.counters()["live_bytes"] == 24 * BLOCK
    assert world.store.volume_bytes(VOLUME) in range(24 * BLOCK, 1024 * BLOCK)
    assert world.read(1000, 24).data == fill(992, 32)[8 * BLOCK :]
    world.reopen()
    assert world.read(1000, 24).data == fill(992, 32)[8 * BLOCK :]
    assert world.read(900, 100).data == bytes(100 * BLOCK)
    world.close()


def test_scattered_overwrites_are_punched() -> None:
    world = World().format().open()
    world.create(blocks=1024)
    sequence = fill_up(world, 256)
    assert world.checkpoint() == OK
    world.settle()
    # Even extents first, odd ones later: edges left over by the first merge with the second.
    for odd in (0, 1):
        writes = [Write(extent * 4, fill(5000 + extent, 4)) for extent in range(odd, 64, 2)]
        assert world.write(writes, first=sequence) == OK
        sequence += len(writes)
        assert world.checkpoint() == OK
        world.settle()
    assert world.store.counters()["punched_bytes"] >= 250 * BLOCK
    expected = b"".join(fill(5000 + extent, 4) for extent in range(64))
    assert world.image(256) == expected
    world.reopen()
    assert world.image(256) == expected
    world.close()


def test_deletion_gives_everything_back_and_survives_reopening_midway() -> None:
    world = World(page_cache_bytes=64 * BLOCK).format().open()
    world.create(blocks=1 << 20)
    writes = [Write(index * 1000, fill(index, 2)) for index in range(300)]
    for start in range(0, 300, 50):
        assert world.write(writes[start : start + 50], first=start + 1) == OK
    assert world.checkpoint() == OK
    assert world.delete() == OK
    for _ in range(40):  # a checkpoint and a crash every few turns
        for _ in range(3):
            world.store.step(0)
        world.send(lib.MP_FRAME_CHECKPOINT)
        for _ in range(15):
            world.store.step(100_000)
        world.reopen()
        assert world.store.volume(VOLUME) is None
    world.settle(3000)
    assert world.store.counters()["live_bytes"] == 0
    assert world.checkpoint() == OK
    world.settle()
    assert world.checkpoint() == OK
    world.settle()
    assert world.store.counters()["segments"] <= 6
    world.close()


def test_rewriting_for_ever_needs_no_more_and_more_space() -> None:
    world = World(checkpoint_every_bytes=SEGMENT_BYTES).format().open()
    world.create(blocks=4096)
    sequence = fill_up(world, 512)
    highest = 0
    for turn in range(12):
        sequence = fill_up(world, 512, first=sequence, seed=turn * 7)
        world.settle(20)
        if turn == 4:
            highest = world.sim.allocated_bytes
    world.checkpoint()
    world.settle()
    assert world.sim.allocated_bytes <= highest + 4 * SEGMENT_BYTES
    assert world.image(512) == b"".join(fill(77 + block, 32) for block in range(0, 512, 32))
    world.close()


def test_cold_pages_in_old_meta_segments_are_moved() -> None:
    """A few cold pages must not keep every meta segment ever written."""
    world = World(page_cache_bytes=256 * BLOCK).format().open()
    world.create(blocks=1 << 20)
    writes = [Write(index * 600, fill(index)) for index in range(60)]
    assert world.write(writes, first=1) == OK
    sequence = 61
    for turn in range(120):
        # Each checkpoint: some hot pages, and one page that then stays cold.
        hot = [Write(block * 600 + 1, fill(turn)) for block in range(20)]
        hot.append(Write((100 + turn) * 600, fill(turn)))
        assert world.write(hot, first=sequence) == OK
        sequence += len(hot)
        assert world.checkpoint() == OK
    world.settle()
    # About 300 live pages; a segment is emptied when three quarters of it are dead.
    meta_bytes = world.sim.allocated_bytes - world.store.counters()["live_bytes"]
    assert meta_bytes < 4 * 300 * BLOCK + 6 * SEGMENT_BYTES
    for turn in range(120):
        assert world.read((100 + turn) * 600, 1).data == fill(turn)
    world.close()


def test_page_cache_is_bounded() -> None:
    world = World(page_cache_bytes=128 * BLOCK, checkpoint_every_bytes=1 << 30).format()
    world.open()
    world.create(blocks=1 << 22)
    for index in range(0, 1500, 30):
        writes = [Write((index + n) * 2048, fill(index + n)) for n in range(30)]
        assert world.write(writes, first=index + 1) == OK
    assert world.store.counters()["checkpoints"] >= 5
    for index in range(0, 1500, 7):
        assert world.read(index * 2048, 1).data == fill(index)
        assert world.store.counters()["pages_in_memory"] <= 400
    world.reopen()
    for index in range(3, 1500, 11):
        assert world.read(index * 2048, 1).data == fill(index)
    assert world.store.counters()["pages_in_memory"] <= 400
    world.close()


def resident_bytes() -> int:
    """Of this process (proc(5), statm field 2), without what is free on the heap."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_pages_in_memory_take_their_size_and_little_more() -> None:
    """Aligned one by one, each page took 8 KiB of the heap; what is beside pages is little."""
    world = World(page_cache_bytes=64 << 20, checkpoint_every_bytes=1 << 40)
    world.format(segment_bytes=64 << 20).open()
    world.create(blocks=1 << 24)
    data = bytes([7]) * BLOCK  # compresses well: the simulated disk is memory, too
    assert world.write([Write(0, data)], first=1) == OK
    resident, pages = resident_bytes(), world.store.counters()["pages_in_memory"]
    for first in range(1, 7001, 50):
        writes = [Write((first + n) * 512, data) for n in range(50)]  # a map leaf each
        assert world.write(writes, first=first + 1) == OK
    counters = world.store.counters()
    assert counters["pages_in_memory"] - pages >= 7000 and counters["checkpoints"] == 0
    expected = (counters["pages_in_memory"] - pages) * BLOCK
    assert resident_bytes() - resident <= 1.5 * expected
    world.close()


class HeapUse(ctypes.Structure):
    """struct mallinfo2 (mallinfo(3)): ten sizes."""

    _fields_ = [("sizes", ctypes.c_size_t * 10)]


def heap_bytes() -> int:
    """Allocated from C and not freed: uordblks and hblkhd."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = HeapUse
    sizes = mallinfo2().sizes
    return int(sizes[7] + sizes[4])


def test_checkpoint_after_checkpoint_keeps_no_memory() -> None:
    """What died is a list of ranges per checkpoint, some 180 KiB of them here: 20 are 3.6 MiB."""
    world = World(checkpoint_every_bytes=1 << 40).format().open()
    world.create(blocks=1 << 13)
    sequence, used = 1, 0
    for turn in range(30):
        for first in range(0, 8192, 512):
            writes = [Write(first + n, bytes([turn + 1]) * BLOCK) for n in range(512)]
            assert world.write(writes, first=sequence) == OK
            sequence += len(writes)
        assert world.checkpoint() == OK
        world.settle()
        if turn == 9:
            used = heap_bytes()
    assert heap_bytes() - used < 1 << 20
    world.close()


def test_roll_forward_over_many_segments() -> None:
    world = World(checkpoint_every_bytes=1 << 30).format().open()
    world.create(blocks=4096)
    sequence = 1
    for turn in range(10):
        sequence = fill_up(world, 64, first=sequence, seed=turn)
    assert world.store.counters()["checkpoints"] == 0
    expected = fill(9, 32) + fill(41, 32)
    for _ in range(2):
        world.reopen()
        assert world.store.counters()["applied_batches"] == 20
        assert world.store.counters()["segments"] > 5
        assert world.image(64) == expected
    world.close()


def test_batch_larger_than_a_segment() -> None:
    world = World().format(segment_bytes=128 * 1024).open()
    world.create(blocks=4096)
    data = fill(1, 200)
    assert world.write([Write(0, data)], first=1, parts=3) == OK
    world.reopen()
    assert world.image(200) == data
    world.close()


def test_full_disk_answers_full_and_goes_on_when_there_is_room() -> None:
    world = World().format().open()
    world.create(blocks=4096)
    sequence = fill_up(world, 32)
    world.sim.set(
        SimOptions(latency_ns=1000, fail_io=1, fail_op=Op.ALLOCATE, fail_errno=errno.ENOSPC)
    )
    statuses = []
    for _ in range(16):
        statuses.append(world.write([Write(0, fill(7, 32))], first=sequence))
        if statuses[-1] != OK:
            break
        sequence += 1
    assert world.store.failure() is None
    for _ in range(100):
        status = world.write([Write(64, fill(8, 32))], first=sequence)
        assert status in (OK, lib.MP_STATUS_FULL)
        if status == OK:
            break
        world.sim.advance_ns(10_000_000)
    assert status == OK
    assert world.image(96)[64 * BLOCK :] == fill(8, 32)
    world.reopen()
    assert world.image(96)[64 * BLOCK :] == fill(8, 32)
    world.close()


def test_shrunk_and_grown_volume_reads_zeroes() -> None:
    world = World().format().open()
    state = world.create(blocks=100)
    assert world.write([Write(0, fill(1, 100))], first=1) == OK
    state = state.with_changes(applied_sequence=0)
    assert world.put(state.with_changes(size_bytes=10 * BLOCK)) == OK
    assert world.put(state.with_changes(size_bytes=(1 << 30) * BLOCK)) == OK
    for _ in range(2):
        assert world.image(100) == fill(1, 100)[: 10 * BLOCK] + bytes(90 * BLOCK)
        assert world.read((1 << 30) - 1, 1).data == bytes(BLOCK)
        world.reopen()
    assert world.write([Write((1 << 30) - 2, fill(3, 2))], first=2) == OK
    assert world.read((1 << 30) - 1, 1).data == fill(3, 2)[BLOCK:]
    world.close()
