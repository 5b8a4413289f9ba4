"""libvirt's hook, driven as libvirt does: arguments, and a domain's XML on standard input."""

import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlserver import PlayedCache, id_of
from millpond.cli.hook import Disk, disks_of, volume_of
from millpond.cli.main import main
from millpond.cli.run import BUSY, FAILED, NOT_FOUND, OK, UNREACHABLE, USAGE, CommandError
from millpond.nbd.devicelinks import link_name
from millpond.store.catalogue import check_name
from millpond.store.errors import StoreError
from millpondprocess import environment

DOMAINS = Path(__file__).with_name("domains")
SCRIPT = Path(__file__).resolve().parents[2] / "cli" / "system" / "50-millpond"
ROOT, SHARED = "web-root", "shared & old"


class Host:
    """The hook as it is installed, with a played cache."""

    def __init__(self, directory: Path, cache: PlayedCache) -> None:
        self.cache = cache
        self.marks = directory / "guests"
        millpond = directory / "millpond"
        millpond.write_text(
            f'#!/bin/sh\nexec {sys.executable} -m millpond.cli.main "$@" --marks {self.marks}\n'
        )
        millpond.chmod(0o755)
        self.script = directory / "50-millpond"
        text = SCRIPT.read_text().replace("@COMMAND@", str(millpond))
        self.script.write_text(text.replace("/run/millpond/guests", str(self.marks)))
        self.script.chmod(0o755)

    def call(
        self, guest: str, *operation: str, domain: str = "two-volumes"
    ) -> "subprocess.CompletedProcess[bytes]":
        """As libvirt calls it; nothing may come on stdout, which libvirt could take for XML."""
        done = subprocess.run(
            [str(self.script), guest, *operation],
            input=(DOMAINS / f"{domain}.xml").read_bytes(),
            capture_output=True,
            timeout=60,
            env=environment() | {"MILLPOND_CONTROL": str(self.cache.path)},
        )
        assert done.stdout == b"" and done.stderr.count(b"\n") <= 1
        return done

    def within(self, guest: str, *operation: str, domain: bytes = b"") -> tuple[int, str]:
        """The same without the script and a process: code, and what came on stderr."""
        place = ["--control", str(self.cache.path), "--marks", str(self.marks)]
        trouble = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stderr(trouble):
            domain = domain or (DOMAINS / "two-volumes.xml").read_bytes()
            patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(domain)))
            code = main(["hook", guest, *operation, *place])
        return code, trouble.getvalue()

    def prepare(self, guest: str) -> int:
        """It starts."""
        return self.within(guest, "prepare", "begin", "-")[0]

    def release(self, guest: str) -> int:
        """It is gone."""
        return self.within(guest, "release", "end", "shutdown")[0]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with PlayedCache(tmp_path / "control") as cache:
        cache.volumes = {ROOT, SHARED, "web-data"}
        yield Host(tmp_path, cache)


def test_disks_of_recorded_domains() -> None:
    found = disks_of((DOMAINS / "two-volumes.xml").read_bytes())
    assert found == [Disk(ROOT, False), Disk(SHARED, True)]
    assert disks_of((DOMAINS / "no-volume.xml").read_bytes()) == []


def test_sources_in_backing_chains_and_odd_paths() -> None:
    disk = "<disk><source dev='{}'/><backingStore><source file='{}'/></backingStore></disk>"
    text = f"<domain><devices>{disk}</devices></domain>"
    chain = text.format("/dev/vg0/x", "/dev/millpond/base").encode()
    assert disks_of(chain) == [Disk("base", False)]
    odd = text.format("/dev/millpond/", "/dev/millpond/../sda").encode()
    assert disks_of(odd) == []


@given(st.text(min_size=1, max_size=60))
def test_link_tells_the_volume(name: str) -> None:
    try:
        check_name(name)
    except StoreError:
        return
    link = link_name(name, bytes(16))
    assert volume_of(link) == name or link == bytes(16).hex(), "too long: its id"


def test_xml_that_cannot_be_read() -> None:
    for data in (b"", b"<domain>", b"\xff\xfe", b"<domain>&nothing;</domain>"):
        with pytest.raises(CommandError) as caught:
            disks_of(data)
        assert caught.value.exit_code == USAGE


