"""A Debian with systemd and an installed Millpond, as a disk image for a guest.

    image = build(work, kernel)      # store, cache, a volume with ext4 in its tab and fstab

Debian comes from debootstrap once and stays below .run; `make install` of this checkout goes into a
copy of it, with the units, users and settings that an operator has. Needs root, as debootstrap and
file owners do.

Failure modes: no root, or debootstrap or mke2fs missing: the test fails with that word.
"""

import os
import shutil
import subprocess
from pathlib import Path

from demo.kernel import Kernel
from millpondprocess import command_line, environment

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / ".run" / "boot-base"
MIRROR = "http://deb.debian.org/debian"
PACKAGES = (
    *("systemd", "systemd-sysv", "udev", "dbus", "kmod", "iproute2", "e2fsprogs"),
    *("python3", "liblz4-1", "libxxhash0"),
)
MIB = 1 << 20
IMAGE_BYTES, VOLUME_BYTES, CACHE_BYTES = 3 << 30, 256 * MIB, 512 * MIB
MOUNT = "/srv/data"
# As README and the sample of the tab say it.
OPTIONS = "_netdev,x-systemd.after=millpond-map.service,x-systemd.device-timeout=10min"
FSTAB = f"""\
/dev/vda / ext4 errors=remount-ro 0 1
/dev/millpond/data {MOUNT} ext4 {OPTIONS} 0 0
"""
# The second cannot be attached: nothing but its own mount, which it has not, may suffer.
TAB = "data -\ngone -\n"
# Slower than the guest writes, so that its log is dirty when it is told to stop.
CACHE = """\
[cache]
device = "/var/lib/millpond/cache"
stores = ["unix:/var/lib/millpond/store/store.sock"]
[rates]
average = "256KiB"
peak = "256KiB"
"""
STORE = """\
[store]
directory = "/var/lib/millpond/store"
"""
PROOF = """\
[Unit]
After=remote-fs.target millpond-map.service millpond-cache.service
[Service]
ExecStart=/usr/bin/python3 /usr/local/lib/proof.py
[Install]
WantedBy=multi-user.target
"""
ENABLED = ("store.service", "cache.socket", "cache.service", "map.service")
NOT_HERE = ("getty@tty1.service", "serial-getty@ttyS0.service", "apt-daily.timer")


def run(*command: object, timeout_s: float = 600, environ: dict[str, str] | None = None) -> None:
    """A program of the host; what it says when it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"} | (environ or {}),
    )
    assert done.returncode == 0, f"{' '.join(words)}: {done.returncode}\n{done.stdout[-4000:]}"


def base() -> Path:
    """Debian without Millpond, made when it is not there yet."""
    if BASE.exists():
        return BASE
    assert os.geteuid() == 0, "debootstrap needs root"
    partial = BASE.with_name("boot-base.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(exist_ok=True)
    include = f"--include={','.join(PACKAGES)}"
    run("debootstrap", "--variant=minbase", include, "bookworm", partial, MIRROR, timeout_s=1800)
    shutil.rmtree(partial / "var" / "cache" / "apt" / "archives", ignore_errors=True)
    partial.rename(BASE)
    return BASE


def build(work: Path, kernel: Kernel) -> Path:
    """The image; everything in it is new but Debian."""
    tree, image = work / "tree", work / "root.img"
    run("cp", "-a", base(), tree)
    (tree / "usr" / "lib" / "modules").mkdir(exist_ok=True)
    run("cp", "-a", kernel.modules, tree / "usr" / "lib" / "modules" / kernel.version)
    run("chroot", tree, "depmod", kernel.version)
    install(tree)
    settle(tree)
    fill(tree, work)
    size = f"{IMAGE_BYTES >> 10}k"
    run("mke2fs", "-q", "-t", "ext4", "-E", "lazy_itable_init=0", "-d", tree, image, size)
    shutil.rmtree(tree)
    return image


def install(tree: Path) -> None:
    """`make install`, with the Python that the guest has, too."""
    words = ("make", "-s", "-C", ROOT, "install", f"DESTDIR={tree}")
    run(*words, "PREFIX=/usr", "PYTHON=/usr/bin/python3", environ={"MAKEFLAGS": ""})
    run("systemd-sysusers", f"--root={tree}")


def settle(tree: Path) -> None:
    """What an operator says: settings, tab, fstab, and which units start."""
    settings = tree / "etc" / "millpond"
    for name, text in (("cache.toml", CACHE), ("store.toml", STORE), ("tab", TAB)):
        (settings / name).write_text(text)
    (tree / "etc" / "fstab").write_text(FSTAB)
    (tree / "etc" / "hostname").write_text("pond\n")
    (tree / MOUNT.lstrip("/")).mkdir(parents=True)
    (tree / "var" / "log" / "journal").mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(__file__).with_name("proof.py"), tree / "usr" / "local" / "lib")
    (tree / "etc" / "systemd" / "system" / "proof.service").write_text(PROOF)
    control = ("systemctl", f"--root={tree}")
    run("systemd-machine-id-setup", f"--root={tree}")
    run(*control, "enable", *(f"millpond-{name}" for name in ENABLED), "proof.service")
    run(*control, "mask", *NOT_HERE)
    run(*control, "set-default", "multi-user.target")


def fill(tree: Path, work: Path) -> None:
    """A store with a volume, which has a file system, and an empty cache."""
    place = tree / "var" / "lib" / "millpond"
    store = place / "store"
    store.mkdir(parents=True)
    disk = work / "data.img"
    run("mke2fs", "-q", "-t", "ext4", "-E", "lazy_itable_init=0", disk, f"{VOLUME_BYTES >> 10}k")
    millpond = command_line()
    serving = subprocess.Popen(
        [*millpond, "store", "serve", str(store), "--format"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment(),
        text=True,
    )
    try:
        assert serving.stdout is not None and serving.stdout.readline(), "the store does not start"
        size = ("--size", VOLUME_BYTES, "--dir", store)
        run(*millpond, "volume", "create", "data", *size, environ=environment())
        run(*millpond, "volume", "import", disk, "data", "--dir", store, environ=environment())
    finally:
        serving.terminate()
        serving.communicate(timeout=60)
    assert serving.returncode == 0
    run(*millpond, "cache", "format", place / "cache", "--size", CACHE_BYTES, environ=environment())
    users = (line.split(":") for line in (tree / "etc" / "passwd").read_text().splitlines())
    (user,) = (fields for fields in users if fields[0] == "millpond")
    run("chown", "-R", f"{user[2]}:{user[3]}", store)
    run("chown", f"{user[2]}:{user[3]}", place)
    disk.unlink()
