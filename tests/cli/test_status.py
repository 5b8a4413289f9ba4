"""What status says of a volume in words, from the values that it is given."""

import pytest

from millpond.cli.configtypes import ControlTable
from millpond.cli.main import main
from millpond.cli.run import UNREACHABLE
from millpond.cli.status import CONTROL_SOCKET, control_path, notes_of

QUIET = {"problem": None, "destage_problem": None, "slowed_bytes_per_s": None}


def test_volume_without_a_problem_has_no_notes() -> None:
    assert notes_of(QUIET) == []


def test_bound_exceeded_comes_first() -> None:
    volume = QUIET | {"bound_exceeded": True, "bound_s": 30.0, "destage_problem": "the store hangs"}
    assert notes_of(volume) == ["BOUND EXCEEDED (30s)", "the store hangs"]


def test_slowed_guest_and_waiting_guest() -> None:
    assert notes_of(QUIET | {"slowed_bytes_per_s": 1 << 20}) == ["guest slowed to 1M/s"]
    assert notes_of(QUIET | {"slowed_bytes_per_s": 0}) == ["guest waits for destage"]


def test_why_a_volume_failed_hides_why_destage_waited() -> None:
    volume = QUIET | {"problem": "does not verify", "destage_problem": "the store hangs"}
    assert notes_of(volume) == ["does not verify"]


def test_cache_that_nobody_names_is_the_one_of_this_host() -> None:
    assert ControlTable().socket == CONTROL_SOCKET, "where it listens"
    assert control_path(None, None) == CONTROL_SOCKET
    assert control_path(None, "elsewhere") == "elsewhere"
    assert control_path("pond", "elsewhere") == "pond/control.sock"


@pytest.mark.parametrize(
    "command",
    [
        *(["status"], ["cache", "list"], ["flush", "disk"], ["attach", "disk"], ["detach", "disk"]),
        *(["device", "list"], ["device", "xml", "disk"], ["unmap", "disk", "--timeout", "0s"]),
    ],
    ids=lambda words: words[0],
)
def test_commands_that_ask_a_cache_need_not_be_told_which(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No test machine has a cache there."""
    monkeypatch.delenv("MILLPOND_CONTROL", raising=False)
    assert main(command) == UNREACHABLE
    assert f"no cache answers at {CONTROL_SOCKET}" in capsys.readouterr().err
