"""A bounded share of `make torture`: simulated sites with the shipped daemons, one seed each."""

import logging
import os
from collections.abc import Callable, Iterator

import pytest

from sim.torture import Case, run_case, run_seeds, summary

SEEDS = int(os.environ.get("MILLPOND_TORTURE_SEEDS", "0")) or 60


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What daemons say while everything breaks is no news."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_everything_goes_wrong_and_no_promise_is_broken(
    record_property: Callable[[str, object], None],
) -> None:
    """The failing seed's command is in the output."""
    outcomes = run_seeds(1, SEEDS)
    record_property("figure", summary(outcomes))
    assert not [outcome.error for outcome in outcomes if outcome.error]


def test_same_seed_is_the_same_world() -> None:
    """To the nanosecond: else the command of a failing seed would repeat nothing."""
    for seed in (3, 8, 21):
        one, two = run_case(Case(seed)), run_case(Case(seed))
        assert one == two
