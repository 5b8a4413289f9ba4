"""The `millpond` command line as a torture uses it: one call, its output, its one-line errors."""

import asyncio
import json
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millpond.cache import control
from millpondprocess import command_line, environment

COMMAND_TIMEOUT_S = 120.0
PUBLISHED_S = 0.1  # status is a few milliseconds old
DRAIN_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    output: str
    errors: str

    @property
    def complaint(self) -> str:
        """The one line for the operator; it must be exactly one, and no traceback."""
        lines = [line for line in self.errors.splitlines() if not line.startswith("level=INFO")]
        said = [line for line in lines if line.startswith("millpond: error: ")]
        assert len(said) == 1, f"not one line of error:\n{self.errors}"
        assert "Traceback" not in self.errors, self.errors
        return said[0]


def millpond(*arguments: str | Path, timeout_s: float = COMMAND_TIMEOUT_S) -> Finished:
    """Run one command to its end."""
    done = subprocess.run(
        [*command_line(), *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=timeout_s,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def refused(*arguments: str | Path) -> str:
    """Run a command that must fail by itself, in one line; the line."""
    done = millpond(*arguments)
    assert done.code > 0, f"ended with {done.code}:\n{done.output}{done.errors}"
    return done.complaint


def status(directory: Path) -> dict[str, Any]:
    """What `millpond status --json` prints of an `up`, without a process for it."""
    return control_call(directory / "control.sock", "status")


def control_call(path: Path, op: str) -> dict[str, Any]:
    """One question to a running cache."""
    return asyncio.run(control.call(str(path), op, timeout_s=60))


def printed_status(directory: Path) -> dict[str, Any]:
    """`millpond status --json` of an `up`."""
    done = millpond("status", "--dir", directory, "--json")
    assert done.code == 0, done.errors
    answer: dict[str, Any] = json.loads(done.output)
    return answer


def disk_of(answer: dict[str, Any]) -> dict[str, Any]:
    """The one volume in a status."""
    (volume,) = answer["volumes"]
    found: dict[str, Any] = volume
    return found


def wait_until(what: str, condition: Callable[[], bool], *, timeout_s: float) -> None:
    """Look again and again; the limit is against hanging for ever, not a claim of speed."""
    end = time.perf_counter() + timeout_s
    while not condition():
        assert time.perf_counter() < end, f"still not after {timeout_s:g} s: {what}"
        time.sleep(0.1)


def wait_drained(directory: Path) -> None:
    """Until nothing is dirty; nobody helps."""
    time.sleep(PUBLISHED_S)  # or status may not know yet of what was just written
    wait_until(
        "dirty bytes are 0",
        lambda: status(directory)["dirty_bytes"] == 0,
        timeout_s=DRAIN_TIMEOUT_S,
    )


def export(directory: Path, image: Path) -> bytes:
    """The disk as the store of a running `up` has it."""
    return export_from(f"unix:{directory}/store.sock", image)


def export_from(address: str, image: Path) -> bytes:
    """The disk as a store has it."""
    done = millpond(
        *("volume", "export", "disk", image, "--overwrite", "--no-progress", "--store", address)
    )
    assert done.code == 0, done.errors
    return image.read_bytes()


@contextmanager
def serving_store(directory: Path) -> Iterator[str]:
    """`store serve` alone on the store of an `up` that is down; its address."""
    process = subprocess.Popen(
        [*command_line(), "store", "serve", str(directory / "store")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        ready, _, _ = select.select([process.stdout], [], [], COMMAND_TIMEOUT_S)
        line = process.stdout.readline() if ready else ""
        if not line.startswith("serving "):
            process.kill()
            raise AssertionError(f"the store does not serve:\n{process.stderr.read()}")
        yield f"unix:{directory}/store/store.sock"
        process.terminate()
        _, errors = process.communicate(timeout=COMMAND_TIMEOUT_S)
        assert process.returncode == 0, errors
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
