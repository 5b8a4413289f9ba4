"""In a guest that boots Debian: what has to be true at this boot; then it ends the boot.

Started by proof.service with the standard library alone: Millpond's own command takes seconds to
start in an emulated guest, so the control socket is asked directly.  Says "GUEST word key=value" on
the serial console; a failure is "GUEST failed ..." and the power goes off.
"""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTROL = "/run/millpond/control.sock"
PLACE = Path("/srv/data")
MAP = "millpond-map.service"
UNITS = (
    *("millpond-store.service", "millpond-cache.service", "millpond-cache.socket"),
    *(MAP, "millpond-unmap.service", "srv-data.mount"),
)
TAB = Path("/etc/millpond/tab")
FILES, FILE_BYTES = 24, 1 << 20
WRONG = r"I/O error|EXT4-fs.*(error|warning)|blocked for more than|BUG:|Traceback|JBD2.*rror"
LIMIT_S = 240


def say(word: str, **values: object) -> None:
    """One line on the console, in one write."""
    at = f"{time.clock_gettime(time.CLOCK_BOOTTIME):.0f}"
    pairs = {**values, "at": at}
    line = " ".join([f"GUEST {word}", *(f"{key}={value}" for key, value in pairs.items())])
    with open("/dev/ttyS0", "w") as console:
        console.write(f"\n{line}\n")


def sh(*command: str, ok: int | None = 0) -> str:
    """A command's output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert ok is None or done.returncode == ok, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def ask(op: str, **arguments: object) -> dict[str, Any]:
    """The cache's answer."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(CONTROL)
        sock.sendall(json.dumps({"op": op, **arguments}).encode() + b"\n")
        answer = json.loads(sock.makefile().readline())
    assert answer.pop("ok"), answer
    return dict(answer)


def volume() -> dict[str, Any]:
    """What the cache says of ours."""
    (found,) = (each for each in ask("volumes")["volumes"] if each["name"] == "data")
    return dict(found)


def wait_until(what: str, true: Callable[[], bool]) -> None:
    """Poll; what it was about when it never comes."""
    begin = time.perf_counter()
    while not true():
        assert time.perf_counter() - begin < LIMIT_S, f"never: {what}"
        time.sleep(0.5)


