"""What the C core needs of a machine, each as one line that says what is needed and what was found.

Rules: nothing here raises or changes anything; an empty answer means that it is there.
"""

import errno
import os
import re

# IOCB_CMD_FDSYNC, the sync that does not take the engine thread's time.
KERNEL_MIN = (4, 18)


def kernel_problem(release: str) -> str:
    """Is the kernel of this release (as uname -r says it) too old?"""
    found = re.match(r"(\d+)\.(\d+)", release)
    if found is None or (int(found[1]), int(found[2])) >= KERNEL_MIN:
        return ""
    need = ".".join(str(number) for number in KERNEL_MIN)
    return f"Linux {need} or newer is needed, found {release}"


def direct_problem(path: str, *, mounts: str = "/proc/self/mountinfo") -> str:
    """The line for a file system that refused O_DIRECT."""
    return (
        f"O_DIRECT is needed, and {_file_system(os.path.realpath(path), mounts)} does not have it;"
        " use ext4, XFS or a block device"
    )


def directory_problem(directory: str) -> str:
    """Can files in this directory be opened O_DIRECT?  Where that cannot be asked: yes."""
    try:
        descriptor = os.open(
            directory, os.O_TMPFILE | os.O_DIRECT | os.O_RDWR | os.O_CLOEXEC, 0o600
        )
    except OSError as error:
        return direct_problem(directory) if error.errno == errno.EINVAL else ""
    os.close(descriptor)
    return ""


def _file_system(path: str, mounts: str) -> str:
    """The type and the mount point of what path is on."""
    best, kind = "", "its file system"
    try:
        with open(mounts) as file:
            lines = file.read().splitlines()
    except OSError:
        return kind
    for line in lines:
        fields = line.split(" ")
        point = fields[4].encode().decode("unicode_escape")  # spaces are \040
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best) and "-" in fields:
            best, kind = point, fields[fields.index("-") + 1]
    return f"{kind} at {best}" if best else kind
