"""Kernel devices over a played kernel: attach, whose they are, what is taken up again, growth.

What a real kernel does is in tests/kernel.
"""

import asyncio
import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from millpond.cache.errors import (
    AlreadyThere,
    CacheError,
    StoreAway,
    UnderWay,
    VolumeBusy,
    VolumeUnknown,
)
from millpond.cache.exports import Agreed, Export, ExportError
from millpond.cache.handover import Kept
from millpond.nbd.sysfs import Backend
from nbdkernel import OURS, SIZE, THEIRS, VOLUME, Stage, play, until


def test_attached_then_detached_and_nothing_is_left(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        made = await stage.devices.attach("disk")
        assert made["device"] == "/dev/nbd0" and made["served"] and not made["read_only"]
        assert stage.kernel.value(0, "backend") == str(Backend(OURS, VOLUME))
        assert stage.kernel.value(0, "queue/io_timeout") == "500"
        assert stage.kernel.value(0, "queue/scheduler") == "none"
        assert (stage.links / "disk").readlink() == Path("../nbd0")
        with pytest.raises(AlreadyThere, match="already as /dev/nbd0"):
            await stage.devices.attach("disk")
        assert stage.exports.released == 1
        await stage.devices.detach(str(stage.links / "disk"))
        assert stage.devices.list() == [] and not stage.links.exists()
        assert not (tmp_path / "run" / "millpond" / "devices").exists()
        with pytest.raises(VolumeUnknown, match="not attached"):
            await stage.devices.detach("disk")

    play(tmp_path, scenario)


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [("away", StoreAway), ("shutdown", StoreAway), ("busy", VolumeBusy), ("platform", CacheError)],
)
def test_refusal_says_whether_waiting_helps(
    tmp_path: Path, refusal: Any, kind: type[CacheError]
) -> None:
    async def scenario(stage: Stage) -> None:
        stage.exports.refusal = ExportError(refusal, "volume disk: no")
        with pytest.raises(CacheError, match="volume disk: no") as caught:
            await stage.devices.attach("disk")
        assert type(caught.value) is kind

    play(tmp_path, scenario)


