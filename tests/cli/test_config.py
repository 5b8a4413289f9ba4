"""Configuration files: samples, reference, mistakes, and what the daemons take from them."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from millpond.cache.settings import Bound, VolumeSettings
from millpond.cli.configdoc import keys_of, reference, sample, tables_of
from millpond.cli.configfile import load_any, parse, volumes_of
from millpond.cli.configtypes import FILES, CacheFile, StoreFile
from millpond.cli.run import USAGE, CommandError

MIB = 1 << 20
COMMAND = [sys.executable, "-c", "import sys; from millpond.cli.main import main; sys.exit(main())"]
REFERENCE = Path(__file__).resolve().parents[2] / "cli" / "CONFIGURATION.md"
LEAST = '[cache]\ndevice = "/dev/x"\nstores = ["127.0.0.1:7711"]\n'


def millpond(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=os.environ, timeout=60
    )


def refused(text: str, *words: str) -> None:
    """A cache's file with this mistake gets one line that says where and what."""
    with pytest.raises(CommandError) as caught:
        parse(text, CacheFile, "cache.toml")
    message = str(caught.value)
    assert caught.value.exit_code == USAGE
    assert message.startswith("cache.toml: ") and "\n" not in message
    for word in words:
        assert word in message, message


def test_reference_in_the_repository_is_the_one_the_code_makes() -> None:
    assert REFERENCE.read_text() == reference(), "millpond config reference > cli/CONFIGURATION.md"


@pytest.mark.parametrize("kind", FILES)
def test_sample_is_a_file_without_errors(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"{kind}.toml"
    path.write_text(sample(kind))
    assert isinstance(load_any(str(path)), FILES[kind])
    checked = millpond("config", "check", str(path))
    assert (checked.returncode, checked.stderr) == (0, "")
    assert f"a {kind}'s file, no error" in checked.stdout


@pytest.mark.parametrize("kind", FILES)
def test_sample_with_every_example_used_is_a_file_without_errors(kind: str, tmp_path: Path) -> None:
    text = re.sub(r"^# (?=\w+ = |\[)", "", sample(kind), flags=re.MULTILINE)
    path = tmp_path / "all.toml"
    path.write_text(text)
    checked = millpond("config", "check", "--json", str(path))
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout).keys() >= {kind}
    for heading, table in tables_of(kind):
        assert heading.endswith(".NAME") or f"[{heading}]" in text
        if not heading.endswith(".NAME"):
            assert all(f"\n{key.name} = " in text for key in keys_of(table))


def test_unknown_keys_are_refused_with_a_suggestion() -> None:
    refused(LEAST + '[nbd]\nsokcet = "/x"', "nbd.sokcet: unknown key; did you mean 'socket'?")
    refused(LEAST + "[contol]", "contol: unknown key; did you mean 'control'?")
    refused(LEAST + '[volume.web]\npeek_rate = "1MiB"', "volume.web.peek_rate", "'peak_rate'")
    refused(LEAST + "frobnicate = 1", "cache.frobnicate: unknown key; known: device, stores")


def test_values_that_cannot_be() -> None:
    refused("[cache]\nstores = []", "cache: 'device' is missing")
    refused(LEAST.replace('["127.0.0.1:7711"]', "[]"), "cache.stores: give at least one store")
    refused(LEAST.replace("127.0.0.1:7711", "nonsense"), "cache.stores: 'nonsense' is no address")
    refused(LEAST + "read_only = 1", "cache.read_only: expected `bool`")
    refused(LEAST + 'scrub_rate = "1GiB"', "cache.scrub_rate: scrub_rate is 0 (off), or from 64KiB")
    refused(LEAST + "[rates]\naverage = 20", "rates.average: write it with its unit")
    refused(LEAST + '[rates]\naverage = "20XB"', "rates.average: '20XB' is no size")
    refused(LEAST + '[rates]\naverage = "2MiB"\npeak = "1MiB"', "rates: the peak rate is at least")
    refused(LEAST + '[nbd]\nmode = "0999"', "nbd.mode: permissions are written like")
    refused(LEAST + '[defaults]\nbound = "strict"', "defaults: bound = strict needs bound_s")
    refused(LEAST + '[defaults]\nbound = "soft"', "defaults.bound", "'soft'")
    refused(LEAST + '[volume."a/b"]', "volume.a/b", "hold a '/'")
    refused("[cache", "not TOML")
    with pytest.raises(CommandError, match="insist with --insecure-listen"):
        parse('[store]\ndirectory = "/x"\nlisten = ["0.0.0.0:1"]', StoreFile, "store.toml")


