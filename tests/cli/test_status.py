"""What status says of a volume in words, from the values that it is given."""

from millpond.cli.status import notes_of

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
