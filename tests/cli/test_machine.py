"""Too old a machine, versions, and the exit codes that are documented."""

import errno
import json
import os
import re
import resource
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from millpond.cache.device import DeviceError, open_locked
from millpond.cli import main as command
from millpond.cli import run as codes
from millpond.cli.foreground import raise_descriptor_limit
from millpond.native import lib
from millpond.native.needs import direct_problem, kernel_problem
from millpond.store.directory import OpenStore
from millpond.store.errors import StoreError

ROOT = Path(__file__).resolve().parents[2]


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file system that does not have it."""
    real = os.open

    def fake(path: Any, flags: int, *more: Any, **most: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return real(path, flags, *more, **most)

    monkeypatch.setattr(os, "open", fake)


def test_file_system_without_direct_io(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = tmp_path / "cache"
    device.touch()
    refuse_direct(monkeypatch)
    with pytest.raises(DeviceError, match="O_DIRECT is needed, and .* does not have it; use ext4"):
        open_locked(str(device))
    with pytest.raises(StoreError, match="O_DIRECT is needed, and .* does not have it; use ext4"):
        OpenStore(str(tmp_path), format_when_empty=True)
    assert os.listdir(tmp_path) == ["cache"], "nothing was made"


def test_file_system_is_named_by_its_innermost_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda rw\n"
        "2 1 0:5 / /srv/a\\040b rw shared:1 - tmpfs tmpfs rw\n"
        "3 1 0:6 / /srv rw - nfs host:/ rw\n"
    )
    assert "tmpfs at /srv/a b does" in direct_problem("/srv/a b/x", mounts=str(mounts))
    assert "nfs at /srv does" in direct_problem("/srv/a bc/x", mounts=str(mounts))
    assert "ext4 at / does" in direct_problem("/srvx", mounts=str(mounts))


@pytest.mark.parametrize("verb", ["up", "store", "cache"])
def test_kernel_that_is_too_old(
    verb: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release="3.10.0-1160.el7.x86_64"))
    where = str(tmp_path / "new")
    serve = ["up", where] if verb == "up" else [verb, "serve", where]
    options = ["--store", "unix:/x", "--nbd", "/y"] if verb == "cache" else []
    assert command.main([*serve, *options]) == 1
    line = "Linux 4.18 or newer is needed, found 3.10.0-1160.el7.x86_64"
    assert capsys.readouterr().err == f"millpond: error: {line}\n"
    assert not os.path.exists(where)


def test_kernels_that_are_new_enough() -> None:
    for release in ("4.18.0-553.el8", "5.15.0-91-generic", "6.1.0", "10.0", "unheard-of"):
        assert kernel_problem(release) == ""


def test_descriptors_up_to_the_hard_limit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _what, limits: kept.append(limits))
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (1024, 524288))
    raise_descriptor_limit()
    assert kept == [(4096, 524288)]
    assert not caplog.records
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (1024, 2048))
    raise_descriptor_limit()
    assert kept[1:] == [(2048, 2048)]
    assert "at most 2048 open files" in caplog.text
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (65536, 524288))
    raise_descriptor_limit()
    assert len(kept) == 2, "more than enough stays"


def test_python_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 2, "final", 0))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "cli" / "__init__.py"))
    assert ended.value.code == "millpond: error: Python 3.11 or newer is needed, found 3.9"


def test_version_names_package_and_formats(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"millpond \S+", lines[0])
    assert command.main(["version", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["formats"] == {"disk": lib.MP_FORMAT_VERSION, "wire": lib.MP_WIRE_VERSION}
    assert lines[1] == f"format on disk {lib.MP_FORMAT_VERSION}, on the wire {lib.MP_WIRE_VERSION}"


def test_every_exit_code_is_documented() -> None:
    table = (ROOT / "README.md").read_text()
    for name, code in vars(codes).items():
        if name.isupper() and isinstance(code, int):
            assert f"\n| {code} | " in table, f"{name} is not in the table of README.md"
