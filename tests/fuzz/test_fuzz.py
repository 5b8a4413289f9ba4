"""A bounded run of every fuzz harness: the same inputs every time, in a few seconds each.

`make fuzz SECONDS=3600` goes on where this ends.  An input that once crashed, hung or ate memory is
kept in regressions/HARNESS/ under the name of its situation and runs first.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from fuzz import harness

Record = Callable[[str, object], None]
SEED = 1
# So that each takes some three seconds.
RUNS = {"record": 40_000, "nbd": 400, "fetch": 400, "wire": 400, "cache": 300, "store": 300}


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """Compiled once; again only what was edited."""
    harness.build()


@pytest.mark.parametrize(
    ("name", "path"), [pytest.param(*pair, id=pair[1].name) for pair in harness.regressions()]
)
def test_input_that_was_once_a_bug(name: str, path: Path) -> None:
    harness.replay(name, path)


@pytest.mark.parametrize("name", harness.HARNESSES)
def test_fuzzed_input_ends_in_an_error_and_in_nothing_worse(
    name: str, record_property: Record
) -> None:
    report = harness.run(name, runs=RUNS[name], seed=SEED)
    assert report.runs >= RUNS[name]
    record_property("figure", f"{name}: {report.runs} inputs")
