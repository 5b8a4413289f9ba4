"""`millpond map` and `unmap` against a played cache: what is asked, repeated, left alone, said."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from controlserver import PlayedCache
from millpond.cli.main import main
from millpond.cli.run import BUSY, EXISTS, FAILED, NOT_FOUND, OK, UNREACHABLE, USAGE
from millpondprocess import Millpond
from torture.daemons import Pair


class Place:
    """A tab, a played cache, and the commands over them."""

    def __init__(self, directory: Path, cache: PlayedCache) -> None:
        self.tab = directory / "tab"
        self.cache = cache

    def run(self, *arguments: str) -> int:
        return main([*arguments, "--tab", str(self.tab), "--control", str(self.cache.path)])


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with PlayedCache(tmp_path / "control") as cache:
        made = Place(tmp_path, cache)
        made.tab.write_text("web1\nweb2 read-only,device=/dev/nbd7\nspare noauto\n")
        cache.volumes = {"web1", "web2", "spare", "other"}
        yield made


def test_map_all_attaches_the_tab_but_noauto_and_again_does_nothing(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.run("map", "--all", "--json") == OK
    rows = {row["volume"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["web1"]["link"] == "/dev/millpond/web1" and rows["web2"]["device"] == "/dev/nbd7"
    assert place.cache.devices["web2"]["read_only"] and not place.cache.devices["web1"]["read_only"]
    assert set(place.cache.devices) == {"web1", "web2"}
    assert place.run("map", "--all") == OK
    assert sorted(place.cache.ops("attach")) == ["web1", "web2"], "once each"
    table = capsys.readouterr().out.splitlines()
    assert table[1].split() == ["web1", rows["web1"]["device"], "/dev/millpond/web1"]


def test_map_by_name_takes_noauto_and_what_the_tab_does_not_name_is_refused(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.run("map", "spare") == OK
    assert set(place.cache.devices) == {"spare"}
    assert place.run("map", "other") == NOT_FOUND
    assert "is not in " in capsys.readouterr().err


def test_unmap_all_leaves_alone_what_the_tab_does_not_name(place: Place) -> None:
    for name in ("web1", "spare", "other"):
        place.cache.answer({"op": "attach", "volume": name})
    assert place.run("unmap", "--all") == OK
    assert set(place.cache.devices) == {"other"}
    assert place.run("unmap", "--all") == OK, "again"
    assert place.run("unmap", "other") == OK
    assert place.cache.devices == {}
    assert sorted(place.cache.ops("detach")) == ["other", "spare", "web1"], "once each"


def test_one_that_fails_is_one_line_and_the_others_go_on(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.cache.volumes.remove("web1")
    assert place.run("map", "--all") == NOT_FOUND
    assert set(place.cache.devices) == {"web2"}
    trouble = capsys.readouterr().err
    assert trouble == "millpond: error: no volume 'web1'\n"
    place.tab.write_text("web1\nspare\nweb2\n")
    place.cache.refuse["spare"] = ("E_BUSY", 1)
    assert place.run("map", "--all") == FAILED, "3 and 5 have no code in common"
    assert capsys.readouterr().err.count("\n") == 2


def test_nofail_is_a_line_and_no_failure(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.tab.write_text("gone nofail\nweb1\n")
    assert place.run("map", "--all") == OK
    assert capsys.readouterr().err == "millpond: no volume 'gone' (nofail)\n"
    assert set(place.cache.devices) == {"web1"}


def test_store_that_is_away_is_tried_again_and_holds_up_no_other(place: Place) -> None:
    place.cache.refuse["web1"] = ("E_UNREACHABLE", 3)
    assert place.run("map", "--all") == OK
    assert place.cache.ops("attach").count("web1") == 4
    assert place.cache.ops("attach")[-1] == "web1", "web2 did not wait for it"


def test_device_that_the_tab_names_is_not_taken_by_who_takes_any(place: Place) -> None:
    """However late its line is; and when its store is away, it holds up nobody."""
    names = [f"any{number}" for number in range(12)]
    place.cache.volumes |= {*names, "first", "late"}
    named = "first device=/dev/nbd0\nlate device=/dev/nbd1\n"
    place.tab.write_text("".join(f"{name}\n" for name in names) + named)
    place.cache.refuse["late"] = ("E_UNREACHABLE", 2)
    assert place.run("map", "--all", "--timeout", "5s") == BUSY, "late came too late"
    assert place.cache.devices["first"]["device"] == "/dev/nbd0"
    assert set(place.cache.devices) == {*names, "first"}


def test_waiting_ends(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.cache.refuse["web1"] = ("E_UNREACHABLE", 10_000)
    begin = time.perf_counter()
    assert place.run("map", "--all", "--timeout", "1s") == UNREACHABLE
    assert 0.5 <= time.perf_counter() - begin < 10
    assert "volume 'web1' cannot be attached" in capsys.readouterr().err


def test_cache_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "tab").write_text("web1\n")
    started: list[PlayedCache] = []

    def start() -> None:
        cache = PlayedCache(tmp_path / "control")
        cache.volumes = {"web1"}
        started.append(cache.__enter__())

    timer = threading.Timer(1.0, start)
    timer.start()
    arguments = ["--tab", str(tmp_path / "tab"), "--control", str(tmp_path / "control")]
    assert main(["map", "--all", *arguments]) == OK
    timer.join()
    assert set(started[0].devices) == {"web1"}
    started[0].__exit__(None, None, None)


def test_no_cache_at_all_is_one_line_per_volume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tab").write_text("web1\nweb2\n")
    arguments = ["--tab", str(tmp_path / "tab"), "--control", str(tmp_path / "control")]
    assert main(["map", "--all", "--timeout", "500ms", *arguments]) == UNREACHABLE
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("millpond: error: volume 'web1': no cache")


def test_answer_that_was_lost_is_no_failure(place: Place) -> None:
    """The daemon attached it and died before it could say so: the next one has the device."""
    place.cache.after_attach = lambda: (_ for _ in ()).throw(OSError("the connection is lost"))
    assert place.run("map", "web1") == OK
    assert place.cache.ops("attach") == ["web1"]


def test_what_is_attached_otherwise_is_said_not_changed(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.cache.answer({"op": "attach", "volume": "web2", "device": "/dev/nbd3"})
    assert place.run("map", "web2") == EXISTS
    assert "attached already as /dev/nbd3, not as /dev/nbd7" in capsys.readouterr().err
    place.tab.write_text("web2 read-only\n")
    assert place.run("map", "web2") == EXISTS
    assert "as /dev/nbd3, for writing, not read-only" in capsys.readouterr().err


def test_device_in_use_is_not_detached(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.cache.answer({"op": "attach", "volume": "web1"})
    place.cache.refuse["web1"] = ("E_BUSY", 10_000)
    assert place.run("unmap", "--all", "--timeout", "1s") == BUSY
    assert capsys.readouterr().err == "millpond: error: volume 'web1' is mounted\n"
    assert set(place.cache.devices) == {"web1"}


def test_command_lines_that_say_too_little_or_too_much(place: Place) -> None:
    for command in ("map", "unmap"):
        assert place.run(command) == USAGE
        assert place.run(command, "--all", "web1") == USAGE
    place.tab.write_text("web1 readonly\n")
    assert place.run("map", "--all") == USAGE
    place.tab.unlink()
    assert place.run("map", "--all") == NOT_FOUND


def test_empty_tab_asks_nobody(tmp_path: Path) -> None:
    (tmp_path / "tab").write_text("# nothing\n")
    arguments = ["--tab", str(tmp_path / "tab"), "--control", str(tmp_path / "none")]
    assert main(["map", "--all", *arguments]) == OK


def test_attach_of_the_attempt_before_is_waited_for(place: Place) -> None:
    """It took longer than the asker waited, and is still at work in the daemon."""
    place.cache.refuse["web1"] = ("E_UNDER_WAY", 2)
    assert place.run("map", "web1") == OK
    assert place.cache.ops("attach") == ["web1"] * 3


def test_long_waiting_is_told_once(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millpond.cli.map.PATIENCE_S", 0.4)
    place.cache.refuse["web1"] = ("E_UNREACHABLE", 4)
    assert place.run("map", "web1") == OK
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("millpond: volume 'web1' cannot be attached; trying again for 599 s")


def test_real_store_that_comes_late_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What attaching says then is this machine's business: most have no module, or no right."""
    (tmp_path / "tab").write_text("disk\n")
    with Pair(tmp_path, {"disk": 64 << 20}) as pair:
        arguments = ["--tab", str(tmp_path / "tab"), "--control", str(pair.control)]
        pair.store.stop()
        begin = time.perf_counter()
        assert main(["map", "--all", "--timeout", "2s", *arguments]) == UNREACHABLE
        assert time.perf_counter() - begin > 1, "it was tried again"
        assert "volume disk: cannot reach the store" in capsys.readouterr().err
        assert main(["attach", "disk", "--control", str(pair.control)]) == UNREACHABLE
        assert "volume disk: cannot reach the store" in capsys.readouterr().err
        timer = threading.Timer(1.5, pair.store.start)
        timer.start()
        code = main(["map", "--all", *arguments])
        timer.join()
        said = capsys.readouterr().err
        assert code != UNREACHABLE and "cannot reach the store" not in said, said
        assert main(["unmap", "--all", *arguments]) == OK


def test_real_cache_understands_what_is_asked(tmp_path: Path) -> None:
    """Attaching needs a kernel with nbd: tests/boot and tests/kernel."""
    (tmp_path / "tab").write_text("disk\n")
    place = tmp_path / "millpond"
    arguments = ["--tab", str(tmp_path / "tab"), "--control", str(place / "control.sock")]
    with Millpond(place, size_bytes=64 << 20, cache_bytes=256 << 20):
        assert main(["unmap", "--all", *arguments]) == OK
        assert main(["unmap", "none", *arguments]) == OK
