"""/etc/millpond/tab: what its lines mean, and what is wrong with the others."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.cli.run import USAGE, CommandError
from millpond.cli.tab import Entry, load, parse
from millpond.store.catalogue import check_name
from millpond.store.errors import StoreError

SAMPLE = Path(__file__).resolve().parents[2] / "cli" / "system" / "tab"


def refused(text: str, *words: str) -> None:
    """This text gets one line that says where and what."""
    with pytest.raises(CommandError) as caught:
        parse(text, "tab")
    message = str(caught.value)
    assert caught.value.exit_code == USAGE
    assert message.startswith("tab:") and "\n" not in message
    for word in words:
        assert word in message, message


def test_lines_comments_and_options() -> None:
    text = (
        "# volumes of this host\n\n"
        "web1\n"
        "  web2   -\n"
        "archive\tread-only,device=/dev/nbd5\n"
        "   # a comment, too\n"
        "scratch nofail,noauto,timeout=1min\r\n"
    )
    assert parse(text, "tab") == [
        Entry("web1"),
        Entry("web2"),
        Entry("archive", read_only=True, device="/dev/nbd5"),
        Entry("scratch", nofail=True, noauto=True, timeout_s=60.0),
    ]


def test_names_that_need_an_escape() -> None:
    assert parse(r"my\040disk -" + "\n" + r"\043one", "tab") == [Entry("my disk"), Entry("#one")]


def test_unknown_options_are_refused_with_a_suggestion() -> None:
    refused("web1 readonly", "tab:1: unknown option 'readonly'; did you mean 'read-only'?")
    refused("\nweb1 nofial", "tab:2: ", "did you mean 'nofail'?")
    refused("web1 frobnicate", "known: read-only, device, nofail, noauto, timeout")
    refused("web1 nofail,", "unknown option ''")


def test_values_that_cannot_be() -> None:
    refused("web1 device=nbd5", "like device=/dev/nbd5")
    refused("web1 device=/dev/nbd5/../sda", "like device=/dev/nbd5")
    refused("web1 device", "like device=/dev/nbd5")
    refused("web1 timeout=soon", "like timeout=30s")
    refused("web1 timeout", "like timeout=30s")
    refused("web1 nofail=yes", "takes no value")
    refused("web1 nofail,nofail", "'nofail' twice")
    refused("web1 nofail noauto", "'noauto' is too much", r"\040")
    refused("a/b", "must not be '.', '..' or hold a '/'")
    refused(r"web\012", "control characters")


def test_same_volume_or_device_twice() -> None:
    refused("web1\nweb2\nweb1 nofail", "tab:3: volume 'web1' is in line 1 already")
    refused("web1 device=/dev/nbd1\nweb2 device=/dev/nbd1", "tab:2: /dev/nbd1 is in line 1")


def test_what_is_no_tab(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(bytes(range(128, 256)))
    with pytest.raises(CommandError, match="not UTF-8"):
        load(str(tmp_path / "noise"))
    (tmp_path / "huge").write_bytes(b"#" * (2 << 20))
    with pytest.raises(CommandError, match="longer than"):
        load(str(tmp_path / "huge"))
    with pytest.raises(FileNotFoundError):
        load(str(tmp_path / "none"))


def test_sample_names_nothing_and_every_example_of_it_is_right() -> None:
    assert load(str(SAMPLE)) == []
    lines = SAMPLE.read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("# NAME"))
    examples = "\n".join(line.removeprefix("# ") for line in lines[start + 1 : start + 4])
    assert [entry.volume for entry in parse(examples, "tab")] == ["web1", "archive", "scratch"]


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused_in_one_line(text: str) -> None:
    try:
        entries = parse(text, "tab")
    except CommandError as error:
        assert "\n" not in str(error)
    else:
        assert all(entry.volume for entry in entries)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=0x3000), min_size=1, max_size=20))
def test_every_name_that_a_volume_can_have_can_be_written(name: str) -> None:
    try:
        check_name(name)
    except StoreError:
        return
    written = "".join(f"\\{ord(c):03o}" if c in " \\#" else c for c in name)
    assert parse(f"{written} -", "tab") == [Entry(name)]
