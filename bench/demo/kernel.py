"""A Debian kernel, downloaded and unpacked, never installed.

A package like linux-image-cloud-amd64 only names the newest version; the package it depends on is
downloaded with apt-get (signatures checked by apt) and unpacked with dpkg. Nothing is
written to /boot, no boot loader runs. tests/kernel takes its kernels from here, too: that of the
machine's own release, and that of another one, whose package lists are kept apart.

Failure modes: another machine type (refused), no package lists or stale ones (lists are
updated once, then apt's own message is passed on).
"""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CLOUD = "linux-image-cloud-amd64"  # small, for a guest with nothing but virtio disks
GENERIC = "linux-image-amd64"  # with 9p
MIRROR = "http://deb.debian.org/debian"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel package."""

    version: str
    image: Path
    modules: Path


def of_release(directory: Path, release: str | None) -> list[str]:
    """What tells apt to use another release's lists, in directory; None: this machine's."""
    if release is None:
        return []
    lists = directory / "lists"
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    sources = directory / "sources.list"
    sources.write_text(f"deb [signed-by={KEYRING}] {MIRROR} {release} main\n")
    settings = {"Dir::Etc::SourceList": sources, "Dir::Etc::SourceParts": "/dev/null"}
    settings |= {"Dir::State::Lists": lists, "Dir::Cache": directory}
    return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]


def package_name(meta_package: str, apt_options: Sequence[str] = ()) -> str | None:
    """The versioned package behind the meta package; None without package lists."""
    command = ["apt-cache", *apt_options, "depends", meta_package]
    shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"Depends: (linux-image-\S+)", shown)
    return found[1] if found else None


def download(directory: Path, meta_package: str, apt_options: Sequence[str]) -> bool:
    """Fetch the versioned package into directory."""
    package = package_name(meta_package, apt_options)
    if package is None:
        return False
    print(f"downloading {package} (unpacked under {directory}, not installed)", flush=True)
    # As root apt drops to the user _apt, which may not reach this directory; the signature
    # is checked either way.
    command = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", *apt_options]
    command += ["download", package]
    return subprocess.run(command, cwd=directory, check=False).returncode == 0


def unpacked(root: Path) -> Kernel | None:
    """The kernel below root, if it is there."""
    images = sorted(root.glob("boot/vmlinuz-*"))
    if not images:
        return None
    version = images[-1].name.removeprefix("vmlinuz-")
    places = (root / "lib", root / "usr" / "lib")  # the second since Debian 13
    (lib,) = (place for place in places if place.is_dir())
    return Kernel(version, images[-1], lib / "modules" / version)


def ensure(directory: Path, meta_package: str = CLOUD, release: str | None = None) -> Kernel:
    """The kernel below directory, downloaded first when it is not there yet.

    release: another one of Debian than this machine's sources name.
    """
    if kernel := unpacked(directory / "root"):
        return kernel
    if platform.machine() != "x86_64":
        raise SystemExit(f"the guest kernel is x86_64, this machine is {platform.machine()}")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    options = of_release(directory, release)
    if release is not None or not download(directory, meta_package, options):
        update = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", *options, "update"]
        subprocess.run(update if os.geteuid() == 0 else ["sudo", *update], check=True)
        if not download(directory, meta_package, options):
            raise SystemExit(f"cannot download {meta_package}: see apt's message above")
    package = next(directory.glob("linux-image-*.deb"))
    unpacking = directory / "root.partial"
    subprocess.run(["dpkg", "-x", str(package), str(unpacking)], check=True)
    unpacking.rename(directory / "root")  # last: a half-unpacked kernel is never used
    package.unlink()
    kernel = unpacked(directory / "root")
    assert kernel is not None, "the package holds no kernel"
    return kernel
