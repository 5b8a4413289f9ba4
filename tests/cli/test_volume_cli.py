"""The `millpond` command against a real daemon: output, exit codes, one-line errors."""

import asyncio
import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from millpond.cli.output import format_size, parse_size
from millpond.cli.run import CommandError
from millpond.store.client import StoreClient

COMMAND = [sys.executable, "-c", "import sys; from millpond.cli.main import main; sys.exit(main())"]


def millpond(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=60,
    )


def start_store(directory: Path) -> "subprocess.Popen[str]":
    """A daemon in its own process, serving."""
    process = subprocess.Popen(
        [*COMMAND, "store", "serve", str(directory), "--format", "--listen", "127.0.0.1:0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    assert line.startswith(f"serving {directory} at unix:"), process.stderr.read()
    return process


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    """The directory of a running daemon."""
    directory = tmp_path / "store"
    directory.mkdir()
    process = start_store(directory)
    yield str(directory)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


def fails(result: "subprocess.CompletedProcess[str]", code: int, words: str) -> None:
    assert result.returncode == code, result.stderr
    assert result.stderr.startswith("millpond: error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    assert result.stdout == ""


def test_life_of_a_volume(store: str, tmp_path: Path) -> None:
    at = ("--dir", store)
    assert millpond("volume", "create", "vm1", "20GiB", *at).returncode == 0
    assert millpond("volume", "create", "vm2", "--size", "1.5G", *at).returncode == 0
    listed = millpond("volume", "list", "--json", *at)
    volumes = json.loads(listed.stdout)
    assert [(v["name"], v["size_bytes"]) for v in volumes] == [
        ("vm1", 20 << 30),
        ("vm2", 3 << 29),
    ]
    table = millpond("volume", "list", *at).stdout.splitlines()
    assert table[0].split() == ["NAME", "SIZE", "STORED", "EPOCH", "STATE", "ID"]
    assert table[1].split() == ["vm1", "20G", "0", "0", "closed", volumes[0]["id"]]
    shown = millpond("volume", "show", "vm1", "--json", MILLPOND_STORE=f"unix:{store}/store.sock")
    assert json.loads(shown.stdout) == volumes[0]
    assert "20G (21474836480 bytes)" in millpond("volume", "show", "vm1", *at).stdout
    fails(millpond("volume", "create", "vm1", "20GiB", *at), 4, "'vm1' exists")
    assert millpond("volume", "create", "vm1", "20GiB", "--exist-ok", *at).returncode == 0
    fails(millpond("volume", "create", "vm1", "1GiB", "--exist-ok", *at), 4, "'vm1' exists")
    assert millpond("volume", "delete", "vm1", *at).returncode == 0
    fails(millpond("volume", "delete", "vm1", *at), 3, "no volume named 'vm1'")
    assert millpond("volume", "delete", "vm1", "--missing-ok", *at).returncode == 0
    fails(millpond("volume", "show", "vm1", *at), 3, "'vm1'")


def test_volume_of_a_cache_that_is_gone_is_released_only_with_the_operators_word(
    store: str,
) -> None:
    millpond("volume", "create", "web", "1GiB", "--dir", store)
    assert millpond("volume", "release", "web", "--dir", store).returncode == 0, "nobody holds it"
    gone = b"g" * 16

    async def hold() -> None:
        address = f"unix:{store}/store.sock"
        client = await StoreClient.connect(address, client_id=gone, client_name="gone")
        opened = await client.call(
            "volume.open",
            id=(await client.call("volume.show", name="web"))["volume"]["id"],
            cache_id=gone.hex(),
            lineage=7,
            first_sequence=None,
            expected_epoch=0,
            accept_loss=False,
        )
        volume = opened["volume"]
        await client.call("volume.dirty", id=volume["id"], epoch=1, cache_id=gone.hex(), dirty=True)
        await client.close()

    asyncio.run(hold())
    refused = millpond("volume", "release", "web", "--dir", store)
    fails(refused, 5, f"open at cache {gone.hex()}, which may hold writes")
    assert "--accept-loss" in refused.stderr
    done = millpond("volume", "release", "web", "--accept-loss", "--dir", store)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    shown = json.loads(millpond("volume", "show", "web", "--json", "--dir", store).stdout)
    assert shown["open_holder"] is shown["dirty_holder"] is None
    assert shown["epoch"] == 2, "whoever held it is fenced"
    again = millpond("volume", "release", "web", "--json", "--dir", store)
    assert json.loads(again.stdout)["epoch"] == 2, "as it is; nobody held it any more"
    fails(millpond("volume", "release", "nope", "--dir", store), 3, "no volume")


def test_import_and_export_round_trip(store: str, tmp_path: Path) -> None:
    at = ("--dir", store)
    source, target = tmp_path / "source.raw", tmp_path / "target.raw"
    with source.open("wb") as file:
        file.truncate(64 << 20)
        for offset in (0, 5 << 20, (64 << 20) - 4096):
            file.seek(offset)
            file.write(random.Random(offset).randbytes(4096))
    imported = millpond("volume", "import", str(source), "disk", "--json", *at)
    assert imported.returncode == 0, imported.stderr
    assert imported.stderr == "", "no progress bar off a terminal"
    assert json.loads(imported.stdout)["size_bytes"] == 64 << 20
    assert millpond("volume", "export", "disk", str(target), *at).returncode == 0
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks * 512 <= 3 * 4096
    fails(millpond("volume", "export", "disk", str(target), *at), 4, "exists already")
    fails(millpond("volume", "import", str(source), "disk", *at), 4, "--overwrite")
    fails(millpond("volume", "import", str(tmp_path / "no"), "disk2", *at), 3, "No such file")


def test_second_daemon_is_refused_with_one_line(store: str) -> None:
    fails(millpond("store", "serve", store), 5, "served by another process")


def test_volume_that_was_created_survives_the_kill_of_the_daemon(tmp_path: Path) -> None:
    process = start_store(tmp_path)
    assert millpond("volume", "create", "vm1", "1GiB", "--dir", str(tmp_path)).returncode == 0
    process.kill()
    process.communicate()
    fails(millpond("volume", "list", "--dir", str(tmp_path)), 6, "cannot reach the store")
    process = start_store(tmp_path)
    listed = millpond("volume", "list", "--json", "--dir", str(tmp_path))
    assert [v["name"] for v in json.loads(listed.stdout)] == ["vm1"]
    process.terminate()
    process.communicate()


def test_disk_that_fails_stops_the_daemon_with_a_line(tmp_path: Path) -> None:
    process = start_store(tmp_path)
    at = ("--dir", str(tmp_path))
    assert millpond("volume", "create", "vm1", "1GiB", *at).returncode == 0
    # Every write behind the first block of a file fails from now on.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, 4096))
    result = millpond("volume", "create", "vm2", "1GiB", *at)
    assert result.returncode in (1, 6), "refused, or lost the daemon: but never acknowledged"
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("millpond: error: ")
    assert "Traceback" not in errors
    process = start_store(tmp_path)
    listed = millpond("volume", "list", "--json", *at)
    assert "vm1" in [v["name"] for v in json.loads(listed.stdout)]
    process.terminate()
    process.communicate()


def test_no_store_and_wrong_usage(tmp_path: Path) -> None:
    clean = {"MILLPOND_STORE": ""}
    fails(millpond("volume", "list", "--dir", str(tmp_path), **clean), 6, "cannot reach the store")
    fails(millpond("volume", "list", "--store", "127.0.0.1:1", **clean), 6, "127.0.0.1:1")
    fails(millpond("volume", "list", "--store", "nonsense", **clean), 1, "no address")
    fails(millpond("volume", "create", "vm1", "20XB", "--dir", "/x", **clean), 2, "'20XB'")
    fails(millpond("volume", "create", "vm1", "--dir", "/x", **clean), 2, "size")
    fails(millpond("volume", "list", "--frobnicate", **clean), 2, "--frobnicate")
    fails(millpond("volume", "frob", **clean), 2, "frob")
    fails(millpond("volume", "show", **clean), 2, "NAME")
    fails(millpond("store", "serve", str(tmp_path / "nowhere")), 3, "there is no directory")
    fails(millpond("store", "serve", str(tmp_path)), 3, "--format")
    fails(
        millpond("store", "serve", str(tmp_path), "--format", "--listen", "0.0.0.0:0"),
        1,
        "--insecure-listen",
    )


def test_help_and_version_go_to_stdout() -> None:
    for arguments in (["--help"], ["volume", "--help"], ["volume", "import", "--help"]):
        result = millpond(*arguments)
        assert result.returncode == 0 and "Usage:" in result.stdout
    assert millpond("version").stdout.startswith("millpond ")


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("4096", 4096),
        ("20GiB", 20 << 30),
        ("20G", 20 << 30),
        ("20gib", 20 << 30),
        ("20GB", 20 * 10**9),
        ("1.5TiB", 3 << 39),
        (" 512 MiB ", 512 << 20),
        ("0.5K", 512),
        ("12B", 12),
    ],
)
def test_sizes_as_people_write_them(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "G", "-1G", "1.2.3G", "1e9", "5iB", "0.3K", "20GiBs", "٣G"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(CommandError):
        parse_size(text)


def test_sizes_for_people() -> None:
    assert [format_size(n) for n in (0, 1023, 4096, 3 << 29, 20 << 30, 1 << 50)] == [
        "0", "1023", "4K", "1.5G", "20G", "1P",
    ]  # fmt: skip
