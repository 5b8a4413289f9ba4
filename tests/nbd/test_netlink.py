"""Netlink over a played library: how many messages at a time, and what becomes of its exceptions.

What a real kernel says is in tests/kernel.
"""

import errno
import threading
import time
from types import TracebackType
from typing import Any

import pytest
from pyroute2.netlink.exceptions import NetlinkError

from millpond.cache.errors import CacheError, NotPermitted, VolumeBusy
from millpond.nbd import netlink
from millpond.nbd.netlink import refusal


class PlayedSocket:
    """Of pyroute2: it counts those that are open, or breaks."""

    prid = 1
    most = now = 0
    breaks: Exception | None = None
    lock = threading.Lock()

    def __enter__(self) -> "PlayedSocket":
        kind = type(self)
        with kind.lock:
            kind.now += 1
            kind.most = max(kind.most, kind.now)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        with self.lock:
            type(self).now -= 1

    def bind(self, family: str, kind: Any) -> None:
        if self.breaks is not None:
            raise self.breaks

    def nlm_request(self, message: Any, **_: Any) -> list[Any]:
        time.sleep(0.01)
        return []


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> type[PlayedSocket]:
    """In the place of pyroute2's."""

    class Fresh(PlayedSocket):
        lock = threading.Lock()

    monkeypatch.setattr("pyroute2.netlink.generic.GenericNetlinkSocket", Fresh)
    return Fresh


def test_many_devices_are_taken_up_at_once(library: type[PlayedSocket]) -> None:
    threads = [threading.Thread(target=netlink.disconnect, args=(each,)) for each in range(250)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= library.most <= netlink.AT_A_TIME


def test_driver_is_not_loaded(library: type[PlayedSocket]) -> None:
    library.breaks = NetlinkError(errno.ENOENT, "No such file or directory")
    with pytest.raises(CacheError, match="^this kernel has no NBD driver loaded: modprobe nbd$"):
        netlink.disconnect(3)


def test_library_fails_in_a_way_of_its_own(library: type[PlayedSocket]) -> None:
    library.breaks = KeyError("no free address available")
    with pytest.raises(CacheError, match="/dev/nbd3: KeyError: 'no free address available'"):
        netlink.disconnect(3)
    assert library.now == 0


@pytest.mark.parametrize(
    ("code", "binding", "kind", "says"),
    [
        (errno.ENOENT, True, CacheError, "modprobe nbd"),
        (errno.EPERM, False, NotPermitted, "CAP_SYS_ADMIN"),
        (errno.EPERM, True, NotPermitted, "CAP_SYS_ADMIN"),
        (errno.EBUSY, False, VolumeBusy, "/dev/nbd4 is in use"),
        (-errno.EINVAL, False, CacheError, "Invalid argument"),
    ],
)
def test_kernel_says_no(code: int, binding: bool, kind: type[CacheError], says: str) -> None:
    error = refusal(code, "/dev/nbd4", binding=binding)
    assert type(error) is kind and says in str(error)