def content(name: str, number: int) -> bytes:
    """The bytes of a file, from its name alone; they do not compress."""
    seed = f"{name}/{number}".encode()
    blocks = (
        hashlib.sha512(seed + index.to_bytes(4)).digest() for index in range(FILE_BYTES // 64)
    )
    return b"".join(blocks)


def write(name: str) -> None:
    """Files and folders, synced."""
    (PLACE / name).mkdir()
    for number in range(FILES):
        with open(PLACE / name / str(number), "wb") as file:
            file.write(content(name, number))
            file.flush()
            os.fsync(file.fileno())
    sh("sync", "-f", str(PLACE))


def verify(name: str) -> None:
    """Every byte of them is there."""
    for number in range(FILES):
        assert (PLACE / name / str(number)).read_bytes() == content(name, number), (name, number)
    say("verified", what=name, files=FILES)


def check_boot() -> None:
    """All our units run, nothing has failed, and the volume is where fstab wants it.

    But for the unit that attaches, if the tab names a volume that cannot be.
    """
    fails = {MAP} if "gone" in TAB.read_text() else set()
    for unit in UNITS:
        state = sh("systemctl", "is-active", unit, ok=None).strip()
        wanted = "failed" if unit in fails else "active"
        assert state == wanted, f"{unit} is {state}\n{sh('journalctl', '-b', '-u', unit)}"
    failed = sh("systemctl", "--failed", "--no-legend", "--plain")
    assert {line.split()[0] for line in failed.splitlines()} == fails, failed
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    (device,) = (fields[0] for fields in mounts if fields[1] == str(PLACE))
    assert os.path.realpath("/dev/millpond/data") == os.path.realpath(device), device
    check_udev(os.path.realpath(device))
    ours = sh("journalctl", "-b", "-q", "--no-pager", "-u", "millpond-cache.service")
    assert "not protected from memory shortage" not in ours, ours
    say("booted", device=device)


def check_udev(device: str) -> None:
    """Our rule gave it its names; nobody has looked at what is on it, or will."""
    lines = sh("udevadm", "info", "--query=property", device).splitlines()
    values = dict(line.partition("=")[::2] for line in lines)
    links = values["DEVLINKS"].split()
    assert values["MILLPOND_NAME"] == "data" and "/dev/millpond/data" in links, values
    assert any(link.startswith("/dev/disk/by-id/millpond-") for link in links), links
    assert values["UDISKS_IGNORE"] == "1" and "ID_FS_TYPE" not in values, values
    number = os.stat(device).st_rdev
    watched = os.listdir("/run/udev/watch")
    assert watched and f"b{os.major(number)}:{os.minor(number)}" not in watched, watched


def check_journal(boot: str) -> list[str]:
    """No I/O error, no complaint of the file system, no traceback of ours."""
    lines = sh("journalctl", "-b", boot, "-q", "--no-pager").splitlines()
    wrong = [line for line in lines if re.search(WRONG, line)]
    assert not wrong, "\n".join(wrong[:20])
    say("journal", boot=boot, lines=len(lines), wrong=len(wrong))
    return lines


def check_shutdown(lines: list[str]) -> None:
    """File system first, then the device, then the cache; although the unit of map had failed."""
    order = [
        r"Unmounted srv-data.mount",
        r"detached volume=data",
        r"Stopped millpond-unmap",
        r"Stopped millpond-cache.service",
    ]
    at = []
    for pattern in order:
        found = [index for index, line in enumerate(lines) if re.search(pattern, line)]
        assert found, f"the journal of the last boot has no {pattern!r}"
        at.append(found[-1])
    assert at == sorted(at), list(zip(order, at, strict=True))
    say("shutdown", order="mount,device,cache")


def resumed() -> None:
    """What was dirty before is shipped on, by itself."""
    before = volume()
    assert before["dirty_bytes"] > 0, "nothing was left to ship: the test shows nothing"
    begin = before["destaged_sequence"]
    wait_until("destage resumes", lambda: volume()["destaged_sequence"] > begin)
    say("resumed", dirty_bytes=before["dirty_bytes"])


def first() -> None:
    """One volume of two was there: write to it, and reboot while the log is dirty."""
    write("one")
    dirty = volume()["dirty_bytes"]
    assert dirty > 0
    TAB.write_text("data -\n")
    say("ending", dirty_bytes=dirty)
    sh("systemctl", "reboot")


def second() -> None:
    """All is there after a reboot; write, and wait for the power to go."""
    check_shutdown(check_journal("-1"))
    verify("one")
    resumed()
    write("two")
    dirty = volume()["dirty_bytes"]
    assert dirty > 0
    sh("sync")
    say("written", dirty_bytes=dirty)
    time.sleep(3600)


def third() -> None:
    """All is there after that, too; the cache restarts under load; at last all is shipped."""
    verify("one")
    verify("two")
    resumed()
    under_load("restart", lambda: sh("systemctl", "restart", "millpond-cache.service"))
    ours = sh("journalctl", "-b", "-q", "--no-pager", "-u", "millpond-cache.service")
    assert "kernel device goes on" in ours, "its connection was not kept\n" + ours
    under_load("kill", lambda: sh("systemctl", "kill", "-s", "KILL", "millpond-cache.service"))
    ask("flush", volume="data", now=True)
    wait_until("all is shipped", lambda: volume()["dirty_bytes"] == 0)
    check_boot()
    sh("systemctl", "stop", "srv-data.mount", MAP)  # by hand, where it has not failed
    wait_until("millpond-unmap is stopped, too", lambda: not ask("devices")["devices"])
    wait_until("its link is gone", lambda: not os.path.lexists("/dev/millpond/data"))
    check_journal("0")
    say("shipped")
    sh("systemctl", "poweroff")


def under_load(what: str, work: Callable[[], object]) -> None:
    """Writes go on through it: a pause, no error."""
    longest, stop = [0.0], threading.Event()
    trouble: list[OSError] = []

    def load() -> None:
        number = 0
        try:
            while not stop.is_set():
                begin, number = time.perf_counter(), number + 1
                with open(PLACE / what, "r+b" if number > 1 else "wb") as file:
                    file.write(content(what, number)[:65536])
                    file.flush()
                    os.fsync(file.fileno())
                longest[0] = max(longest[0], time.perf_counter() - begin)
        except OSError as error:
            trouble.append(error)

    old = sh("systemctl", "show", "-P", "MainPID", "millpond-cache.service").strip()
    thread = threading.Thread(target=load)
    thread.start()
    time.sleep(2)
    work()

    def back() -> bool:
        pid = sh("systemctl", "show", "-P", "MainPID", "millpond-cache.service").strip()
        state = sh("systemctl", "is-active", "millpond-cache.service", ok=None).strip()
        return state == "active" and pid not in ("0", old)

    wait_until(f"the cache is back after {what}", back)
    time.sleep(2)
    stop.set()
    thread.join(LIMIT_S)
    assert not thread.is_alive() and not trouble, (what, trouble)
    say("pause", of=what, seconds=f"{longest[0]:.1f}")


def main() -> None:
    """The part of this boot."""
    (phase,) = re.findall(r"millpond\.boot=(\w+)", Path("/proc/cmdline").read_text())
    try:
        check_boot()
        {"first": first, "second": second, "third": third}[phase]()
    except BaseException:
        say("failed", phase=phase)
        with open("/dev/ttyS0", "w") as console:
            console.write(traceback.format_exc())
            console.write(sh("journalctl", "-b", "-q", "--no-pager", "-n", "150", ok=None))
        sh("systemctl", "poweroff", "--force", "--force")
        sys.exit(1)


if __name__ == "__main__":
    main()
