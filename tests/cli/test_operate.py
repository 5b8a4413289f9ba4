"""What an operator does with a running cache and store: flush, list, status, resize, rename."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbdclient
from millpondprocess import Millpond

MIB = 1024 * 1024
SIZE_BYTES = 64 * MIB
NOISE = random.Random(3).randbytes(2 * MIB)
COMMAND = [sys.executable, "-c", "import sys; from millpond.cli.main import main; sys.exit(main())"]


def millpond(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=os.environ, timeout=60
    )


def answer(*arguments: str) -> str:
    result = millpond(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fails(result: "subprocess.CompletedProcess[str]", code: int, words: str) -> None:
    assert result.returncode == code, result.stderr
    assert result.stderr.count("\n") == 1 and words in result.stderr, result.stderr
    assert result.stdout == ""


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Millpond]:
    """A cache that may ship no more than 64 KiB per second."""
    arguments = ("--average-rate", "64KiB", "--peak-rate", "64KiB")
    with Millpond(
        tmp_path / "pond", size_bytes=SIZE_BYTES, cache_bytes=256 * MIB, arguments=arguments
    ) as running:
        yield running


def test_flush_waits_for_the_rates_unless_told_not_to(slow: Millpond) -> None:
    at = ("--dir", str(slow.directory))
    with nbdclient.connect(slow.uri) as client:
        client.write(0, NOISE)
        fails(millpond("flush", "disk", "--timeout", "500ms", *at), 6, "not at the store yet")
        flushed = json.loads(answer("flush", "disk", "--now", "--json", *at))
        assert flushed["destaged_sequence"] >= flushed["target"] > 0
        (volume,) = json.loads(
            answer("volume", "list", "--json", "--store", f"unix:{slow.directory}/store.sock")
        )
        assert volume["applied_sequence"] >= flushed["target"]
        assert answer("flush", "disk", *at) == ""
    fails(millpond("flush", "nothing", *at), 3, "'nothing'")
    fails(millpond("flush", "disk", "--timeout", "soon", *at), 2, "'soon'")
    fails(millpond("flush", "disk", "--control", "/nowhere"), 6, "no cache answers")


def test_list_and_status_of_cache_and_store(slow: Millpond) -> None:
    at = ("--dir", str(slow.directory))
    with nbdclient.connect(slow.uri) as client:
        client.write(0, b"x" * 4096)
        (volume,) = json.loads(answer("cache", "list", "--json", *at))
        assert (volume["name"], volume["state"], volume["size_bytes"]) == (
            "disk",
            "open",
            SIZE_BYTES,
        )
        assert answer("cache", "list", *at).splitlines()[1].split()[:3] == ["disk", "open", "64M"]
        cache = json.loads(answer("cache", "status", "--json", *at))
        assert cache["engine"]["segments_total"] > 0 and "volumes" not in cache
        assert "segments" in answer("cache", "status", *at)
    store = json.loads(answer("store", "status", "--json", *at))
    assert store["volumes"] == 1 and len(store["store_id"]) == 32
    words = answer("store", "status", *at)
    assert "checksum errors  0" in words and "serving" in words and "I/O errors       0" in words
    fails(millpond("cache", "status", "--control", "/nowhere"), 6, "no cache answers")


def test_resize_and_rename_while_a_guest_is_connected(slow: Millpond) -> None:
    at = ("--dir", str(slow.directory))
    with nbdclient.connect(slow.uri) as client:
        client.write(0, NOISE)
        grown = millpond("volume", "resize", "disk", "128MiB", *at)
        assert grown.returncode == 0 and "with its next connection" in grown.stderr
        with nbdclient.connect(slow.uri) as second:
            assert second.size_bytes == 128 * MIB
            second.write(100 * MIB, NOISE)
        fails(millpond("volume", "resize", "disk", "1MiB", *at), 1, "--shrink")
        fails(millpond("volume", "resize", "disk", "1MiB", "--shrink", *at), 5, "in use at cache")
        assert answer("volume", "rename", "disk", "web", *at) == ""
        assert client.read(0, len(NOISE)) == NOISE
        fails(millpond("volume", "show", "disk", *at), 3, "'disk'")
        assert answer("volume", "rename", "web", "disk", *at) == ""
