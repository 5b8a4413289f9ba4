"""`millpond attach` and `detach` against a played cache; with a real kernel: tests/kernel."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from controlserver import PlayedCache
from millpond.cli.main import main
from millpond.cli.run import EXISTS, NOT_FOUND, OK


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedCache]:
    with PlayedCache(tmp_path / "control") as played:
        played.volumes = {"disk"}
        monkeypatch.setenv("MILLPOND_CONTROL", str(played.path))
        yield played


def test_attach_prints_the_device_and_a_second_one_fails(
    cache: PlayedCache, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["attach", "disk"]) == OK
    assert capsys.readouterr().out == "/dev/nbd0\n"
    assert main(["attach", "disk"]) == EXISTS
    assert main(["attach", "nothing"]) == NOT_FOUND
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("device", ["/dev/nbd5", "nbd5", "5"])
def test_attach_again_is_no_error_when_told_so(
    cache: PlayedCache, capsys: pytest.CaptureFixture[str], device: str
) -> None:
    """However the device is written; and all of the cache may be read-only."""
    cache.read_only = True
    again = ["attach", "disk", "--exist-ok", "--json"]
    for options in (["--device", device], ["--device", device], [], ["--read-only"]):
        assert main([*again, *options]) == OK
        made = json.loads(capsys.readouterr().out)
        assert (made["device"], made["volume"]) == ("/dev/nbd5", "disk")
    assert cache.ops("attach") == ["disk"]


def test_attach_again_otherwise_is_an_error(
    cache: PlayedCache, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["attach", "disk"]) == OK
    for options in (["--device", "/dev/nbd5"], ["--read-only"]):
        assert main(["attach", "disk", "--exist-ok", *options]) == EXISTS
        assert "attached already as /dev/nbd0, " in capsys.readouterr().err


def test_detach_again_is_no_error_when_told_so(cache: PlayedCache) -> None:
    assert main(["attach", "disk"]) == OK
    assert main(["detach", "disk"]) == OK
    assert main(["detach", "disk"]) == NOT_FOUND
    assert main(["detach", "disk", "--missing-ok"]) == OK