def test_volumes_come_before_the_guest_and_go_after_it(host: Host) -> None:
    assert host.call("web", "prepare", "begin", "-").returncode == OK
    assert set(host.cache.devices) == {ROOT, SHARED}, "what qemu reaches over NBD needs no device"
    assert host.cache.devices[SHARED]["read_only"] and not host.cache.devices[ROOT]["read_only"]
    for operation in (("start", "begin", "-"), ("started", "begin", "-"), ("stopped", "end", "-")):
        assert host.call("web", *operation).returncode == OK
    assert set(host.cache.devices) == {ROOT, SHARED}
    assert host.call("web", "release", "end", "shutdown").returncode == OK
    assert host.cache.devices == {}
    assert host.release("web") == OK, "again"


def test_volume_whose_name_is_too_long_for_a_link(host: Host) -> None:
    """The link, and so the guest's XML, has its id."""
    name = "ü" * 120
    host.cache.volumes.add(name)
    link = link_name(name, bytes.fromhex(id_of(name)))
    domain = (
        f"<domain><devices><disk><source dev='/dev/millpond/{link}'/></disk></devices></domain>"
    )
    assert host.within("long", "prepare", "begin", "-", domain=domain.encode()) == (OK, "")
    assert set(host.cache.devices) == {name}
    assert host.within("copy", "prepare", "begin", "-", domain=domain.encode()) == (OK, "")
    assert host.cache.ops("attach") == [id_of(name)]
    assert host.release("copy") == OK and set(host.cache.devices) == {name}
    assert host.release("long") == OK
    assert host.cache.devices == {}


def test_guest_without_a_volume_and_other_operations_ask_nobody(host: Host) -> None:
    for operation in (("prepare", "begin", "-"), ("release", "end", "-")):
        assert host.call("plain", *operation, domain="no-volume").returncode == OK
    for operation in (("migrate", "begin", "-"), ("reconnect", "begin", "-")):
        assert host.call("web", *operation).returncode == OK
    assert host.cache.asked == []


def test_volume_that_cannot_be_attached_stops_the_start(host: Host) -> None:
    host.cache.volumes.remove(SHARED)
    done = host.call("web", "prepare", "begin", "-")
    assert done.returncode == NOT_FOUND
    assert done.stderr == f"millpond: error: no volume '{SHARED}'\n".encode()
    assert host.release("web") == OK, "as libvirt does after a start that failed"
    assert host.cache.devices == {}


def test_guest_that_could_not_start_leaves_the_other_its_disk(host: Host) -> None:
    assert host.prepare("web") == OK
    assert host.prepare("copy-of-web") == OK  # qemu then finds the disk locked
    assert host.release("copy-of-web") == OK
    assert set(host.cache.devices) == {ROOT, SHARED}
    assert host.release("web") == OK
    assert host.cache.devices == {}


def test_what_the_operator_attached_stays(host: Host) -> None:
    host.cache.answer({"op": "attach", "volume": ROOT})
    assert host.prepare("web") == OK
    assert host.release("web") == OK
    assert set(host.cache.devices) == {ROOT}


def test_device_that_is_looked_at_for_a_moment_is_waited_for(host: Host) -> None:
    assert host.prepare("web") == OK
    host.cache.refuse[ROOT] = ("E_BUSY", 2)
    assert host.release("web") == OK
    assert host.cache.devices == {} and host.cache.ops("detach").count(ROOT) == 3


