"""`store fsck` and scrubbing on real processes and real files.

A store is filled, overwritten, trimmed and emptied in part; it is stopped, killed, or copied while
it stands still in the middle of its work: each time its directory is clean, and the check changes
not a byte of it.  Then it is damaged.
"""

import hashlib
import json
import random
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from millpond.native import lib
from millpondprocess import command_line, environment
from torture.amounts import seed_for
from torture.commands import COMMAND_TIMEOUT_S, Finished, millpond, refused, wait_until
from torture.storefiles import extents_at, find_in_store, flip, groups_of, struct_at

MIB = 1 << 20
BLOCK = 4096
IMAGE_BYTES = 6 * MIB
VICTIM = 700  # a block
SMALL_SEGMENTS = """
import sys
from millpond.store.directory import OpenStore
OpenStore(sys.argv[1], format_when_empty=True, segment_bytes=1 << 20).close()
"""


class Store:
    """A store's directory, with segments of 1 MiB, and its process."""

    def __init__(self, path: Path, chance: random.Random, *, like: Path | None = None) -> None:
        """An empty one, or a copy."""
        self.path = path
        self.chance = chance
        self.directory = path / "store"
        self.log = path / "log"
        self.process: subprocess.Popen[str] | None = None
        if like is not None:
            shutil.copytree(like, self.directory, ignore=shutil.ignore_patterns("*.sock"))
            return
        self.directory.mkdir()
        python = [command_line()[0], "-c", SMALL_SEGMENTS, str(self.directory)]
        subprocess.run(python, check=True, env=environment(), timeout=COMMAND_TIMEOUT_S)

    @contextmanager
    def serving(self, *arguments: str | Path, kill: bool = False) -> Iterator[None]:
        """Run it; in the end it is stopped, or killed."""
        command = [*command_line(), "store", "serve", *map(str, arguments or (self.directory,))]
        with self.log.open("w") as log:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment()
            )
        self.process = process
        try:
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], COMMAND_TIMEOUT_S)
            assert ready and process.stdout.readline().startswith("serving "), self.log.read_text()
            yield
            process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
            code = process.wait(timeout=COMMAND_TIMEOUT_S)
            assert code == (-signal.SIGKILL if kill else 0), self.log.read_text()
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def ask(self, *arguments: str | Path) -> None:
        """A command of a client, which succeeds."""
        done = millpond(*arguments, "--store", f"unix:{self.directory}/store.sock")
        assert done.code == 0, done.errors

    def image(self) -> Path:
        """New noise, and behind the block that tests damage, holes."""
        file = self.path / "image"
        data = bytearray(self.chance.randbytes(IMAGE_BYTES))
        for _ in range(8):
            at = self.chance.randrange(VICTIM + 1, IMAGE_BYTES // BLOCK - 40) * BLOCK
            data[at : at + 40 * BLOCK] = bytes(40 * BLOCK)
        file.write_bytes(data)
        return file

    def fill(self, name: str) -> None:
        """All of a volume anew."""
        self.ask("volume", "import", self.image(), name, "--overwrite", "--no-progress")

    def check(self, directory: Path | None = None) -> Finished:
        """`store fsck`, which changes nothing."""
        before = digest(directory or self.directory)
        done = millpond("store", "fsck", directory or self.directory)
        assert digest(directory or self.directory) == before, "the check changed the directory"
        return done

    def check_clean(self, directory: Path | None = None) -> None:
        """It has no fault."""
        done = self.check(directory)
        assert done.code == 0 and done.output.count("\n") == 1, done
        assert ": clean; " in done.output

    def findings(self) -> list[dict[str, Any]]:
        """What a damaged one is told, as JSON and as lines."""
        shown = self.check()
        done = millpond("store", "fsck", self.directory, "--json")
        answer = json.loads(done.output)
        assert done.code == shown.code == 1 and not answer["clean"]
        found: list[dict[str, Any]] = answer["findings"]
        *lines, summary = shown.output.splitlines()
        assert len(lines) == len(found) == answer["summary"]["findings"]
        assert f"{len(found)} findings" in summary
        for line, finding in zip(lines, found, strict=True):
            assert line.startswith(finding["kind"]) and finding["what"][:60] in line
        return found


def digest(directory: Path) -> dict[str, tuple[str, int, int]]:
    """Content, blocks and time of change of every file."""
    return {
        path.name: (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
            path.stat().st_blocks,
            path.stat().st_mtime_ns,
        )
        for path in directory.iterdir()
    }


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """One that nothing has happened to."""
    return Store(tmp_path, chance())


def chance() -> random.Random:
    """From the seed that is printed."""
    return random.Random(seed_for("tests/torture/test_fsck.py", 4))


@pytest.fixture
def filled(tmp_path: Path, original: Path) -> Store:
    """One that holds a volume, stopped."""
    return Store(tmp_path, chance(), like=original)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the others are copies of."""
    store = Store(tmp_path_factory.mktemp("original"), chance())
    with store.serving():
        store.ask("volume", "create", "disk", "--size", f"{IMAGE_BYTES}")
        store.fill("disk")
    return store.directory


def test_store_is_clean_through_its_life(store: Store) -> None:
    with store.serving():
        store.ask("volume", "create", "disk", "--size", f"{IMAGE_BYTES}")
        store.ask("volume", "create", "other", "--size", f"{IMAGE_BYTES}")
        store.fill("disk")
        line = refused("store", "fsck", store.directory)
        assert "served by another process" in line
    store.check_clean()
    with store.serving(kill=True):
        store.fill("other")
        store.fill("disk")
    store.check_clean()
    with store.serving(kill=True):
        store.ask("volume", "delete", "other", "--force")
        store.fill("disk")
        store.ask("volume", "rename", "disk", "root")
    store.check_clean()
    with store.serving():
        store.fill("root")
    store.check_clean()
    first = int(min(path.stem for path in store.directory.glob("*.seg") if path.stem.strip("0")))
    assert first > 1, "no segment has gone yet"


@pytest.mark.long
@pytest.mark.long
def test_copies_of_a_store_that_stands_still_in_its_work_are_clean(store: Store) -> None:
    with store.serving():
        assert store.process
        store.ask("volume", "create", "disk", "--size", f"{IMAGE_BYTES}")
        for turn in range(4):
            address = f"unix:{store.directory}/store.sock"
            command = ["volume", "import", str(store.image()), "disk", "--overwrite"]
            writing = subprocess.Popen(
                [*command_line(), *command, "--no-progress", "--store", address],
                env=environment(),
            )
            begin = sum(path.stat().st_blocks for path in store.directory.glob("*.seg"))
            while writing.poll() is None:
                now = sum(path.stat().st_blocks for path in store.directory.glob("*.seg"))
                if now > begin + turn * 512:
                    break
            store.process.send_signal(signal.SIGSTOP)
            copy = store.path / f"copy{turn}"
            time.sleep(0.2)  # what the kernel has of it arrives
            copy.mkdir()
            for path in store.directory.glob("*.seg"):
                shutil.copy2(path, copy)
            store.process.send_signal(signal.SIGCONT)
            assert writing.wait(timeout=COMMAND_TIMEOUT_S) == 0
            store.check_clean(copy)


def test_flipped_bits_are_named_with_volume_block_segment_and_offset(filled: Store) -> None:
    path, offset = find_in_store(filled.directory, VICTIM)
    flip(path, offset + 9)
    (found,) = filled.findings()
    assert found["kind"] == "data" and found["volume"] == "disk"
    assert (found["first_block"], found["block_count"]) == (VICTIM, 1)
    assert (found["segment"], found["offset_bytes"]) == (int(path.stem, 16), offset)
    flip(path, offset + 9)
    filled.check_clean()


@pytest.mark.long
def test_truncated_segment_is_named_and_what_it_held(filled: Store) -> None:
    path, offset = find_in_store(filled.directory, VICTIM)
    with path.open("r+b") as file:
        file.truncate(offset // BLOCK * BLOCK)
    found = filled.findings()
    kinds = {each["kind"] for each in found}
    assert {"file", "data"} <= kinds and "map" not in kinds
    assert all(each["segment"] == int(path.stem, 16) for each in found)
    assert any(
        each["first_block"] <= VICTIM < each["first_block"] + each["block_count"]
        for each in found
        if each["kind"] == "data"
    )


@pytest.mark.long
def test_removed_segment_is_named(filled: Store) -> None:
    path, _ = find_in_store(filled.directory, VICTIM)
    path.unlink()
    found = filled.findings()
    assert {"open", "file", "data"} <= {each["kind"] for each in found}
    assert int(path.stem, 16) in {each["segment"] for each in found}


def test_directory_that_is_no_store_is_refused(tmp_path: Path) -> None:
    for directory, code in ((tmp_path / "nowhere", 3), (tmp_path, 3)):
        done = millpond("store", "fsck", directory)
        assert done.code == code and done.complaint and not done.output
    assert not list(tmp_path.iterdir())


def test_scrub_of_a_running_store_finds_a_flipped_bit_and_goes_on(filled: Store) -> None:
    path, offset = find_in_store(filled.directory, VICTIM)
    flip(path, offset + 9)
    config = filled.path / "store.toml"
    config.write_text(
        f'[store]\ndirectory = "{filled.directory}"\nscrub_rate = "64MiB"\nscrub_every = "1s"\n'
    )

    def status() -> dict[str, Any]:
        done = millpond("store", "status", "--dir", filled.directory, "--json")
        assert done.code == 0, done.errors
        answer: dict[str, Any] = json.loads(done.output)
        return answer

    with filled.serving("--config", config):
        wait_until("two passes", lambda: status()["scrub_passes"] >= 2, timeout_s=120)
        answer = status()
        assert answer["scrub_bad_last_pass"] == 1 and answer["scrub_finished_ago_s"] >= 0
        assert answer["scrub_verified_bytes"] > IMAGE_BYTES
        assert answer["failed"] == 0
        shown = millpond("store", "status", "--dir", filled.directory).output
        assert "ago with 1 bad" in shown
        filled.fill("disk")  # it takes writes as ever, and they mend it
        passes = status()["scrub_passes"]
        wait_until("two more", lambda: status()["scrub_passes"] >= passes + 2, timeout_s=120)
        assert status()["scrub_bad_last_pass"] == 0
    lines = [line for line in filled.log.read_text().splitlines() if "scrub found damage" in line]
    assert lines and all(
        f"blocks={VICTIM}-{VICTIM}" in line and "volume='disk'" in line for line in lines
    )
    where = f"segment={int(path.stem, 16)} offset="
    assert all(where in line for line in lines)
    filled.check_clean()


@pytest.mark.long
def test_every_extent_of_the_files_is_one_that_the_check_counts(filled: Store) -> None:
    data = sum(
        extent.codec in (lib.MP_CODEC_NONE, lib.MP_CODEC_LZ4)
        for _, group in groups_of(filled.directory)
        for offset, record in group.records
        if record.type == lib.MP_RECORD_BATCH
        for _, extent in extents_at(offset, record)
    )
    done = millpond("store", "fsck", filled.directory, "--json")
    assert json.loads(done.output)["summary"]["extents"] == data
    supers = struct_at(filled.directory / f"{0:016x}.seg", "mp_store_super", 0)
    assert supers.segment_bytes == MIB
