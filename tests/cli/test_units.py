"""The systemd units: nothing to complain about, hardened, and in the order that guests need."""

import configparser
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from millpond.cli.notify import DESCRIPTORS_MAX
from millpond.nbd.limits import NbdLimits

SYSTEM = Path(__file__).resolve().parents[2] / "cli" / "system"
UNITS = sorted([*SYSTEM.glob("*.service"), *SYSTEM.glob("*.socket")])
SERVICES = [path.name for path in UNITS if path.suffix == ".service"]
EXPOSURE_MAX = 4.0


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """All of them as they are installed, but for a command that exists everywhere."""
    for path in UNITS:
        text = path.read_text()
        commands = re.findall(r"^Exec\w+=(\S+)", text, re.MULTILINE)
        assert set(commands) <= {"@COMMAND@", "/usr/bin/qemu-storage-daemon"}
        (tmp_path / path.name).write_text(text.replace("@COMMAND@", "/bin/true"))
    return tmp_path


def analyze(units: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["systemd-analyze", *arguments], cwd=units, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def started(name: str) -> str:
    """A template needs an instance; systemd finds it beside the template."""
    return name.replace("@.", "@web1.")


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # keys have capitals
    parser.read(SYSTEM / name)
    return parser


def test_verify_says_nothing(units: Path) -> None:
    assert analyze(units, "verify", *(f"./{started(path.name)}" for path in UNITS)) == ""


def test_verify_complains_of_a_key_that_does_not_exist(units: Path) -> None:
    """That it said nothing above means something."""
    path = units / "millpond-cache.service"
    path.write_text(path.read_text().replace("WatchdogSec=", "WatchdgoSec="))
    assert "WatchdgoSec" in analyze(units, "verify", f"./{path.name}")


@pytest.mark.parametrize("name", SERVICES)
def test_exposure_is_bounded(
    name: str, units: Path, record_property: Callable[[str, object], None]
) -> None:
    shown = analyze(
        units,
        *("security", "--offline=true", f"--threshold={EXPOSURE_MAX * 10:.0f}"),
        f"./{started(name)}",
    )
    found = re.search(r"exposure level for \S+: ([\d.]+)", shown)
    assert found is not None and float(found[1]) <= EXPOSURE_MAX
    record_property("figure", f"{name} {found[1]}")


@pytest.mark.parametrize("name", [f"millpond-{name}.service" for name in ("cache", "map", "unmap")])
def test_guests_and_their_file_systems_come_later_and_go_first(name: str) -> None:
    later = set(unit(name)["Unit"]["Before"].split())
    assert later >= {
        *("remote-fs-pre.target", "libvirtd.service", "virtqemud.service"),
        "libvirt-guests.service",
    }
    assert "remote-fs-pre.target" in unit(name)["Unit"]["Wants"], "a target that somebody pulls in"


def test_restart_of_the_cache_leaves_devices_where_they_are() -> None:
    """Requires= or BindsTo= would hand its restart on to the unit that detaches."""
    section = unit("millpond-map.service")["Unit"]
    assert "millpond-cache.service" in section["Wants"] and "Requires" not in section
    assert "millpond-cache.service" in section["After"]


def test_what_was_attached_is_detached_also_when_the_unit_of_map_has_failed() -> None:
    """One volume of the tab is missing: ExecStop= of a unit that failed to start is never run, and
    ExecStopPost= is run at once, before anything is mounted."""
    attaching, detaching = unit("millpond-map.service"), unit("millpond-unmap.service")
    assert not [key for key in attaching["Service"] if key.startswith("ExecStop")]
    assert detaching["Service"]["ExecStop"] == "@COMMAND@ unmap --all"
    assert detaching["Service"]["RemainAfterExit"] == "yes"
    assert detaching["Unit"]["PartOf"] == "millpond-map.service"
    for key in ("Wants", "After"):
        assert "millpond-unmap.service" in attaching["Unit"][key]


def test_mount_outlives_a_volume_of_another() -> None:
    for name in ("tab", "millpond-map.service"):
        text = (SYSTEM / name).read_text()
        assert "x-systemd.after=millpond-map.service" in text and "systemd.requires=" not in text


def test_cache_waits_for_nothing_that_it_serves() -> None:
    service = unit("millpond-cache.service")["Service"]
    assert service["OOMScoreAdjust"] == "-1000" and service["LimitMEMLOCK"] == "infinity"
    assert "MemoryMax" not in service and "MemoryHigh" not in service
    capabilities = set(service["CapabilityBoundingSet"].split())
    assert capabilities >= {"CAP_SYS_ADMIN", "CAP_IPC_LOCK", "CAP_SYS_RESOURCE"}


def test_socket_outlives_the_daemon_and_is_found_by_its_name() -> None:
    assert unit("millpond-cache.socket")["Socket"]["FileDescriptorName"] == "nbd"
    assert "millpond-cache.socket" in unit("millpond-cache.service")["Unit"]["Requires"]
    assert unit("millpond-cache.service")["Service"]["RuntimeDirectoryPreserve"] == "yes"


def test_manager_keeps_all_connections_that_guests_may_have() -> None:
    service = unit("millpond-cache.service")["Service"]
    kept, files = int(service["FileDescriptorStoreMax"]), int(service["LimitNOFILE"])
    assert NbdLimits().connections_max + 1 < kept, "and a description, and kernel devices"
    assert kept < DESCRIPTORS_MAX <= files


def test_stop_over_vhost_user_does_not_wait_for_a_cache_that_is_away() -> None:
    """As qemu-storage-daemon does, for all of its reconnect-delay."""
    assert unit("millpond-vhost-user@.service")["Service"]["TimeoutStopSec"] == "30s"


def test_next_process_does_not_wait_for_children_that_wait_for_it() -> None:
    assert unit("millpond-cache.service")["Service"]["KillMode"] == "process"


def test_store_is_nobody_special() -> None:
    service = unit("millpond-store.service")["Service"]
    assert service["User"] == "millpond" and service["CapabilityBoundingSet"] == ""
    assert "u millpond " in (SYSTEM / "millpond.sysusers").read_text()
