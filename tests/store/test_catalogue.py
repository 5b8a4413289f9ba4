"""Who may open, close and delete what: compare-and-swap against the real core."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from millpond.store.catalogue import check_name
from millpond.store.client import StoreClient
from millpond.store.errors import Code, StoreError
from store_daemon import ME, OTHER, Running, RunTest, running

SIZE = 1 << 20


async def refused(call: Any, code: Code, words: str = "") -> str:
    with pytest.raises(StoreError) as caught:
        await call
    assert caught.value.code == code, caught.value.message
    assert words in caught.value.message
    assert "\n" not in caught.value.message
    return caught.value.message


async def create(client: StoreClient, name: str = "vm1") -> dict[str, Any]:
    volume = (await client.call("volume.create", name=name, size_bytes=SIZE))["volume"]
    return dict(volume)


async def open_volume(
    client: StoreClient, volume: dict[str, Any], cache_id: bytes, lineage: int, **changes: Any
) -> dict[str, Any]:
    arguments = {
        "id": volume["id"],
        "cache_id": cache_id.hex(),
        "lineage": lineage,
        "first_sequence": None,
        "expected_epoch": volume["epoch"],
        "accept_loss": False,
    }
    return dict((await client.call("volume.open", **{**arguments, **changes}))["volume"])


async def set_dirty(
    client: StoreClient, volume: dict[str, Any], cache_id: bytes, dirty: bool = True
) -> dict[str, Any]:
    reply = await client.call(
        "volume.dirty",
        id=volume["id"],
        epoch=volume["epoch"],
        cache_id=cache_id.hex(),
        dirty=dirty,
    )
    return dict(reply["volume"])


async def close_volume(
    client: StoreClient, volume: dict[str, Any], cache_id: bytes
) -> dict[str, Any]:
    reply = await client.call(
        "volume.close", id=volume["id"], epoch=volume["epoch"], cache_id=cache_id.hex()
    )
    return dict(reply["volume"])


def test_created_volume_is_listed_shown_and_survives_a_restart(
    run: RunTest, tmp_path: Path
) -> None:
    async def first(store: Running) -> dict[str, Any]:
        client = await store.client()
        volume = await create(client)
        assert volume["size_bytes"] == SIZE
        assert volume["open_holder"] is None and volume["dirty_holder"] is None
        assert (volume["epoch"], volume["applied_sequence"]) == (0, 0)
        assert (await client.call("volume.list"))["volumes"] == [volume]
        assert (await client.call("volume.show", name="vm1"))["volume"] == volume
        assert (await client.call("volume.show", id=volume["id"]))["volume"] == volume
        await client.close()
        return volume

    async def situation() -> None:
        async with running(tmp_path) as store:
            volume = await first(store)
        async with running(tmp_path, format_when_empty=False) as store:
            client = await store.client()
            again = (await client.call("volume.show", name="vm1"))["volume"]
            assert again == volume
            await client.close()

    run(situation())


def test_two_creations_of_one_name_race(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        async with running(tmp_path) as store:
            client = await store.client()
            results = await asyncio.gather(
                *(create(client, "same") for _ in range(8)), return_exceptions=True
            )
            won = [result for result in results if isinstance(result, dict)]
            lost = [result for result in results if isinstance(result, StoreError)]
            assert len(won) == 1 and len(lost) == 7
            assert {error.code for error in lost} == {Code.EXISTS}
            await client.close()

    run(situation())


def test_two_opens_race_and_exactly_one_wins(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        async with running(tmp_path) as store:
            clients = [await store.client(bytes([n + 1] * 16)) for n in range(6)]
            volume = await create(clients[0])
            results = await asyncio.gather(
                *(
                    open_volume(client, volume, bytes([n + 1] * 16), lineage=n + 1)
                    for n, client in enumerate(clients)
                ),
                return_exceptions=True,
            )
            won = [result for result in results if isinstance(result, dict)]
            assert len(won) == 1 and won[0]["epoch"] == 1
            lost = [result for result in results if isinstance(result, StoreError)]
            assert [error.code for error in lost] == [Code.EPOCH] * 5
            shown = (await clients[0].call("volume.show", name="vm1"))["volume"]
            assert shown["open_holder"] == won[0]["open_holder"]
            for client in clients:
                await client.close()

    run(situation())


def test_same_cache_reopens_after_its_restart(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        async with running(tmp_path) as store:
            client = await store.client()
            volume = await open_volume(client, await create(client), ME, 11)
            volume = await set_dirty(client, volume, ME)
            again = await open_volume(client, volume, ME, 12, first_sequence=40)
            assert again["epoch"] == 2
            assert again["open_holder"] == again["dirty_holder"] == ME.hex()
            await refused(set_dirty(client, volume, ME), Code.EPOCH, "epoch 2, not 1")
            await refused(open_volume(client, again, ME, 12), Code.INVALID, "was used before")
            await client.close()

    run(situation())


def test_open_elsewhere_is_busy_and_closing_frees_it(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        async with running(tmp_path) as store:
            client = await store.client()
            volume = await open_volume(client, await create(client), ME, 1)
            message = await refused(open_volume(client, volume, OTHER, 2), Code.BUSY, "'vm1'")
            assert ME.hex() in message
            await refused(close_volume(client, volume, OTHER), Code.BUSY, "no say")
            await refused(set_dirty(client, volume, OTHER), Code.BUSY, "no say")
            closed = await close_volume(client, volume, ME)
            assert closed["open_holder"] is None
            assert await close_volume(client, volume, ME) == closed  # a repeated close
            assert (await open_volume(client, closed, OTHER, 2))["epoch"] == 2
            await client.close()

    run(situation())


def test_dirty_elsewhere_is_refused_and_the_loss_is_named(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        async with running(tmp_path) as store:
            client = await store.client()
            volume = await open_volume(client, await create(client), ME, 1)
            volume = await set_dirty(client, volume, ME)
            message = await refused(open_volume(client, volume, OTHER, 2), Code.BUSY, "lost")
            assert "after sequence 0" in message and ME.hex() in message
            taken = await open_volume(client, volume, OTHER, 2, accept_loss=True)
            assert taken["open_holder"] == OTHER.hex() and taken["dirty_holder"] is None
            await refused(set_dirty(client, volume, ME), Code.EPOCH)
            await refused(close_volume(client, volume, ME), Code.EPOCH)
            await client.close()

    run(situation())


def test_dirty_state_survives_a_restart_of_the_store(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        async with running(tmp_path) as store:
            client = await store.client()
            volume = await open_volume(client, await create(client), ME, 1)
            await set_dirty(client, volume, ME)
            await client.close()
        async with running(tmp_path) as store:
            client = await store.client()
            volume = (await client.call("volume.show", name="vm1"))["volume"]
            assert volume["dirty_holder"] == volume["open_holder"] == ME.hex()
            await refused(open_volume(client, volume, OTHER, 2), Code.BUSY, "lost")
            cleaned = await set_dirty(client, volume, ME, dirty=False)
            assert cleaned["dirty_holder"] is None
            await client.close()

    run(situation())


def test_delete_of_an_open_or_dirty_volume_is_refused(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        async with running(tmp_path) as store:
            client = await store.client()
            volume = await open_volume(client, await create(client), ME, 1)
            await refused(client.call("volume.delete", name="vm1"), Code.BUSY, "is open at")
            await set_dirty(client, volume, ME)
            await refused(client.call("volume.delete", id=volume["id"]), Code.BUSY)
            await client.call("volume.delete", name="vm1", force=True)
            await refused(client.call("volume.show", name="vm1"), Code.NOT_FOUND, "'vm1'")
            await refused(set_dirty(client, volume, ME), Code.NOT_FOUND)
            again = await create(client)
            assert again["id"] != volume["id"], "ids are never reused"
            await client.close()

    run(situation())


def test_position_of_an_open_must_follow_what_is_applied(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        async with running(tmp_path) as store:
            client = await store.client()
            volume = await create(client)
            await refused(
                open_volume(client, volume, ME, 1, first_sequence=0), Code.INVALID, "sequence 0"
            )
            await refused(open_volume(client, volume, ME, 0), Code.INVALID, "lineage")
            await refused(open_volume(client, volume, bytes(16), 1), Code.INVALID, "nobody")
            await refused(open_volume(client, volume, ME, 1, expected_epoch=5), Code.EPOCH)
            opened = await open_volume(client, volume, ME, 2**64 - 1, first_sequence=1)
            assert opened["epoch"] == 1
            await client.close()

    run(situation())


def lineages(store: Running, volume: dict[str, Any]) -> list[tuple[int, int]]:
    state = store.daemon.catalogue.get(bytes.fromhex(volume["id"]))
    return [(known.id, known.first_sequence) for known in state.lineages]


def test_lineages_that_wrote_nothing_are_forgotten(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        async with running(tmp_path) as store:
            client = await store.client()
            volume = await create(client)
            for lineage in range(1, 20):
                volume = await open_volume(client, volume, ME, lineage)
            assert lineages(store, volume) == [(19, 1)]
            await client.close()

    run(situation())


def test_lineages_that_have_not_shipped_are_not_forgotten(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        async with running(tmp_path) as store:
            client = await store.client()
            volume = await create(client)
            for n in range(1, 9):
                volume = await open_volume(client, volume, ME, n, first_sequence=10 * n)
            volume = await set_dirty(client, volume, ME)
            assert lineages(store, volume) == [(n, 10 * n) for n in range(1, 9)]
            await refused(
                open_volume(client, volume, ME, 9, first_sequence=90), Code.BUSY, "ship first"
            )
            taken = await open_volume(client, volume, OTHER, 9, accept_loss=True)
            assert lineages(store, taken) == [(9, 1)]
            await client.close()

    run(situation())


@pytest.mark.parametrize("size_bytes", [0, 1, 4095, 4097, 1 << 60])
def test_impossible_sizes(tmp_path: Path, size_bytes: int) -> None:
    async def situation() -> None:
        async with running(tmp_path) as store:
            client = await store.client()
            call = client.call("volume.create", name="vm1", size_bytes=size_bytes)
            await refused(call, Code.INVALID, "bytes cannot be")
            await client.close()

    asyncio.run(situation())


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\nb", "a\0b", "a\x7fb", "a\u0085b", "é" * 128, "\ud800"]
)
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(StoreError) as caught:
        check_name(name)
    assert caught.value.code == Code.INVALID
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("name", ["a", "...", "vm-1", "Größe 40 %", "é" * 127, "-rf", "a\\b"])
def test_names_that_are_allowed(name: str) -> None:
    check_name(name)


async def resize(client: StoreClient, size_bytes: int, **more: Any) -> dict[str, Any]:
    call = client.call("volume.resize", name="vm1", size_bytes=size_bytes, **more)
    return dict((await call)["volume"])


def test_growing_is_durable_and_changes_nothing_else(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        async with running(tmp_path) as store:
            client = await store.client()
            volume = await open_volume(client, await create(client), ME, 1)
            assert await resize(client, 2 * SIZE) == {**volume, "size_bytes": 2 * SIZE}
            await client.close()
        async with running(tmp_path) as store:
            client = await store.client()
            (again,) = (await client.call("volume.list"))["volumes"]
            assert again["size_bytes"] == 2 * SIZE
            await client.close()

    run(situation())


def test_shrinking_must_be_meant_and_nobody_may_have_it(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        async with running(tmp_path) as store:
            client = await store.client()
            volume = await create(client)
            await refused(resize(client, SIZE // 2), Code.INVALID, "--shrink")
            volume = await open_volume(client, volume, ME, 1)
            await refused(resize(client, SIZE // 2, shrink=True), Code.BUSY, "in use at cache")
            volume = await close_volume(client, volume, ME)
            shrunk = await resize(client, SIZE // 2, shrink=True)
            assert (shrunk["size_bytes"], shrunk["epoch"]) == (SIZE // 2, volume["epoch"] + 1)
            await refused(resize(client, 1000, shrink=True), Code.INVALID, "bytes cannot be")
            await refused(open_volume(client, volume, ME, 2), Code.EPOCH, "look again")
            await client.close()

    run(situation())


def test_rename_of_an_open_volume_keeps_everything_but_the_name(
    run: RunTest, tmp_path: Path
) -> None:
    async def situation() -> None:
        async with running(tmp_path) as store:
            client = await store.client()
            volume = await open_volume(client, await create(client), ME, 1)
            await create(client, "vm2")
            await refused(
                client.call("volume.rename", name="vm1", new_name="vm2"), Code.EXISTS, "'vm2'"
            )
            await refused(
                client.call("volume.rename", name="vm1", new_name="a/b"), Code.INVALID, "'a/b'"
            )
            renamed = (await client.call("volume.rename", name="vm1", new_name="web"))["volume"]
            assert renamed == {**volume, "name": "web"}
            await refused(client.call("volume.show", name="vm1"), Code.NOT_FOUND, "'vm1'")
            assert (await create(client))["id"] != volume["id"], "the old name is free"
            await client.close()
        async with running(tmp_path) as store:
            client = await store.client()
            found = (await client.call("volume.show", name="web"))["volume"]
            assert found["id"] == volume["id"]
            await client.close()

    run(situation())


def test_two_renames_to_one_name_at_once(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        async with running(tmp_path) as store:
            client = await store.client()
            await create(client)
            await create(client, "vm2")
            results = await asyncio.gather(
                client.call("volume.rename", name="vm1", new_name="web"),
                client.call("volume.rename", name="vm2", new_name="web"),
                return_exceptions=True,
            )
            codes = [getattr(result, "code", "ok") for result in results]
            assert sorted(codes) == [Code.EXISTS, "ok"]
            await client.close()

    run(situation())
