"""Kernel devices in a guest with a real kernel; what happens there is in inside/NAME.py."""

from collections.abc import Callable

import pytest

from kernel.guest import Guests


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory) -> Guests:
    """Kernel and first file system, made once."""
    return Guests(tmp_path_factory.mktemp("guest"))


Record = Callable[[str, object], None]


def test_file_systems_and_verified_load_on_an_attached_volume(
    guests: Guests, record_property: Record
) -> None:
    """ext4 and XFS: mkfs, mount, fio, fstrim, check; and nothing is left after detach."""
    console = guests.run("basics.py")
    assert not console.kernel_complaints()
    for figure in console.figures:
        record_property("figure", figure)
