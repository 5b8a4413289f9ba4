"""The guest's first file system: busybox, the modules for a virtio disk, and our init: prologue.sh
and the guest's own script behind it.

Written here as a newc archive (Documentation/driver-api/early-userspace/buffer-format.rst
of the kernel): needs neither root nor cpio. The order of the modules comes from the
depends= entry that each module carries, because an unpacked package has no modules.dep.

Failure modes: busybox missing or not static (refused); a module that the kernel neither
carries nor has built in (refused by name).
"""

import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path

from demo.kernel import Kernel

WANTED = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")
BUSYBOX = Path("/bin/busybox")
PROLOGUE = Path(__file__).with_name("prologue.sh")
INIT = Path(__file__).with_name("init.sh")


def normal(name: str) -> str:
    """Module names compare with - and _ as the same character."""
    return name.replace("-", "_")


def content(module: Path) -> bytes:
    """A module as the kernel loads it; newer packages have them compressed."""
    data = module.read_bytes()
    return lzma.decompress(data) if module.suffix == ".xz" else data


def file_name(module: Path) -> str:
    """Of the loaded module."""
    return module.name.removesuffix(".xz")


def depends(module: Path) -> list[str]:
    """The names in the depends= entry of a module's .modinfo."""
    data = content(module)
    start = data.find(b"\0depends=") + len(b"\0depends=")
    assert start >= len(b"\0depends="), f"{module.name} has no depends= entry"
    names = data[start : data.index(b"\0", start)].decode()
    return [normal(name) for name in names.split(",") if name]


def module_order(kernel: Kernel, wanted: Sequence[str] = WANTED) -> list[Path]:
    """The wanted modules and all they need, each after what it needs, without what is built in."""
    found = (*kernel.modules.rglob("*.ko"), *kernel.modules.rglob("*.ko.xz"))
    files = {normal(file_name(path).removesuffix(".ko")): path for path in found}
    builtin = (kernel.modules / "modules.builtin").read_text().split()
    built_in = {normal(Path(line).stem) for line in builtin}
    order: list[Path] = []
    waiting = [*reversed(wanted)]
    while waiting:
        name = waiting[-1]
        if name in built_in or files.get(name) in order:
            waiting.pop()
            continue
        if name not in files:
            raise SystemExit(f"kernel {kernel.version} has no module {name}")
        missing = [n for n in depends(files[name]) if n not in built_in and files[n] not in order]
        if missing:
            waiting += missing
        else:
            order.append(files[waiting.pop()])
    return order


def entry(number: int, name: str, *, mode: int, data: bytes = b"") -> bytes:
    """One newc archive member: header, name and data, each padded to four bytes."""
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return header + b"\0" * (-len(header) % 4) + data + b"\0" * (-len(data) % 4)


def members(kernel: Kernel, wanted: Sequence[str], init: Path) -> Iterator[tuple[str, int, bytes]]:
    """(name, mode, data) of everything in the archive."""
    for directory in ("bin", "dev", "proc", "sys", "mnt", "modules"):
        yield directory, 0o040755, b""
    yield "bin/busybox", 0o100755, BUSYBOX.read_bytes()
    yield "init", 0o100755, PROLOGUE.read_bytes() + init.read_bytes()
    order = module_order(kernel, wanted)
    for module in order:
        yield f"modules/{file_name(module)}", 0o100644, content(module)
    yield "modules/order", 0o100644, "".join(f"{file_name(m)}\n" for m in order).encode()


def write(path: Path, kernel: Kernel, *, wanted: Sequence[str] = WANTED, init: Path = INIT) -> None:
    """Write the archive for kernel to path: busybox, the wanted modules in order, and init."""
    if not BUSYBOX.exists():
        raise SystemExit("/bin/busybox is missing: apt-get install busybox-static")
    if b"/lib64/ld-linux" in BUSYBOX.read_bytes():
        raise SystemExit("/bin/busybox is not static: apt-get install busybox-static")
    archive = [
        entry(number, name, mode=mode, data=data)
        for number, (name, mode, data) in enumerate(members(kernel, wanted, init), start=1)
    ]
    path.write_bytes(b"".join(archive) + entry(0, "TRAILER!!!", mode=0))
