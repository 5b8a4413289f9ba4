"""/dev/millpond/VOLUME -> /dev/nbdN, and what udev's rule needs to know to make the same link.

    /run/millpond/devices/nbdN   MILLPOND_BACKEND=, _NAME=, _VOLUME=, for 60-millpond.rules;
                                 MILLPOND_BACKEND=, _DETACHED=1: but somebody still has it open
    /dev/millpond/NAME           the link; made here too, for machines without udev

Rules: a name is data: what is not plain is escaped as udev does (\\xNN), and one that is too long
for a file name becomes the volume's id.  A link of somebody else's is left alone.

Failure modes: a directory that cannot be written: logged, the device works without a link.
"""

import logging
import os
import re
import threading
from contextlib import suppress
from pathlib import Path

from millpond.cache.errors import CacheError, escaped
from millpond.nbd.sysfs import Backend, Sysfs

_log = logging.getLogger(__name__)

PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789#+-.:=@_")
FILE_NAME_BYTES_MAX = 255


def link_name(name: str, volume_id: bytes) -> str:
    """A file name for a volume's name: one to one, never a path, hidden, or a partition's."""
    encoded = name.encode()
    out = "".join(chr(byte) if byte in PLAIN else f"\\x{byte:02x}" for byte in encoded)
    if out.startswith("."):
        out = f"\\x2e{out[1:]}"
    # The rule calls a partition VOLUME-partN: guests make those, and must not take another's link.
    out = re.sub(r"-(part\d+)$", r"\\x2d\1", out)
    return out if out and len(out) <= FILE_NAME_BYTES_MAX else volume_id.hex()


class DeviceLinks:
    """The links of one daemon.  Small blocking file operations: worker threads, one at a time.

    A device that is served anew, and anew at once, has two of them at work.
    """

    def __init__(self, sysfs: Sysfs) -> None:
        self._sysfs = sysfs
        self._links = sysfs.path("dev", "millpond")
        self._notes = sysfs.path("run", "millpond", "devices")
        self._lock = threading.Lock()

    def path_of(self, name: str, volume_id: bytes) -> str:
        """Where the link of a volume is."""
        return str(self._links / link_name(name, volume_id))

    def make(self, index: int, name: str, backend: Backend) -> None:
        """Point the volume's link at the device."""
        with self._lock:
            self._make(index, name, backend)
        self._sysfs.announce(index)

    def _make(self, index: int, name: str, backend: Backend) -> None:
        link = link_name(name, backend.volume_id)
        try:
            self._notes.mkdir(parents=True, exist_ok=True)
            before = _fields(self._notes / f"nbd{index}").get("MILLPOND_NAME", link)
            if before != link:  # the volume has another name now
                self._unlink(index, before)
            text = f'MILLPOND_BACKEND="{backend}"\nMILLPOND_NAME="{link}"\n'
            text += f'MILLPOND_VOLUME="{backend.volume_id.hex()}"\n'
            _replace(self._notes / f"nbd{index}", text)
            self._point(self._links / link, index, backend)
        except OSError as error:
            _log.warning(
                "no link for volume=%s device=/dev/nbd%d reason=%s",
                escaped(name),
                index,
                escaped(os.strerror(error.errno or 0)),
            )

    def conflict(self, name: str, backend: Backend) -> str:
        """What the link of a volume leads to, if that is a living device of another; or ""."""
        try:
            held = os.readlink(self.path_of(name, backend.volume_id))
        except OSError:
            return ""
        owner = self._owner(held)
        return held.replace("../", "/dev/") if owner not in (None, backend) else ""

    def remove(self, index: int, backend: Backend) -> None:
        """The device is not this volume's any more."""
        with self._lock:
            self._remove(index, backend)
        self._sysfs.announce(index)

    def _remove(self, index: int, backend: Backend) -> None:
        note = self._notes / f"nbd{index}"
        kept = _fields(note)
        if kept.get("MILLPOND_BACKEND") == str(backend):
            self._unlink(index, kept.get("MILLPOND_NAME", backend.volume_id.hex()))
            note.unlink(missing_ok=True)
            with suppress(OSError):
                self._notes.rmdir()  # when it was the last

    def _unlink(self, index: int, name: str) -> None:
        link = self._links / name
        with suppress(OSError):
            if os.readlink(link) == f"../nbd{index}":
                link.unlink()
        with suppress(OSError):
            self._links.rmdir()  # when it was the last

    def mark_detached(self, index: int, backend: Backend) -> None:
        """It is not served any more, whatever the kernel says; its link goes.  CacheError.

        Whoever has a device open when it is disconnected keeps it, and its backend, in the kernel,
        where it looks like one that waits for us.
        """
        with self._lock:
            note = self._notes / f"nbd{index}"
            self._unlink(index, _fields(note).get("MILLPOND_NAME", backend.volume_id.hex()))
            try:
                self._notes.mkdir(parents=True, exist_ok=True)
                _replace(note, f'MILLPOND_BACKEND="{backend}"\nMILLPOND_DETACHED="1"\n')
            except OSError as error:
                raise CacheError(
                    f"cannot note in {note} that /dev/nbd{index} is detached:"
                    f" {os.strerror(error.errno or 0)}"
                ) from None
        self._sysfs.announce(index)

    def is_detached(self, index: int, backend: Backend) -> bool:
        """It is there only because somebody still has it open."""
        found = _fields(self._notes / f"nbd{index}")
        return "MILLPOND_DETACHED" in found and found.get("MILLPOND_BACKEND") == str(backend)

    def drop_detached(self, backend: Backend) -> None:
        """The kernel has no device of this backend any more."""
        with self._lock:
            for index, found in self.stale(backend.cache_id):
                if found == backend and self.is_detached(index, backend):
                    self._remove(index, backend)

    def stale(self, cache_id: bytes) -> list[tuple[int, Backend]]:
        """Devices that this cache left a note of; some may be gone."""
        found = []
        for note in self._notes.glob("nbd*"):
            backend = Backend.parse(_fields(note).get("MILLPOND_BACKEND", ""))
            digits = note.name.removeprefix("nbd")
            if backend is not None and backend.cache_id == cache_id and digits.isdigit():
                found.append((int(digits), backend))
        return found

    def _point(self, link: Path, index: int, backend: Backend) -> None:
        target = f"../nbd{index}"
        with suppress(OSError):
            held = os.readlink(link)
            if held == target:
                return
            owner = self._owner(held)
            if owner is not None and owner != backend:
                _log.warning(
                    "link kept link=%s reason=%s",
                    escaped(str(link)),
                    escaped(f"it is of {held}, another volume of that name"),
                )
                return
        link.parent.mkdir(exist_ok=True)
        new = link.with_name(f".{index}.new")
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        new.replace(link)

    def _owner(self, target: str) -> Backend | None:
        """Of the device that a link points to now."""
        digits = target.removeprefix("../nbd")
        device = self._sysfs.device(int(digits)) if digits.isdigit() else None
        return Backend.parse(device.backend) if device is not None else None


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.replace(path)


def _fields(note: Path) -> dict[str, str]:
    try:
        lines = note.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition("=") for line in lines)
    return {key: value.strip('"') for key, _, value in pairs}
