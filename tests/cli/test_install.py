"""`make install` and `make uninstall`: what they make, keep and refuse.

Python's part, a virtual environment with the package in it, is played by a script: the real one
needs a package index (`make install DESTDIR=...` by hand).
"""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLAYED = """#!/bin/sh
# python -m venv DIR
mkdir -p "$3/bin"
printf '#!/bin/sh\\nexit 0\\n' > "$3/bin/pip"
printf '#!%s/bin/python\\n' "$3" > "$3/bin/millpond.real"
printf '#!/bin/sh\\necho "# sample of $3"\\n' > "$3/bin/millpond"
chmod +x "$3"/bin/*
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.write_text(PLAYED)
    path.chmod(0o755)
    return path


def make(
    target: str, destination: Path, python: Path, prefix: str = "/usr"
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [
            *("make", "-s", "-C", str(ROOT), target, f"PYTHON={python}", f"DESTDIR={destination}"),
            *(f"PREFIX={prefix}", "-o", ".run/build.packages"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "MAKEFLAGS": ""},
    )


def tree(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}


def test_install_and_uninstall_leave_nothing(tmp_path: Path, python: Path) -> None:
    root = tmp_path / "root"
    done = make("install", root, python)
    assert done.returncode == 0, done.stderr
    assert (root / "usr/bin/millpond").resolve() == root / "usr/lib/millpond/bin/millpond"
    assert (root / "etc/millpond/cache.toml").read_text() == "# sample of cache\n"
    assert (root / "etc/millpond/store.toml").read_text() == "# sample of store\n"
    units = root / "usr/lib/systemd/system"
    assert {path.name for path in units.iterdir()} == {
        *("millpond-store.service", "millpond-cache.service", "millpond-cache.socket"),
        *("millpond-map.service", "millpond-unmap.service", "millpond-vhost-user@.service"),
    }
    cache = (units / "millpond-cache.service").read_text()
    assert "ExecStart=/usr/bin/millpond cache serve\n" in cache
    assert (root / "usr/lib/sysusers.d/millpond.conf").exists()
    assert (root / "usr/lib/udev/rules.d/60-millpond.rules").exists()
    hook = root / "etc/libvirt/hooks/qemu.d/50-millpond"
    assert os.access(hook, os.X_OK)
    assert '| /usr/bin/env /usr/bin/millpond hook "$@"' in hook.read_text(), "AppArmor"
    assert "# web1 " in (root / "etc/millpond/tab").read_text()
    assert make("install", root, python).returncode == 0, "again, as an upgrade does"
    assert make("uninstall", root, python).returncode == 0
    assert tree(root) == set()


def test_settings_that_were_edited_and_data_stay(tmp_path: Path, python: Path) -> None:
    root = tmp_path / "root"
    (root / "etc/millpond").mkdir(parents=True)
    (root / "etc/millpond/cache.toml").write_text("mine\n")
    (root / "var/lib/millpond").mkdir(parents=True)
    (root / "var/lib/millpond/cache").write_text("data")
    assert make("install", root, python).returncode == 0
    assert (root / "etc/millpond/cache.toml").read_text() == "mine\n"
    (root / "etc/millpond/store.toml").write_text("edited\n")
    (root / "etc/millpond/tab").write_text("web1 -\n")
    (root / "usr/lib/systemd/system/of-others.service").touch()
    removed = make("uninstall", root, python)
    assert removed.stdout.count("was edited and stays") == 3
    assert tree(root) == {
        "etc/millpond/cache.toml",
        "etc/millpond/store.toml",
        "etc/millpond/tab",
        "usr/lib/systemd/system/of-others.service",
        "var/lib/millpond/cache",
    }


def test_upgrade_replaces_what_nobody_has_edited(tmp_path: Path, python: Path) -> None:
    root = tmp_path / "root"
    assert make("install", root, python).returncode == 0
    (root / "etc/millpond/store.toml").write_text("edited\n")
    hook = root / "etc/libvirt/hooks/qemu.d/50-millpond"
    older = hook.read_text().replace("/usr/bin/env ", "")
    for path in (hook, root / "usr/lib/millpond/50-millpond"):  # as the version before made it
        path.write_text(older)
    python.write_text(PLAYED.replace("sample of", "newer sample of"))
    assert make("install", root, python).returncode == 0
    assert (root / "etc/millpond/cache.toml").read_text() == "# newer sample of cache\n"
    assert (root / "etc/millpond/store.toml").read_text() == "edited\n"
    assert "/usr/bin/env " in hook.read_text() and os.access(hook, os.X_OK)
    removed = make("uninstall", root, python)
    assert removed.stdout.count("was edited and stays") == 1
    assert tree(root) == {"etc/millpond/store.toml"}


def test_prefix_where_systemd_does_not_look_is_told(tmp_path: Path, python: Path) -> None:
    for prefix, told in (("/usr", False), ("/usr/local", False), ("/opt/pond", True)):
        done = make("install", tmp_path / prefix[1:], python, prefix)
        assert done.returncode == 0
        assert (f"do not look below {prefix}" in done.stdout) is told


def test_what_is_not_ours_is_refused(tmp_path: Path, python: Path) -> None:
    root = tmp_path / "root"
    (root / "usr/lib/millpond").mkdir(parents=True)
    (root / "usr/lib/millpond/precious").touch()
    for target in ("install", "uninstall"):
        refused = make(target, root, python)
        assert refused.returncode != 0 and "is not ours" in refused.stderr
    assert tree(root) == {"usr/lib/millpond/precious"}
    other = tmp_path / "other"
    (other / "usr/bin").mkdir(parents=True)
    (other / "usr/bin/millpond").write_text("somebody's")
    assert "is not ours" in make("install", other, python).stderr
    assert make("uninstall", other, python).returncode == 0
    assert tree(other) == {"usr/bin/millpond"}
