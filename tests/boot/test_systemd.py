"""Debian with systemd: a volume of the tab is there after a reboot and after a power cut."""

from collections.abc import Callable
from pathlib import Path

import pytest

from boot import image
from boot.machine import Machine
from demo import initramfs, kernel

MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")


@pytest.mark.long
def test_volume_of_the_tab_survives_a_reboot_and_a_power_cut(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """With a dirty log both times; destage goes on, nothing complains, at last all is shipped."""
    used = kernel.ensure(image.ROOT / ".run" / "kernel")
    first_files = tmp_path / "initramfs"
    init = Path(__file__).with_name("init.sh")
    initramfs.write(first_files, used, wanted=MODULES, init=init)
    machine = Machine(tmp_path, used, first_files, image.build(tmp_path, used))
    boots = [
        machine.boot("first", until="ending"),
        machine.boot("second", until="written", cut=True),
        machine.boot("third", until="shipped"),
    ]
    seconds = ", ".join(str(boot.value("booted", "at")) for boot in boots)
    dirty = ", ".join(str(boot.value("resumed", "dirty_bytes") >> 10) for boot in boots[1:])
    pauses = ", ".join(f"{v['seconds']} s of {v['of']}" for w, v in boots[2].lines if w == "pause")
    record_property(
        "figure",
        f"mounted {seconds} s after power on (emulated); dirty at the second and third boot:"
        f" {dirty} KiB; longest fsync beside the cache's restarts: {pauses}",
    )
