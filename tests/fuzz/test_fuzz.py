"""A bounded run of every fuzz harness: the same inputs every time, in a few seconds each.

`make fuzz SECONDS=3600` goes on where this ends.  An input that once crashed, hung or ate memory is
kept in regressions/HARNESS/ under the name of its situation and runs first.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from fuzz import harness

Record = Callable[[str, object], None]
Reports = dict[str, Future[harness.Report]]
SEED = 1
# All seeds of each (seeds.py), and as many more as take it to three to six seconds.
RUNS = {"record": 15_000, "nbd": 120, "fetch": 200, "wire": 300, "cache": 230, "store": 520}


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """Compiled once; again only what was edited."""
    harness.build()


@pytest.fixture(scope="module")
def reports(built: None) -> Iterator[Reports]:
    """All of them under way, one on each processor."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            name: pool.submit(harness.run, name, runs=RUNS[name], seed=SEED)
            for name in harness.HARNESSES
        }


@pytest.mark.parametrize(
    ("name", "path"), [pytest.param(*pair, id=pair[1].name) for pair in harness.regressions()]
)
def test_input_that_was_once_a_bug(name: str, path: Path) -> None:
    harness.replay(name, path)


@pytest.mark.parametrize("name", harness.HARNESSES)
def test_fuzzed_input_ends_in_an_error_and_in_nothing_worse(
    name: str, reports: Reports, record_property: Record
) -> None:
    report = reports[name].result()
    assert report.runs >= RUNS[name]
    record_property("figure", f"{name}: {report.runs} inputs")
