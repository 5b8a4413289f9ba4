"""Raw images in and out: identical, sparse, and never over somebody's writes."""

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millpond.native import ffi
from millpond.store.errors import Code, StoreError
from millpond.store.image import ImageReader, ImageWriter
from millpond.store.transfer import export_image, import_image
from store_daemon import ME, OTHER, RunTest, running

MIB = 1 << 20


def sparse_image(path: Path, *, size_bytes: int, seed: int, islands: int) -> None:
    """Random data, text and zeroes as islands in holes; an odd end."""
    chance = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size_bytes)
        for _ in range(islands):
            length = chance.choice([1, 511, 4096, 5000, 65536, 300_000])
            kind = chance.choice(["random", "text", "zero"])
            data = {
                "random": chance.randbytes(length),
                "text": (b"all work and no play " * (length // 20 + 1))[:length],
                "zero": bytes(length),
            }[kind]
            file.seek(chance.randrange(size_bytes - length))
            file.write(data)


def allocated_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_sparse_image_of_64_mib_comes_back_identical_and_sparse(
    run: RunTest, tmp_path: Path
) -> None:
    async def situation() -> None:
        store_directory = tmp_path / "store"
        store_directory.mkdir()
        source, target = tmp_path / "source.raw", tmp_path / "target.raw"
        sparse_image(source, size_bytes=64 * MIB, seed=1, islands=40)
        seen: list[tuple[int, int]] = []
        async with running(store_directory) as store:
            volume = await import_image(
                store.address, str(source), "disk", progress=lambda *at: seen.append(at)
            )
            assert volume["size_bytes"] == 64 * MIB
            assert volume["open_holder"] is None and volume["dirty_holder"] is None
            assert volume["stored_bytes"] <= allocated_bytes(source)
            assert seen == sorted(seen) and seen[-1] == (64 * MIB, 64 * MIB)
        async with running(store_directory) as store:
            await export_image(store.address, "disk", str(target))
        assert target.read_bytes() == source.read_bytes()
        assert allocated_bytes(target) <= allocated_bytes(source) + 64 * 1024

    run(situation())


def test_image_with_an_odd_size_is_rounded_up_with_zeroes(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        source, target = tmp_path / "source.raw", tmp_path / "target.raw"
        source.write_bytes(b"x" * 10_001)
        (tmp_path / "store").mkdir()
        async with running(tmp_path / "store") as store:
            volume = await import_image(store.address, str(source), "odd")
            assert volume["size_bytes"] == 12288
            await export_image(store.address, "odd", str(target))
        assert target.read_bytes() == b"x" * 10_001 + bytes(12288 - 10_001)

    run(situation())


def test_empty_image_of_holes_sends_nothing(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        source, target = tmp_path / "source.raw", tmp_path / "target.raw"
        source.touch()
        os.truncate(source, 32 * MIB)
        (tmp_path / "store").mkdir()
        async with running(tmp_path / "store") as store:
            volume = await import_image(store.address, str(source), "holes")
            assert volume["applied_sequence"] == 0 and volume["stored_bytes"] == 0
            await export_image(store.address, "holes", str(target))
        assert target.stat().st_size == 32 * MIB and allocated_bytes(target) == 0

    run(situation())


def test_import_over_data_needs_a_word_and_then_replaces_all(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        first, second = tmp_path / "first.raw", tmp_path / "second.raw"
        target = tmp_path / "target.raw"
        sparse_image(first, size_bytes=4 * MIB, seed=2, islands=20)
        sparse_image(second, size_bytes=4 * MIB, seed=3, islands=5)
        (tmp_path / "store").mkdir()
        async with running(tmp_path / "store") as store:
            await import_image(store.address, str(first), "disk")
            with pytest.raises(StoreError) as caught:
                await import_image(store.address, str(second), "disk")
            assert caught.value.code == Code.EXISTS and "--overwrite" in caught.value.message
            await import_image(store.address, str(second), "disk", overwrite=True)
            await export_image(store.address, "disk", str(target))
        assert target.read_bytes() == second.read_bytes()

    run(situation())


def test_import_into_a_volume_that_is_open_or_dirty_elsewhere(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        source = tmp_path / "source.raw"
        source.write_bytes(b"new" * 4096)
        (tmp_path / "store").mkdir()
        async with running(tmp_path / "store") as store:
            client = await store.client()
            volume = await client.call("volume.create", name="disk", size_bytes=MIB)
            identity: dict[str, Any] = {"id": volume["volume"]["id"], "cache_id": ME.hex()}
            await client.call("volume.open", **identity, lineage=1, expected_epoch=0)
            with pytest.raises(StoreError) as caught:
                await import_image(store.address, str(source), "disk")
            assert caught.value.code == Code.BUSY and ME.hex() in caught.value.message
            await client.call("volume.dirty", **identity, epoch=1, dirty=True)
            with pytest.raises(StoreError, match="would be lost"):
                await import_image(store.address, str(source), "disk")
            shown = (await client.call("volume.show", name="disk"))["volume"]
            assert shown["open_holder"] == ME.hex() and shown["applied_sequence"] == 0
            await client.close()

    run(situation())


def test_import_that_loses_its_volume_to_another_writer_lets_it_go(
    run: RunTest, tmp_path: Path
) -> None:
    async def situation() -> None:
        source = tmp_path / "source.raw"
        source.write_bytes(random.Random(4).randbytes(48 * MIB))
        (tmp_path / "store").mkdir()
        async with running(tmp_path / "store") as store:
            client = await store.client()
            stolen = asyncio.Event()

            def steal(done_bytes: int, total_bytes: int) -> None:
                stolen.set()

            importing = asyncio.create_task(
                import_image(store.address, str(source), "disk", progress=steal)
            )
            await stolen.wait()
            volume = (await client.call("volume.show", name="disk"))["volume"]
            await client.call(
                "volume.open",
                id=volume["id"],
                cache_id=OTHER.hex(),
                lineage=2,
                expected_epoch=volume["epoch"],
                accept_loss=True,
            )
            with pytest.raises(StoreError, match="stale epoch"):
                await importing
            shown = (await client.call("volume.show", name="disk"))["volume"]
            assert shown["open_holder"] == OTHER.hex(), "not ours to delete any more"
            await client.close()

    run(situation())


def test_interrupted_import_leaves_no_half_volume(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        source = tmp_path / "source.raw"
        source.write_bytes(random.Random(4).randbytes(48 * MIB))
        (tmp_path / "store").mkdir()
        async with running(tmp_path / "store") as store:
            begun = asyncio.Event()
            importing = asyncio.create_task(
                import_image(
                    store.address, str(source), "disk", progress=lambda done, total: begun.set()
                )
            )
            await begun.wait()
            importing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await importing
            client = await store.client()
            assert (await client.call("volume.list"))["volumes"] == []
            await client.close()

    run(situation())


def test_export_of_a_volume_that_changes_meanwhile_leaves_no_file(
    run: RunTest, tmp_path: Path
) -> None:
    async def situation() -> None:
        source, target = tmp_path / "source.raw", tmp_path / "target.raw"
        sparse_image(source, size_bytes=64 * MIB, seed=5, islands=30)
        (tmp_path / "store").mkdir()
        async with running(tmp_path / "store") as store:
            await import_image(store.address, str(source), "disk")
            begun = asyncio.Event()
            exporting = asyncio.create_task(
                export_image(
                    store.address, "disk", str(target), progress=lambda done, total: begun.set()
                )
            )
            await begun.wait()
            await import_image(store.address, str(source), "disk", overwrite=True)
            try:
                await exporting
            except StoreError as error:
                assert "changed while it was exported" in error.message
                assert not target.exists()
            else:  # it was faster than the second import: then it is whole
                assert target.read_bytes() == source.read_bytes()

    run(situation())


def test_export_never_replaces_a_file_unasked(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        source, target = tmp_path / "source.raw", tmp_path / "target.raw"
        source.write_bytes(b"y" * 8192)
        target.write_bytes(b"precious")
        (tmp_path / "store").mkdir()
        async with running(tmp_path / "store") as store:
            await import_image(store.address, str(source), "disk")
            with pytest.raises(StoreError) as caught:
                await export_image(store.address, "disk", str(target))
            assert caught.value.code == Code.EXISTS
            assert target.read_bytes() == b"precious"
            await export_image(store.address, "disk", str(target), overwrite=True)
            assert target.read_bytes() == source.read_bytes()

    run(situation())


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    grains=st.lists(st.sampled_from([b"hole", b"zero", b"data", b"edge"]), max_size=24),
    tail_bytes=st.integers(0, 16384),
    window_grains=st.integers(1, 6),
)
def test_runs_of_an_image_are_exactly_what_is_not_zero(
    tmp_path: Path, grains: list[bytes], tail_bytes: int, window_grains: int
) -> None:
    path = tmp_path / "image.raw"
    model = bytearray()
    with path.open("wb") as file:
        for kind in grains:
            data = {b"data": b"d" * 16384, b"edge": bytes(16383) + b"e"}.get(kind, bytes(16384))
            if kind != b"hole":
                file.seek(len(model))
                file.write(data)
            model += data
        model += b"t" * tail_bytes
        file.seek(len(model) - tail_bytes)
        file.write(b"t" * tail_bytes)
        file.truncate(len(model))
    image = ImageReader(str(path))
    rebuilt = bytearray(image.size_bytes)
    end = 0
    for offset, data in image.runs(window_bytes=window_grains * 16384):
        assert offset >= end and offset % 4096 == 0 and len(data) % 4096 == 0
        assert len(data) <= window_grains * 16384 and any(data)
        end = offset + len(data)
        rebuilt[offset:end] = data
    assert rebuilt[: len(model)] == model and not any(rebuilt[len(model) :])
    whole = b"".join(data for _, data in image.runs(window_bytes=65536, zeroes=True))
    assert whole == bytes(rebuilt)
    image.close()


def test_failed_export_takes_its_file_away(tmp_path: Path) -> None:
    target = tmp_path / "target.raw"
    writer = ImageWriter(str(target), MIB, overwrite=False)
    data = b"\0" * 4096 + b"z" * 4096
    writer.write(8192, ffi.from_buffer(data), len(data))
    assert target.read_bytes()[12288:16384] == b"z" * 4096
    writer.abandon()
    assert not target.exists()