def test_volume_table_says_what_differs_from_the_defaults() -> None:
    file = parse(
        LEAST
        + '[defaults]\naverage_rate = "1MiB/s"\nbound_s = "2min"\n'
        + '[volume.web]\nlog_max = "1GiB"\naverage_rate = "2MiB"\nbound = "strict"\n',
        CacheFile,
        "cache.toml",
    )
    assert volumes_of(file)["web"] == VolumeSettings(
        log_max_bytes=1 << 30, average_bytes_per_s=2 * MIB, bound_s=120.0, bound=Bound.STRICT
    )


def test_check_of_what_is_no_configuration(tmp_path: Path) -> None:
    missing = millpond("config", "check", str(tmp_path / "no"))
    assert (missing.returncode, missing.stderr.count("\n")) == (3, 1)
    (tmp_path / "empty").touch()
    assert millpond("config", "check", str(tmp_path / "empty")).returncode == 2
    (tmp_path / "noise").write_bytes(bytes(range(256)))
    assert "not UTF-8" in millpond("config", "check", str(tmp_path / "noise")).stderr
    assert millpond("config", "sample", "fridge").returncode == 2


def test_daemons_serve_what_their_files_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything from the files, but for the name and a rate, which the command line overrides."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store.toml").write_text(
        f'[store]\ndirectory = "{tmp_path}/store"\nlisten = ["unix:{tmp_path}/more.sock"]\n'
        'socket_mode = "0600"\npage_cache = "1MiB"\n'
    )
    (tmp_path / "cache.toml").write_text(
        f'[cache]\ndevice = "{tmp_path}/cache"\nstores = ["unix:{tmp_path}/more.sock"]\n'
        'scrub_rate = "8MiB"\n'
        f'[nbd]\nsocket = "{tmp_path}/nbd.sock"\nmode = "0666"\n'
        f'[control]\nsocket = "{tmp_path}/control.sock"\n'
        '[rates]\naverage = "1MiB"\npeak = "2MiB"\n'
    )
    made = millpond("cache", "format", str(tmp_path / "cache"), "--size", "256MiB")
    assert made.returncode == 0, made.stderr
    monkeypatch.setenv("MILLPOND_STORE", "unix:/nowhere")  # a file wins over the environment
    with (
        serving("store", "serve", "--config", f"{tmp_path}/store.toml", "--format"),
        serving(
            *("cache", "serve", "--config", f"{tmp_path}/cache.toml"),
            *("--name", "mine", "--peak-rate", "4MiB"),
        ),
    ):
        check_served(tmp_path)


def check_served(tmp_path: Path) -> None:
    answer = millpond("cache", "status", "--json", "--control", f"{tmp_path}/control.sock")
    assert answer.returncode == 0, answer.stderr
    status = json.loads(answer.stdout)
    modes = [
        stat.S_IMODE(os.stat(tmp_path / name).st_mode)
        for name in ("store/store.sock", "more.sock", "nbd.sock", "control.sock")
    ]
    assert modes == [0o600, 0o600, 0o666, 0o660]
    assert status["name"] == "mine"
    assert status["stores"][0]["address"] == f"unix:{tmp_path}/more.sock"
    assert status["scrub"]["bytes_per_s"] == 8 * MIB
    shaping = status["shaping"]
    assert (shaping["average_bytes_per_s"], shaping["peak_bytes_per_s"]) == (MIB, 4 * MIB)


@contextmanager
def serving(*arguments: str) -> Iterator[None]:
    """A daemon, ready until the end; it must end well."""
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        assert process.stdout.readline(), process.stderr.read()
        yield
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    finally:
        process.kill()
        process.communicate()


def test_serve_without_device_or_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MILLPOND_STORE", raising=False)
    for arguments in (("cache", "serve", "/x"), ("cache", "serve", "/x", "--store", "unix:/y")):
        result = millpond(*arguments)
        assert result.returncode == 2 and "configuration file" in result.stderr
