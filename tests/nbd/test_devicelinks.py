"""Links of kernel devices and names of volumes; whose a device is."""

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from millpond.cache.errors import (
    VolumeBusy,
    VolumeUnknown,
)
from millpond.cache.exports import Export
from millpond.nbd.devicelinks import link_name
from millpond.nbd.sysfs import Backend, index_of
from nbdkernel import OTHER, OURS, SIZE, THEIRS, VOLUME, Stage, play, until


def test_attached_volume_is_renamed_and_another_has_its_name_now(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        stage.exports.export = Export("old", SIZE, False, "", VOLUME)
        stage.exports.others = [Export("disk", SIZE, False, "", OTHER)]
        made = await stage.devices.attach("disk")
        assert (made["device"], made["id"]) == ("/dev/nbd1", OTHER.hex())
        links = {each.name: each.readlink().name for each in stage.links.iterdir()}
        assert links == {"disk": "nbd1", "old": "nbd0"}
        stage.exports.others = [Export("new", SIZE, False, "", OTHER)]
        with pytest.raises(VolumeUnknown, match="disk is not attached"):
            await stage.devices.detach("disk")
        assert (await stage.devices.detach("new"))["device"] == "/dev/nbd1"
        assert [each["volume"] for each in stage.devices.list()] == ["old"]

    play(tmp_path, scenario)


def test_renamed_while_no_daemon_ran(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        await stage.devices.close()
        stage.kernel.sockets.pop(0).close()
        stage.exports.export = Export("old", SIZE, False, "", VOLUME)
        again = stage.another()
        again.take([])
        await again.start()
        await until((stage.links / "old").is_symlink)
        assert not (stage.links / "disk").is_symlink()
        await again.close()

    play(tmp_path, scenario)


def test_renamed_while_it_cannot_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        stage.exports.export = Export("old", SIZE, False, "", VOLUME)
        stage.exports.others = [Export("disk", SIZE, False, "", OTHER)]
        stage.exports.silent = True
        with pytest.raises(VolumeBusy, match="dev/millpond/disk leads to /dev/nbd0"):
            await stage.devices.attach("disk")
        assert len(stage.devices.list()) == 1 and stage.exports.released == 1

    monkeypatch.setattr("millpond.nbd.devices.NAMES_WAIT_S", 0.05)
    play(tmp_path, scenario)


def test_link_of_a_device_that_is_gone_is_removed_at_the_start(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.devices.attach("disk")
        await stage.devices.close()
        stage.kernel.disconnect(0)
        again = stage.another()
        again.take([])
        await again.start()
        assert not stage.links.exists() and again.list() == []

    play(tmp_path, scenario)


def test_backend_of_others_is_not_ours() -> None:
    backend = Backend(OURS, VOLUME)
    assert Backend.parse(str(backend)) == backend
    for text in ("", "millpond", f"millpond/{OURS.hex()}", f"x{backend}", f"{backend}0"):
        assert Backend.parse(text) is None


def test_names_of_devices() -> None:
    assert [index_of(text) for text in ("/dev/nbd0", "nbd12", "3")] == [0, 12, 3]
    for text in ("", "/dev/vda", "/dev/nbd", "/dev/nbd0p1", "/dev/nbd-1", "/dev/../nbd1"):
        assert index_of(text) is None


NAMES = st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), min_size=1)


@given(NAMES, NAMES)
@example("disk-part1", "disk")
def test_link_of_any_volume_is_a_plain_file_name(first: str, second: str) -> None:
    one, two = link_name(first, OURS), link_name(second, THEIRS)
    assert one.isascii() and one.isprintable() and not set(one) & set("/ \"'$")
    assert not one.startswith(".") and 0 < len(one) <= 255
    assert one != two or first == second
    assert not re.search(r"-part[0-9]+$", one)


def test_link_of_a_name_too_long_for_a_file_is_the_id() -> None:
    assert link_name("ü" * 120, VOLUME) == VOLUME.hex()
    assert link_name("u" * 255, VOLUME) == "u" * 255
    assert link_name("u" * 249 + "-part1", VOLUME) == VOLUME.hex()


def test_links_of_names_that_need_an_escape() -> None:
    assert link_name("disk-part12", VOLUME) == "disk\\x2dpart12"
    assert link_name("disk-part1a", VOLUME) == "disk-part1a"
    assert link_name("a b.", VOLUME) == "a\\x20b."
