"""Kernel devices over a played kernel: detach, by force, and what is attached again after it."""

import asyncio
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from millpond.cache.errors import (
    CacheError,
    VolumeBusy,
)
from millpond.cache.exports import ExportError
from millpond.nbd.devicelinks import DeviceLinks
from millpond.nbd.sysfs import Backend, Sysfs
from nbdkernel import OURS, VOLUME, Stage, opener, play, until


@pytest.mark.expects_warnings
def test_device_of_a_failed_volume_that_nobody_uses_is_detached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        stage.exports.refusal = ExportError("platform", "writes were not shipped and are kept")
        stage.kernel.sockets.pop(0).close()
        await until(lambda: stage.devices.list()[0]["problem"] is not None)
        opened = opener(tmp_path, "qemu-system-x86")
        with pytest.raises(VolumeBusy, match="open in qemu"):
            await stage.devices.detach("disk")
        opened.unlink()
        await stage.devices.detach("disk")
        assert stage.devices.list() == [] and not stage.links.exists()

    def exclusive(*arguments: object) -> None:
        raise AssertionError("to open it would wait for the volume")

    monkeypatch.setattr("millpond.nbd.devices.exclusive", exclusive)
    play(tmp_path, scenario)


def test_device_in_use_is_not_detached_and_goes_on(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        (tmp_path / "sys/block/nbd0/dev").write_text("43:0")
        mounts = tmp_path / "proc" / "self" / "mountinfo"
        mounts.parent.mkdir(parents=True)
        mounts.write_text("24 1 43:0 / /srv/disk rw - ext4 /dev/nbd0 rw\n")
        with pytest.raises(VolumeBusy, match="/dev/nbd0 is mounted at /srv/disk"):
            await stage.devices.detach("disk")
        assert stage.devices.list()[0]["served"]
        stage.kernel.sockets.pop(0).close()
        await until(lambda: 0 in stage.kernel.sockets)
        await stage.devices.detach("disk", force=True)
        assert stage.devices.list() == []

    play(tmp_path, scenario)


def test_device_detached_by_force_and_still_open_stays_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        stage.kernel.held.add(0)
        await stage.devices.detach("disk", force=True)
        assert stage.kernel.marked, "a crash behind DISCONNECT must find the mark"
        assert stage.devices.list() == [] and not stage.links.exists()
        with pytest.raises(VolumeBusy, match="detached, but /dev/nbd0 is still in use"):
            await stage.devices.attach("disk")
        again = stage.another()
        again.take([])
        await again.start()
        assert again.list() == [] and 0 not in stage.kernel.sockets
        stage.kernel.let_go(0)
        assert (await again.attach("disk"))["served"]
        await asyncio.sleep(0.1)  # whoever watched for the end of the device sees a new one
        assert (stage.links / "disk").is_symlink()
        third = stage.another()
        await again.close()
        stage.kernel.sockets.pop(0).close()
        third.take([])
        await third.start()
        assert third.list()[0]["served"]
        await third.close()

    monkeypatch.setattr("millpond.nbd.devices.HELD_POLL_S", 0.02)
    play(tmp_path, scenario)


@pytest.mark.expects_warnings
@pytest.mark.parametrize("hangs_up", [False, True], ids=["read", "hung up"])
def test_others_disconnect_a_device_that_is_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs_up: bool
) -> None:
    async def scenario(stage: Stage) -> None:
        stage.exports.hangs_up = hangs_up
        await stage.devices.attach("disk")
        stage.kernel.held.add(0)
        stage.kernel.disconnect(0)
        await until(lambda: stage.devices.list() == [] and not stage.links.exists())
        with pytest.raises(VolumeBusy, match="detached, but /dev/nbd0 is still in use"):
            await stage.devices.attach("disk")
        assert 0 not in stage.kernel.sockets, "it came back to life"
        stage.kernel.let_go(0)
        assert (await stage.devices.attach("disk"))["served"]

    monkeypatch.setattr("millpond.nbd.devices.HELD_POLL_S", 0.02)
    play(tmp_path, scenario)


def test_nothing_is_left_of_a_device_that_is_let_go_after_its_detach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        stage.kernel.held.add(0)
        await stage.devices.detach("disk")  # udev, say, looks at it at this moment
        assert stage.devices.list() == []
        stage.kernel.let_go(0)
        await until(lambda: not (tmp_path / "run" / "millpond" / "devices").exists())

    monkeypatch.setattr("millpond.nbd.devices.HELD_POLL_S", 0.02)
    play(tmp_path, scenario)


