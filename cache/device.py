"""The cache device: opened for us alone, and formatted only when nothing of value is on it.

Rules: a block device is opened O_EXCL (the kernel refuses while it is mounted or held), everything
is flock-ed, O_DIRECT.  Formatting looks first, whatever the device is: mounts, swap, holders, what
libblkid finds, our own superblock, and any byte that is not zero in the first and last MiB.
`--force` skips the looking at contents, never the looking at use.

Failure modes: DeviceError, one line that says what is there and what to do.
"""

import errno
import fcntl
import mmap
import os
import shutil
import stat
import subprocess
from pathlib import Path

from millpond.cache import limits
from millpond.cache.chance import Chance
from millpond.cache.errors import CacheError, escaped
from millpond.native.engine import Engine, EngineOptions, FormatOptions, NativeError, format_device
from millpond.native.needs import direct_problem

EDGE_BYTES = limits.MIB
SUPER_MAGIC = b"MPNDSCP1"  # MP_CACHE_SUPER_MAGIC, little endian


class DeviceError(CacheError):
    """The device cannot be used."""


def open_locked(path: str) -> int:
    """A descriptor for us alone: O_DIRECT, O_EXCL when a block device, flock-ed."""
    flags = os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC
    try:
        if stat.S_ISBLK(os.stat(path).st_mode):
            flags |= os.O_EXCL
        descriptor = os.open(path, flags)
    except OSError as error:
        reason = direct_problem(path) if error.errno == errno.EINVAL else _reason(error)
        raise DeviceError(f"{escaped(path)}: {reason}") from None
    try:
        kind = os.fstat(descriptor).st_mode
        if not stat.S_ISBLK(kind) and not stat.S_ISREG(kind):
            raise DeviceError(f"{escaped(path)} is neither a file nor a block device")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DeviceError(f"{escaped(path)} is in use by another process") from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _reason(error: OSError) -> str:
    if error.errno == errno.EBUSY:  # from O_EXCL
        return "the device is mounted or in use"
    return os.strerror(error.errno) if error.errno else str(error)


def open_engine(path: str, options: EngineOptions) -> Engine:
    """Lock and recover a formatted device.  Blocks while it recovers."""
    descriptor = open_locked(path)
    try:
        return Engine.open(descriptor, options)
    except NativeError as error:
        raise DeviceError(f"{escaped(path)}: {error.args[1]}") from None


def format_cache(
    path: str,
    *,
    size_bytes: int | None,
    slot_bytes: int = limits.SLOT_BYTES,
    log_bytes: int | None = None,
    force: bool = False,
    chance: Chance,
) -> bytes:
    """Format a device, or a file (made when size_bytes is given); the new cache id.  Blocks."""
    check_slot_bytes(slot_bytes)
    if size_bytes is not None:
        check_device_bytes(path, size_bytes)
        check_log_bytes(log_bytes or limits.log_bytes_for(size_bytes), size_bytes)
        _make_file(path, size_bytes)
    refuse_when_used(path)
    descriptor = open_locked(path)
    try:
        device_bytes = os.lseek(descriptor, 0, os.SEEK_END) // 4096 * 4096
        check_device_bytes(path, device_bytes)
        log_bytes = log_bytes or limits.log_bytes_for(device_bytes)
        check_log_bytes(log_bytes, device_bytes)
        if not force:
            refuse_when_not_empty(path, descriptor, device_bytes)
    except BaseException:
        os.close(descriptor)
        raise
    cache_id = chance.new_id()
    options = FormatOptions(device_bytes, slot_bytes, log_bytes, cache_id)
    try:
        format_device(descriptor, options)
    except NativeError as error:
        raise DeviceError(f"cannot format {escaped(path)}: {error.args[1]}") from None
    return cache_id


def check_device_bytes(path: str, device_bytes: int) -> None:
    """Room for the smallest log, slots and two checkpoints."""
    if device_bytes < limits.CACHE_MIN_BYTES:
        raise DeviceError(
            f"{escaped(path)}: a cache of {device_bytes} bytes cannot be; it needs at least"
            f" {limits.CACHE_MIN_BYTES // limits.MIB} MiB"
        )


def check_slot_bytes(slot_bytes: int) -> None:
    """A power of two from 4 to 64 KiB."""
    power_of_two = slot_bytes & (slot_bytes - 1) == 0
    if not limits.SLOT_MIN_BYTES <= slot_bytes <= limits.SLOT_MAX_BYTES or not power_of_two:
        raise DeviceError(f"a slot of {slot_bytes} bytes cannot be; choose 4, 8, 16, 32 or 64 KiB")


def check_log_bytes(log_bytes: int, device_bytes: int) -> None:
    """The write log: at least LOG_MIN_BYTES, at most half of the device."""
    if not limits.LOG_MIN_BYTES <= log_bytes <= device_bytes // 2:
        raise DeviceError(
            f"a write log of {log_bytes} bytes cannot be; choose at least"
            f" {limits.LOG_MIN_BYTES // limits.MIB} MiB and at most half of the device"
            f" ({device_bytes // 2 // limits.MIB} MiB)"
        )