def test_device_in_use_is_told_and_the_others_go(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mark stays, so that the next release finds it."""
    monkeypatch.setattr("millpond.cli.hook.TRY_AGAIN_S", 1.2)
    assert host.prepare("web") == OK
    host.cache.refuse[ROOT] = ("E_BUSY", 10_000)
    code, trouble = host.within("web", "release", "end", "destroyed")
    assert code == BUSY and "'web-root' is mounted" in trouble
    assert set(host.cache.devices) == {ROOT}
    host.cache.refuse.clear()
    assert host.release("web") == OK
    assert host.cache.devices == {}


def test_disk_that_was_unplugged_goes_with_its_guest(host: Host) -> None:
    """The XML at release does not name it any more; other guests' ends are not its own."""
    assert host.call("web", "prepare", "begin", "-").returncode == OK
    for guest, left in (("plain", {ROOT, SHARED}), ("web", set())):
        done = host.call(guest, "release", "end", "shutdown", domain="no-volume")
        assert done.returncode == OK and set(host.cache.devices) == left
    asked = len(host.cache.asked)
    assert host.call("plain", "release", "end", "-", domain="no-volume").returncode == OK
    assert len(host.cache.asked) == asked, "without a mark nobody is asked"


def test_hook_that_dies_while_it_attaches_leaves_no_device_behind(host: Host) -> None:
    """Or the answer is lost: the cache has attached, and nobody was told."""

    def die() -> None:
        raise OSError("the hook is killed")

    host.cache.after_attach = die
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("millpond.cli.hook.TRY_AGAIN_S", 0.0)
        patch.setattr("millpond.cli.map.attached", lambda control, volume: nobody())
        assert host.prepare("web") == UNREACHABLE
    assert set(host.cache.devices) == {ROOT}
    host.cache.after_attach = lambda: None
    assert host.release("web") == OK
    assert host.cache.devices == {}


async def nobody() -> None:
    """What a hook that was killed hears of its device."""


def test_device_that_is_read_only_is_no_disk_for_a_guest_that_writes(host: Host) -> None:
    host.cache.answer({"op": "attach", "volume": SHARED, "read_only": True})
    assert host.prepare("web") == OK, "read-only for the guest, too"
    assert host.release("web") == OK
    host.cache.answer({"op": "attach", "volume": ROOT, "read_only": True})
    code, trouble = host.within("web", "prepare", "begin", "-")
    assert code == BUSY and "'web-root' is attached read-only as /dev/nbd" in trouble
    host.cache.answer({"op": "detach", "volume": ROOT})
    host.cache.read_only = True
    code, trouble = host.within("web", "prepare", "begin", "-")
    assert code == BUSY and "read-only" in trouble, "all of the cache"
    assert host.release("web") == OK
    assert set(host.cache.devices) == {SHARED}, "the operator's"


def test_cache_that_is_away_for_a_moment_is_waited_for(host: Host) -> None:
    host.cache.refuse[ROOT] = ("E_UNREACHABLE", 3)
    assert host.prepare("web") == OK
    assert host.cache.ops("attach") == [ROOT, ROOT, ROOT, ROOT, SHARED]


@pytest.mark.parametrize("limit", ["TRY_AGAIN_S", "BUDGET_S"])
def test_waiting_for_the_cache_ends(
    host: Host, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one volume, and of all together."""
    monkeypatch.setattr(f"millpond.cli.hook.{limit}", 1.2)
    host.cache.refuse[ROOT] = ("E_UNREACHABLE", 10_000)
    code, trouble = host.within("web", "prepare", "begin", "-")
    assert code == UNREACHABLE and trouble.count("\n") == 1
    assert ("volume 'web-root'" if limit == "TRY_AGAIN_S" else "guest 'web'") in trouble


def test_guests_that_start_side_by_side_attach_once(host: Host) -> None:
    codes: list[int] = []

    def start(guest: str) -> int:
        return host.call(guest, "prepare", "begin", "-").returncode

    guests = [f"guest{number}" for number in range(4)]
    threads = [
        threading.Thread(target=lambda name=name: codes.append(start(name))) for name in guests
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [OK] * 4 and host.cache.ops("attach") == [ROOT, SHARED]
    for number, guest in enumerate(guests):
        assert set(host.cache.devices) == {ROOT, SHARED}, f"before release of {number}"
        assert host.release(guest) == OK
    assert host.cache.devices == {}


def test_marks_that_cannot_be_kept_stop_the_start(host: Host) -> None:
    host.marks.write_text("not a folder")
    code, trouble = host.within("web", "prepare", "begin", "-")
    assert code == FAILED and "cannot keep marks of guests" in trouble
    assert host.cache.devices == {}