def test_crash_between_the_mark_and_disconnect_by_force(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        backend = Backend(OURS, VOLUME)
        stage.kernel.plug(0, str(backend))
        DeviceLinks(Sysfs(str(tmp_path))).mark_detached(0, backend)
        await stage.start()
        assert stage.devices.list() == []
        await until(lambda: not (tmp_path / "run" / "millpond" / "devices").exists())
        assert stage.kernel.disconnects == 1

    play(tmp_path, scenario)


@pytest.mark.parametrize("name", ["(udev-worker)", "systemd-udevd"])
def test_udev_looks_at_the_device_that_its_user_has_just_closed(tmp_path: Path, name: str) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        opened = opener(tmp_path, name)
        asyncio.get_running_loop().call_later(0.3, opened.unlink)
        await stage.devices.detach("disk")
        assert not opened.is_symlink()

    play(tmp_path, scenario)


@pytest.mark.parametrize("name", ["qemu-system-x86", "(udev-worker)"])
def test_device_that_stays_open_is_not_detached(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        opener(tmp_path, name)
        with pytest.raises(VolumeBusy, match=f"/dev/nbd0 is open in {re.escape(name)}"):
            await stage.devices.detach("disk")
        assert stage.devices.list()[0]["served"]

    monkeypatch.setattr("millpond.nbd.devices.UDEV_WAIT_S", 0.2)
    play(tmp_path, scenario)


def test_connection_ends_while_a_detach_writes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(stage: Stage) -> None:
        @contextmanager
        def exclusive(sysfs: Sysfs, index: int) -> Iterator[None]:
            stage.kernel.sockets.pop(0).close()
            for _ in range(1000):
                if 0 in stage.kernel.sockets:
                    yield  # what was written has waited for a new connection
                    return
                time.sleep(0.01)
            raise AssertionError("nobody connects it again")

        monkeypatch.setattr("millpond.nbd.devices.exclusive", exclusive)
        await stage.devices.attach("disk")
        await stage.devices.detach("disk")
        assert stage.devices.list() == []

    play(tmp_path, scenario)


def test_force_ends_a_guest_that_is_stuck_and_the_detach_that_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(stage: Stage) -> None:
        waits = threading.Event()

        @contextmanager
        def exclusive(sysfs: Sysfs, index: int) -> Iterator[None]:
            waits.set()
            while not stage.kernel.disconnects:  # written back only by a log that is full
                time.sleep(0.01)
            raise CacheError("cannot be written back")
            yield

        monkeypatch.setattr("millpond.nbd.devices.exclusive", exclusive)
        await stage.devices.attach("disk")
        stage.kernel.is_stuck = True
        plain = asyncio.ensure_future(stage.devices.detach("disk"))
        await until(waits.is_set)
        async with asyncio.timeout(20):
            await stage.devices.detach("disk", force=True)
            with pytest.raises(CacheError, match="cannot be written back"):
                await plain
        assert stage.devices.list() == [] and stage.exports.opened == 1
        assert not (tmp_path / "run" / "millpond" / "devices").exists()

    play(tmp_path, scenario)


def test_connection_that_is_late_is_not_given_to_a_device_that_is_over(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        stage.kernel.gate.clear()  # the thread that gives the device a new connection is slow
        stage.kernel.sockets.pop(0).close()
        await until(lambda: stage.exports.opened == 2)
        forced = asyncio.ensure_future(stage.devices.detach("disk", force=True))
        await asyncio.sleep(0.1)
        stage.kernel.gate.set()
        await forced
        await until(lambda: not any("adopt" in each.name for each in threading.enumerate()))
        assert 0 not in stage.kernel.sockets and stage.devices.list() == []

    play(tmp_path, scenario)


def test_attached_again_while_the_engine_is_not_done_with_the_detached_device(
    tmp_path: Path,
) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        stage.exports.done.clear()
        detaching = asyncio.ensure_future(stage.devices.detach("/dev/nbd0"))
        await until(lambda: stage.kernel.disconnects == 1)
        with pytest.raises(VolumeBusy, match="disk is being attached or detached"):
            await stage.devices.attach("disk")
        stage.exports.done.set()
        await detaching
        await stage.devices.attach("disk")
        assert (stage.links / "disk").is_symlink() and stage.exports.released == 1

    play(tmp_path, scenario)


@pytest.mark.expects_warnings
def test_attached_again_before_its_keeper_has_seen_that_others_disconnected_it(
    tmp_path: Path,
) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        stage.exports.refusal = ExportError("platform", "the store is away")
        stage.kernel.sockets.pop(0).close()
        await until(lambda: stage.devices.list()[0]["problem"] is not None)
        await asyncio.sleep(0.2)  # so that its next attempt is later than what follows
        stage.kernel.disconnect(0)
        stage.exports.refusal = None
        await stage.devices.attach("disk")
        await asyncio.sleep(0.7)
        assert stage.exports.opened == 2, "two keepers have one device"
        assert stage.devices.list()[0]["served"] and (stage.links / "disk").is_symlink()

    play(tmp_path, scenario)
