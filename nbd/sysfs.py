"""What /sys and /proc say about the kernel's NBD devices, and what is set there.

Rules: plain files, no ioctl; reads never block on a device's own I/O.  `apply_queue_settings` and
`exclusive` do: worker threads only.

Failure modes: a device that goes away meanwhile is no device; a setting that this kernel does not
have is left out.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from millpond.cache.errors import CacheError, VolumeBusy
from millpond.nbd.child import SYNC, StepFailed, hold, put

BACKEND_PREFIX: Final = "millpond"
# What was in flight when the daemon died is sent again when its own timer fires: so long after it
# was sent, and up to a second more, because the kernel rounds these timers up.  Shorter gains
# nothing; 30 s, the default, is the pause that a guest would see.
IO_TIMEOUT_MS: Final = 500
# One record of the write log holds 4 MiB (native/format.h); larger requests only wait for memory.
MAX_SECTORS_KIB: Final = 4096
SECTOR_BYTES: Final = 512

QUEUE_SETTINGS: Final[tuple[tuple[str, str], ...]] = (
    ("io_timeout", str(IO_TIMEOUT_MS)),
    ("scheduler", "none"),  # the guest has one, and the cache is no spinning disk
    ("rotational", "0"),
    ("wbt_lat_usec", "0"),  # it would slow writers down to what it takes for a disk's speed
)


@dataclass(frozen=True)
class Backend:
    """Whose device it is; goes into the kernel as the backend identifier."""

    cache_id: bytes
    volume_id: bytes

    def __str__(self) -> str:
        return f"{BACKEND_PREFIX}/{self.cache_id.hex()}/{self.volume_id.hex()}"

    @classmethod
    def parse(cls, text: str) -> "Backend | None":
        """None: not one of ours."""
        found = re.fullmatch(rf"{BACKEND_PREFIX}/([0-9a-f]{{32}})/([0-9a-f]{{32}})", text)
        return cls(bytes.fromhex(found[1]), bytes.fromhex(found[2])) if found else None


@dataclass(frozen=True)
class KernelDevice:
    """A configured NBD device, whoever serves it."""

    index: int
    backend: str
    size_bytes: int
    read_only: bool


class Sysfs:
    """The trees below a root, which tests replace."""

    def __init__(self, root: str = "/") -> None:
        self._root = Path(root)
        self._block = self._root / "sys" / "block"

    def path(self, *parts: str) -> Path:
        """Below the root."""
        return self._root.joinpath(*parts)

    def devices(self) -> list[KernelDevice]:
        """Every configured NBD device."""
        found = [index_of(path.name) for path in self._block.glob("nbd*")]
        every = (self.device(index) for index in sorted(each for each in found if each is not None))
        return [device for device in every if device is not None]

    def device(self, index: int) -> KernelDevice | None:
        """None: no such device, or nothing is connected there."""
        if int(self._read(index, "pid") or 0) <= 0:
            return None
        return KernelDevice(
            index=index,
            backend=self._read(index, "backend"),
            size_bytes=int(self._read(index, "size") or 0) * SECTOR_BYTES,
            read_only=self._read(index, "ro") == "1",
        )

    def has(self, index: int, backend: Backend) -> bool:
        """The device is there; which may be over, with somebody who has not closed it."""
        device = self.device(index)
        return device is not None and device.backend == str(backend)

    def is_idle(self, index: int) -> bool:
        """Nothing is in flight and nothing waits for a connection."""
        return self._read(index, "inflight").split() == ["0", "0"]

    def apply_queue_settings(self, index: int) -> None:
        """What is not as we want it.  Changing the scheduler waits for what is in flight."""
        most = int(self._read(index, "queue/max_hw_sectors_kb") or MAX_SECTORS_KIB)
        wanted = [*QUEUE_SETTINGS, ("max_sectors_kb", str(min(most, MAX_SECTORS_KIB)))]
        queue = self._block / f"nbd{index}" / "queue"
        put(
            [
                (str(queue / name), value)
                for name, value in wanted
                if self._lacks(index, name, value)
            ]
        )

    def announce(self, index: int) -> None:
        """A "change" event: udev looks again."""
        with suppress(OSError):
            (self._block / f"nbd{index}" / "uevent").write_text("change")

    def users(self, index: int) -> str:
        """Who has the device or a partition of it, in words; "": nobody that can be seen."""
        numbers = self._numbers(index)
        for line in self._lines("proc/self/mountinfo"):
            fields = line.split()
            if len(fields) > 4 and fields[2] in numbers:
                return f"mounted at {fields[4]}"
        for line in self._lines("proc/swaps"):
            if re.match(rf"/dev/nbd{index}(p\d+)?\s", line):
                return "in use as swap"
        with suppress(OSError):  # a partition that goes away meanwhile
            for holders in (self._block / f"nbd{index}").glob("**/holders"):
                for holder in holders.iterdir():
                    return f"used by {holder.name}"
        return self._openers(index, numbers)

    def _openers(self, index: int, numbers: set[str]) -> str:
        wanted = {os.makedev(*map(int, number.split(":"))) for number in numbers}
        for process in self.path("proc").glob("[0-9]*"):
            with suppress(OSError):
                for descriptor in os.listdir(process / "fd"):
                    if _is_open(process / "fd" / descriptor, index, wanted):
                        name = (process / "comm").read_text().strip()
                        return f"open in {name} (process {process.name})"
        return ""

    def _numbers(self, index: int) -> set[str]:
        """major:minor of the device and its partitions."""
        here = self._block / f"nbd{index}"
        files = [here / "dev", *here.glob("nbd*/dev")]
        numbers = set()
        for path in files:
            with suppress(OSError):
                numbers.add(path.read_text().strip())
        return numbers

    def _lines(self, name: str) -> list[str]:
        try:
            return self.path(name).read_text().splitlines()
        except OSError:
            return []

    def _read(self, index: int, name: str) -> str:
        try:
            return (self._block / f"nbd{index}" / name).read_text().strip()
        except OSError:
            return ""

    def _lacks(self, index: int, name: str, value: str) -> bool:
        now = self._read(index, f"queue/{name}")
        return bool(now) and now != value and f"[{value}]" not in now


def _is_open(descriptor: Path, index: int, wanted: set[int]) -> bool:
    """One that is closed meanwhile is not; the others of its process are still looked at."""
    try:
        # By its name first: to ask what is behind it may block on another device.
        named = re.match(rf".*/nbd{index}(p\d+)?$", os.readlink(descriptor))
        return named is not None and descriptor.stat().st_rdev in wanted
    except OSError:
        return False


def index_of(text: str) -> int | None:
    """N of /dev/nbdN, nbdN or N; None: it names no NBD device."""
    found = re.fullmatch(r"(?:(?:/dev/)?nbd)?(\d{1,6})", text)
    return int(found[1]) if found else None


def is_udev(users: str) -> bool:
    """Of users(): it is only udev, which opens what others have closed, for a moment."""
    return re.match(r"open in \(?(udev-worker|systemd-udevd)\b", users) is not None


@contextmanager
def exclusive(sysfs: Sysfs, index: int) -> Iterator[None]:
    """Hold a device so that nobody mounts it, with everything written back.  VolumeBusy."""
    path = str(sysfs.path("dev", f"nbd{index}"))
    try:
        with hold(path):
            yield
    except StepFailed as error:
        reason = os.strerror(error.code)
        if error.step == SYNC:
            raise CacheError(
                f"{path} cannot be written back: {reason}; --force loses what is not written"
            ) from None
        if error.code == errno.EBUSY:
            raise VolumeBusy(f"{path} is in use") from None
        raise CacheError(f"cannot open {path}: {reason}") from None
