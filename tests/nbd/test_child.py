"""Calls in a process of their own: what they say, and that they have nothing of ours.

That a process can be killed while one of them waits for its device is shown in tests/kernel.
"""

import errno
import os
import socket
import threading
from pathlib import Path

import pytest

from millpond.cache.errors import CacheError, VolumeBusy
from millpond.nbd import sysfs as sysfs_module
from millpond.nbd.child import OPEN, SYNC, StepFailed, hold, put
from millpond.nbd.sysfs import Sysfs, exclusive


def test_held_until_the_block_ends(tmp_path: Path) -> None:
    device = tmp_path / "device"
    device.write_bytes(b"")

    def holders() -> list[str]:
        links = Path("/proc").glob("[0-9]*/fd/*")
        return [str(each) for each in links if _target(each) == str(device)]

    with hold(str(device)):
        assert len(holders()) == 1 and f"/{os.getpid()}/" not in holders()[0]
    assert not holders()


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def test_what_waits_has_no_descriptor_of_ours(tmp_path: Path) -> None:
    device = tmp_path / "fifo"  # to open it waits, as for a device that does not answer
    os.mkfifo(device)
    ours, kernels = socket.socketpair()

    def wait() -> None:
        with pytest.raises(StepFailed), hold(str(device)):  # no FIFO is written back
            pass

    thread = threading.Thread(target=wait)
    thread.start()
    children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    while not any(each.read_text() for each in children):
        children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    ours.close()
    kernels.settimeout(10)
    assert kernels.recv(1) == b"", "the child keeps a connection alive"
    with device.open("wb"):
        thread.join(10)
    kernels.close()


def test_device_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(StepFailed) as failed, hold(str(tmp_path / "nothing")):
        pass
    assert (failed.value.step, failed.value.code) == (OPEN, errno.ENOENT)


@pytest.mark.parametrize(
    ("failure", "kind", "says"),
    [
        (StepFailed(OPEN, errno.EBUSY), VolumeBusy, "/dev/nbd0 is in use"),
        (StepFailed(OPEN, errno.EIO), CacheError, "cannot open .*: Input/output error"),
        (StepFailed(SYNC, errno.EIO), CacheError, "cannot be written back: .*--force loses"),
    ],
)
def test_refusals_of_a_device(
    failure: StepFailed, kind: type[CacheError], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> None:
        raise failure

    monkeypatch.setattr(sysfs_module, "hold", refuse)
    with pytest.raises(CacheError, match=says) as refused, exclusive(Sysfs(), 0):
        pass
    assert type(refused.value) is kind


def test_values_are_written_and_what_cannot_be_is_left(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    put([(str(one), "1"), (str(tmp_path / "no" / "such"), "x"), (str(two), "a b")])
    assert (one.read_text(), two.read_text()) == ("1", "a b")
    put([])
