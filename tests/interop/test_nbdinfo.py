"""nbdinfo: libnbd's view of the whole negotiation."""

import json
from typing import Any

from interop.conftest import SIZE_BYTES, Run
from millpondprocess import Millpond
from nbdclient import parse_uri


def described(run: Run, uri: str) -> dict[str, Any]:
    """What nbdinfo --json says about one export."""
    exports = json.loads(run("nbdinfo", "--json", uri).stdout)["exports"]
    assert len(exports) == 1
    found: dict[str, Any] = exports[0]
    return found


def of_socket(millpond: Millpond, name: str) -> str:
    """The URI of another export on the same socket."""
    return f"nbd+unix:///{name}?socket={parse_uri(millpond.uri).address}"


def test_size_flags_and_block_sizes(millpond: Millpond, run: Run) -> None:
    found = described(run, millpond.uri)
    assert found["export-size"] == SIZE_BYTES
    assert found["is_read_only"] is False
    assert found["is_rotational"] is False
    offered = ("flush", "fua", "trim", "zero", "multi_conn")
    assert {name: found[f"can_{name}"] for name in offered} == dict.fromkeys(offered, True)
    assert found["block_size_minimum"] == 1
    assert found["block_size_preferred"] == 4096
    assert found["block_size_maximum"] == 32 << 20


def test_size_alone(millpond: Millpond, run: Run) -> None:
    assert int(run("nbdinfo", "--size", millpond.uri).stdout) == SIZE_BYTES


def test_can_answers_by_exit_code(millpond: Millpond, run: Run) -> None:
    usual = ("connect", "read", "write", "flush", "fua", "trim", "zero", "multi-conn")
    for able in (*usual, "df", "structured-reply", "cache", "fast-zero"):
        run("nbdinfo", "--can", able, millpond.uri)
    run("nbdinfo", "--is", "read-only", millpond.uri, code=2)


def test_list_names_the_export(millpond: Millpond, run: Run) -> None:
    listed = json.loads(run("nbdinfo", "--list", "--json", of_socket(millpond, "")).stdout)
    exports = {export["export-name"]: export["export-size"] for export in listed["exports"]}
    name = parse_uri(millpond.uri).export
    assert len(exports) == 1
    assert set(exports.values()) == {SIZE_BYTES}
    assert name in ("", *exports)


def test_default_export_is_the_only_volume(millpond: Millpond, run: Run) -> None:
    assert described(run, of_socket(millpond, ""))["export-size"] == SIZE_BYTES


def test_unknown_export_is_refused_with_a_reason(millpond: Millpond, run: Run) -> None:
    done = run("nbdinfo", of_socket(millpond, "no-such-volume"), code=1)
    assert "no-such-volume" in done.stderr


def test_context_is_listed(millpond: Millpond, run: Run) -> None:
    assert described(run, millpond.uri)["contexts"] == ["base:allocation"]