def _make_file(path: str, size_bytes: int) -> None:
    """Create a file of this size, all of it reserved; one that exists must have it already."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise DeviceError(f"--size is for files; {escaped(path)} is a device") from None
        if found.st_size != size_bytes:
            raise DeviceError(
                f"{escaped(path)} exists with {found.st_size} bytes, not {size_bytes}"
            ) from None
        return
    except OSError as error:
        raise DeviceError(f"cannot create {escaped(path)}: {_reason(error)}") from None
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
        os.fsync(descriptor)
        sync_directory(os.path.dirname(os.path.abspath(path)))
    except OSError as error:
        os.unlink(path)
        raise DeviceError(
            f"cannot reserve {size_bytes} bytes for {escaped(path)}: {_reason(error)}"
        ) from None
    finally:
        os.close(descriptor)


def sync_directory(path: str) -> None:
    """What was created in, or renamed within, a directory is durable after this."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_when_used(path: str, *, proc: Path = Path("/proc"), sysfs: Path = Path("/sys")) -> None:
    """Mounted, swapped on, or held by another device (LVM, MD, dm-crypt): never, force or not."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise DeviceError(f"{escaped(path)}: {_reason(error)}") from None
    real = os.path.realpath(path)
    if _is_swap(real, found, proc):
        raise DeviceError(f"{escaped(path)} is swap space in use")
    if not stat.S_ISBLK(found.st_mode):
        return
    numbers = _with_partitions(found.st_rdev, sysfs)
    for line in (proc / "self" / "mountinfo").read_text().splitlines():
        fields = line.split(" ")
        if fields[2] in numbers:
            raise DeviceError(f"{escaped(path)} is mounted at {escaped(fields[4])}; unmount it")
    for number in numbers:
        holders = sysfs / "dev" / "block" / number / "holders"
        held_by = sorted(os.listdir(holders)) if holders.is_dir() else []
        if held_by:
            raise DeviceError(f"{escaped(path)} is part of {escaped(held_by[0])}; release it first")


def _with_partitions(device: int, sysfs: Path) -> set[str]:
    """major:minor of a device and of its partitions."""
    number = f"{os.major(device)}:{os.minor(device)}"
    numbers = {number}
    directory = sysfs / "dev" / "block" / number
    if directory.is_dir():
        for child in directory.iterdir():
            if (child / "partition").exists() and (child / "dev").exists():
                numbers.add((child / "dev").read_text().strip())
    return numbers


def _is_swap(real: str, found: os.stat_result, proc: Path) -> bool:
    swaps = proc / "swaps"
    if not swaps.exists():
        return False
    for line in swaps.read_text().splitlines()[1:]:
        name = line.split()[0].encode().decode("unicode_escape")  # spaces are \040
        if name == real:
            return True
        if stat.S_ISBLK(found.st_mode) and os.path.exists(name):
            other = os.stat(name)
            if stat.S_ISBLK(other.st_mode) and other.st_rdev == found.st_rdev:
                return True
    return False


def refuse_when_not_empty(path: str, descriptor: int, device_bytes: int) -> None:
    """Anything that somebody may miss: a signature, or any byte in the first and last MiB."""
    first = _read_direct(descriptor, 0, EDGE_BYTES)
    if first.startswith(SUPER_MAGIC) or first[65536:].startswith(SUPER_MAGIC):
        raise DeviceError(f"{escaped(path)} holds a Millpond cache; --force destroys it")
    signature = _blkid(path)
    if signature:
        raise DeviceError(f"{escaped(path)} holds {escaped(signature)}; --force destroys it")
    if first[510:512] == b"\x55\xaa":
        raise DeviceError(f"{escaped(path)} holds a partition table; --force destroys it")
    last = _read_direct(descriptor, device_bytes - EDGE_BYTES, EDGE_BYTES)
    if any(first) or any(last):
        raise DeviceError(f"{escaped(path)} is not empty; --force destroys what it holds")


def _read_direct(descriptor: int, offset_bytes: int, length_bytes: int) -> bytes:
    """Read through O_DIRECT: the buffer has to be aligned, so it is a mapping."""
    with mmap.mmap(-1, length_bytes) as buffer:
        count = os.preadv(descriptor, [buffer], offset_bytes)
        return buffer[:count]


def _blkid(path: str) -> str:
    """What libblkid finds: "TYPE" or "partition table TYPE", or nothing (or no blkid here)."""
    program = shutil.which("blkid", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if program is None:
        return ""
    result = subprocess.run(
        [program, "-p", "-o", "export", "--", path],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=60,
    )
    if result.returncode == 2:  # nothing found
        return ""
    tags = dict(
        line.split("=", 1)
        for line in result.stdout.decode("utf-8", "replace").splitlines()
        if "=" in line
    )
    if result.returncode not in (0, 8) or not tags:
        return "something that blkid cannot tell" if result.returncode == 8 else ""
    if "PTTYPE" in tags:
        return f"partition table {tags['PTTYPE']}"
    return tags.get("TYPE", "an unknown signature")
