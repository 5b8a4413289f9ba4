"""Kernel devices in a guest with a real kernel; what happens there is in inside/NAME.py."""

from collections.abc import Callable

import pytest

from kernel.guest import Console, Guests


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory) -> Guests:
    """Kernel and first file system, made once."""
    return Guests(tmp_path_factory.mktemp("guest"))


Record = Callable[[str, object], None]


def show(console: Console, record_property: Record) -> None:
    """Its figures, and no complaint of the kernel's."""
    assert not console.kernel_complaints()
    for figure in console.figures:
        record_property("figure", figure)


def test_file_systems_and_verified_load_on_an_attached_volume(
    guests: Guests, record_property: Record
) -> None:
    """ext4 and XFS: mkfs, mount, fio, fstrim, check; and nothing is left after detach."""
    show(guests.run("basics.py"), record_property)


def test_daemon_is_killed_ten_times_under_two_devices_with_load(
    guests: Guests, record_property: Record
) -> None:
    """Guests see pauses: no error, no wrong byte."""
    show(guests.run("restart.py", "10"), record_property)


@pytest.mark.long
def test_mistakes_are_one_line_and_leave_nothing(guests: Guests, record_property: Record) -> None:
    """No module, no right, busy, unknown, mounted, open, lost; nbd-client; growth."""
    show(guests.run("mistakes.py", without="nbd"), record_property)


def test_four_times_the_memory_through_the_page_cache(
    guests: Guests, record_property: Record
) -> None:
    """512 MiB of memory, 2 GiB written: no deadlock."""
    show(guests.run("pressure.py", "2048", memory_mib=512), record_property)


@pytest.mark.long
def test_pause_is_the_start_of_the_command_and_little_more(
    guests: Guests, record_property: Record
) -> None:
    """The same with the installed command, which takes most of its time to start."""
    show(guests.run("restart.py", "10", "real"), record_property)


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Guests:
    """The same with the kernel of Debian 13."""
    return Guests(tmp_path_factory.mktemp("newer"), "trixie")


@pytest.mark.long
@pytest.mark.parametrize("script", [("basics.py",), ("restart.py", "10")], ids=lambda s: s[0])
def test_newer_kernel(newer: Guests, script: tuple[str, ...], record_property: Record) -> None:
    """File systems, and kills under load."""
    show(newer.run(*script), record_property)
    record_property("figure", f"on {newer.kernel.version}")