def test_attach_beside_another_of_the_same_volume_is_under_way(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        first = asyncio.ensure_future(stage.devices.attach("disk"))
        await asyncio.sleep(0)
        with pytest.raises(UnderWay, match="at the moment"):
            await stage.devices.attach("disk")
        await first

    play(tmp_path, scenario)


def test_volume_is_attached_by_its_id_too_and_only_once(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        by_id = asyncio.ensure_future(stage.devices.attach(VOLUME.hex()))
        await asyncio.sleep(0)
        with pytest.raises(UnderWay, match="volume disk"):
            await stage.devices.attach("disk")
        assert (await by_id)["volume"] == "disk" and stage.exports.released == 1
        with pytest.raises(AlreadyThere):
            await stage.devices.attach(VOLUME.hex())
        for other in (THEIRS.hex()[1:], VOLUME.hex() + "0", "g" * 32):
            with pytest.raises(VolumeUnknown):
                await stage.devices.attach(other)

    play(tmp_path, scenario)


def test_device_of_another_cache_and_of_a_stranger_are_left_alone(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        stage.kernel.plug(0, str(Backend(THEIRS, VOLUME)))
        stage.kernel.plug(1, "")
        stage.kernel.plug(2, f"millpond/{OURS.hex()}")
        await stage.start()
        assert stage.devices.list() == [] and stage.exports.opened == 0
        for index in range(3):
            with pytest.raises(VolumeBusy, match="in use"):
                await stage.devices.attach("disk", device=f"/dev/nbd{index}")
        assert stage.exports.opened == 0

    play(tmp_path, scenario)


def test_our_device_is_taken_up_at_the_start(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        stage.kernel.plug(3, str(Backend(OURS, VOLUME)), ro=1)
        await stage.start()
        (found,) = stage.devices.list()
        assert found["device"] == "/dev/nbd3" and found["served"] and found["read_only"]
        assert stage.exports.agreed == [Agreed(read_only=True)]
        await until(lambda: (stage.links / "disk").is_symlink())

    play(tmp_path, scenario)


def kept(backend: Backend, *, received: bytes = b"") -> tuple[Kept, socket.socket]:
    """A device's connection, as the process before left it; the kernel's end."""
    ours, kernels = socket.socketpair()
    ours.setblocking(False)
    agreed = Agreed(read_only=True)
    return Kept(ours.detach(), VOLUME, agreed, received, tag=str(backend)), kernels


def test_device_goes_on_with_the_connection_of_the_process_before(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        backend = Backend(OURS, VOLUME)
        stage.kernel.plug(0, str(backend))
        ours, kernels = kept(backend, received=b"half a request")
        stranger = Kept(7, VOLUME, Agreed(), b"")
        assert await stage.start([stranger, ours]) == [stranger]
        (found,) = stage.devices.list()
        assert found["served"] and found["volume"] == "disk"
        assert (stage.exports.received, stage.exports.agreed) == (
            [b"half a request"],
            [ours.agreed],
        )
        assert not stage.kernel.sockets, "the kernel was told nothing"
        kernels.close()
        await until(lambda: bool(stage.kernel.sockets))  # that one ended: a new one, as ever

    play(tmp_path, scenario)


@pytest.mark.expects_warnings
def test_connection_that_could_not_go_on_is_passed_on_again(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        backend = Backend(OURS, VOLUME)
        stage.kernel.plug(0, str(backend))
        stage.exports.refusal = ExportError("away", "the store is away")
        ours, kernels = kept(backend)
        await stage.start([ours])
        assert await stage.devices.close() == [ours]
        kernels.close()
        os.close(ours.fd)

    play(tmp_path, scenario)


def test_connection_of_a_device_that_is_gone_is_closed(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        ours, kernels = kept(Backend(OURS, VOLUME))
        assert not await stage.start([ours])
        with kernels:
            assert kernels.recv(1) == b""

    play(tmp_path, scenario)


@pytest.mark.expects_warnings
@pytest.mark.parametrize("keeps", [False, True], ids=["crash", "planned"])
def test_device_whose_volume_others_have_written_is_ended(tmp_path: Path, keeps: bool) -> None:
    """Whoever has it mounted would write what it remembers over what they have written."""

    async def scenario(stage: Stage) -> None:
        backend = Backend(OURS, VOLUME)
        stage.kernel.plug(0, str(backend))
        ours, kernels = kept(backend)
        if not keeps:
            os.close(ours.fd)
        stage.exports.written_by_others = True
        await stage.start([ours] if keeps else [])
        await until(lambda: stage.devices.list() == [])
        assert not stage.exports.continuing
        assert stage.kernel.marked, "a crash meanwhile does not bring it back"
        assert not (tmp_path / "sys" / "block" / "nbd0" / "pid").exists(), "disconnected"
        assert stage.exports.opened == stage.exports.released, "nothing is served"
        with kernels:
            assert kernels.recv(1) == b""
        await asyncio.gather(*stage.exports.serving)

    play(tmp_path, scenario)


def test_volume_is_held_for_as_long_as_its_device_is_there(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        assert len(stage.exports.continuing) == 1
        await stage.devices.detach("disk")
        assert not stage.exports.continuing

    play(tmp_path, scenario)


@pytest.mark.expects_warnings
def test_store_is_away_at_the_start_and_comes_back(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        stage.kernel.plug(0, str(Backend(OURS, VOLUME)))
        stage.exports.refusal = ExportError("away", "the store is away")
        await stage.start()
        (found,) = stage.devices.list()
        assert not found["served"] and found["problem"] == "the store is away"
        (tmp_path / "sys/block/nbd0/inflight").write_text("       0        3\n")
        with pytest.raises(VolumeBusy, match="the store is away; if that does not pass, restart"):
            await stage.devices.detach("/dev/nbd0")
        stage.exports.refusal = None
        await until(lambda: bool(stage.devices.list()[0]["served"]))
        assert stage.devices.list()[0]["problem"] is None

    play(tmp_path, scenario)


def test_kernel_ignores_a_socket_while_the_old_one_lives(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        stage.kernel.plug(0, str(Backend(OURS, VOLUME)))
        stage.kernel.ignored = 3
        await stage.start()
        await until(lambda: 0 in stage.kernel.sockets and bool(stage.devices.list()[0]["served"]))
        assert stage.exports.opened == 4

    play(tmp_path, scenario)


def test_connection_ends_while_we_live(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        stage.kernel.sockets.pop(0).close()
        await until(lambda: 0 in stage.kernel.sockets and bool(stage.devices.list()[0]["served"]))
        assert stage.exports.opened == 2

    play(tmp_path, scenario)


@pytest.mark.expects_warnings
def test_answer_to_connect_is_lost(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        stage.kernel.answer_is_lost = True
        made = await stage.devices.attach("disk")
        assert made["device"] == "/dev/nbd0" and made["served"]
        assert (stage.links / "disk").is_symlink()

    play(tmp_path, scenario)


def test_kernel_is_too_old_for_backends(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        stage.kernel.is_old = True
        with pytest.raises(CacheError, match=r"need Linux 5\.14"):
            await stage.devices.attach("disk")
        assert stage.devices.list() == [] and stage.kernel.disconnects == 1
        assert not stage.kernel.sockets and not stage.links.exists()

    play(tmp_path, scenario)


def test_no_descriptor_is_left_for_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(stage: Stage) -> None:
        def full(*arguments: object) -> None:
            raise OSError(errno.EMFILE, "")

        monkeypatch.setattr("millpond.nbd.keeper.socket.socketpair", full)
        try:
            with pytest.raises(CacheError, match="Too many open files"):
                await stage.devices.attach("disk")
        finally:
            monkeypatch.undo()
        assert stage.exports.released == 1

    play(tmp_path, scenario)


@pytest.mark.expects_warnings
def test_device_is_disconnected_behind_our_back(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        stage.kernel.disconnect(0)
        await until(lambda: stage.devices.list() == [] and not stage.links.exists())

    play(tmp_path, scenario)


@pytest.mark.expects_warnings
@pytest.mark.parametrize(
    ("now", "says"),
    [
        (Export("disk", SIZE // 2, False, "", VOLUME), "made smaller"),
        (Export("disk", SIZE, True, "", VOLUME), "attached writable"),
    ],
)
def test_volume_that_a_guest_would_not_know_again_is_not_served(
    tmp_path: Path, now: Export, says: str
) -> None:
    async def scenario(stage: Stage) -> None:
        stage.kernel.plug(0, str(Backend(OURS, VOLUME)))
        stage.exports.export = now
        await stage.start()
        (found,) = stage.devices.list()
        assert not found["served"] and says in found["problem"]
        await asyncio.sleep(0.5)
        assert stage.exports.opened == stage.exports.released == 1, "an epoch at the store each"
        assert not stage.kernel.sockets

    play(tmp_path, scenario)


def test_volume_grew_while_nobody_served_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(stage: Stage) -> None:
        stage.kernel.plug(0, str(Backend(OURS, VOLUME)))
        stage.exports.export = Export("renamed", 2 * SIZE, False, "", VOLUME)
        await stage.start()
        (found,) = stage.devices.list()
        assert found["size_bytes"] == SIZE and found["volume"] == "renamed"
        await until(lambda: stage.devices.list()[0]["size_bytes"] == 2 * SIZE)
        assert stage.kernel.value(0, "size") == str(2 * SIZE // 512)

    monkeypatch.setattr("millpond.nbd.devices.GROW_POLL_S", 0.05)
    play(tmp_path, scenario)


@pytest.mark.expects_warnings
def test_volume_grows_while_its_device_waits_for_a_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        stage.exports.refusal = ExportError("platform", "the store is away")
        stage.kernel.sockets.pop(0).close()
        await until(lambda: not stage.devices.list()[0]["served"])
        stage.exports.export = Export("disk", 2 * SIZE, False, "", VOLUME)
        await asyncio.sleep(0.3)
        assert stage.kernel.value(0, "size") == str(SIZE // 512)
        stage.exports.refusal = None
        await until(lambda: stage.devices.list()[0]["size_bytes"] == 2 * SIZE)

    monkeypatch.setattr("millpond.nbd.devices.GROW_POLL_S", 0.05)
    play(tmp_path, scenario)
