"""Real clients against a real `millpond up`."""

import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from millpondprocess import Millpond

SIZE_BYTES = 1 << 30
CACHE_BYTES = 1 << 30
PACKAGES = {  # Debian's names
    "nbdinfo": "libnbd-bin",
    "nbdcopy": "libnbd-bin",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "fio": "fio",
}

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def millpond(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Millpond]:
    """One running process for the tests of a file, ended by SIGTERM."""
    directory = tmp_path_factory.mktemp("up") / "millpond"
    with Millpond(directory, size_bytes=SIZE_BYTES, cache_bytes=CACHE_BYTES) as running:
        yield running
        assert running.alive(), f"millpond up died:\n{running.log()}"


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a client; its exit code must be the expected one."""
    directory = tmp_path_factory.mktemp("clients")

    def run_client(
        tool: str, *arguments: str, code: int | None = 0, timeout_s: float = 300
    ) -> "subprocess.CompletedProcess[str]":
        path = shutil.which(tool)
        if path is None:
            pytest.fail(f"{tool} is missing: install the package {PACKAGES[tool]}")
        done = subprocess.run(
            [path, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=directory,
            stdin=subprocess.DEVNULL,
        )
        said = f"{tool} {' '.join(arguments)}: {done.returncode}\n{done.stdout}{done.stderr}"
        assert code is None or done.returncode == code, said
        return done

    return run_client


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1 GiB, mostly holes: 150 MiB of noise and of what compresses, at any alignment."""
    path = tmp_path_factory.mktemp("image") / "image.raw"
    chance = random.Random(1)
    with open(path, "wb") as file:
        file.truncate(SIZE_BYTES)
        for number in range(75):
            length_bytes = chance.randrange(1, 4 << 20)
            file.seek(chance.randrange(SIZE_BYTES - length_bytes))
            if number % 3:
                file.write(chance.randbytes(length_bytes))
            else:
                file.write((b"%d millpond " % number * length_bytes)[:length_bytes])
        file.seek(SIZE_BYTES - 1)
        file.write(b"!")  # the last byte is data: a client that rounds down would lose it
    return path
